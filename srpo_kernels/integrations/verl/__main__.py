"""`python -m srpo_kernels.integrations.verl`: whether verl finds the plugin by itself; exit code 0 if it does."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

GROUP = "verl.plugins"
MODULE = "srpo_kernels.integrations.verl.plugin"

# In a process of its own, where only verl's own discovery can have registered anything.
_QUESTION = """
import json, verl
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
names = [*POLICY_LOSS_REGISTRY, *DISTILLATION_LOSS_REGISTRY]
print(json.dumps([verl.__version__, [name for name in names if name.startswith("srpo_")]]))
"""


def main() -> int:
    """Print what is registered, or what is missing and what to do."""
    if not any(entry.value == MODULE for entry in entry_points(group=GROUP)):
        print(f"no entry point of group {GROUP} leads to {MODULE}: install srpo-kernels, or set "
              f"VERL_USE_EXTERNAL_MODULES={MODULE}")  # fmt: skip
        return 1
    answer = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True)
    if answer.returncode:
        print(f"verl cannot be imported:\n{answer.stderr}")
        return 1
    version, names = json.loads(answer.stdout.splitlines()[-1])
    if not names:
        print(f"verl {version} has not loaded the plugin: VERL_USE_EXTERNAL_PLUGINS must be auto or name srpo_kernels, "
              f"and `python -c 'import {MODULE}'` must work")  # fmt: skip
        return 1
    print(f"verl {version} has {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
