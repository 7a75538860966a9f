"""`python -m srpo_kernels.integrations.verl`: what verl sees of srpo_kernels, and what is missing."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

GROUP = "verl.plugins"
MODULE = "srpo_kernels.integrations.verl.plugin"

# In processes of their own: one where only verl's own discovery can have registered anything, one that imports all.
_HOOKS = """
import json, verl
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
names = [*POLICY_LOSS_REGISTRY, *DISTILLATION_LOSS_REGISTRY]
print(json.dumps([verl.__version__, [name for name in names if name.startswith("srpo_")]]))
"""
_TRAINER = """
import json
from srpo_kernels.integrations.verl import trainer, worker
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.workers.engine import EngineRegistry
engines = EngineRegistry._engines[worker.MODEL_TYPE]
print(json.dumps([get_trainer_cls(trainer.TRAINER_MODE).__name__, {name: sorted(x) for name, x in engines.items()}]))
"""


def main() -> int:
    """Print what is registered, or what is missing and what to do."""
    parser = argparse.ArgumentParser(
        prog="python -m srpo_kernels.integrations.verl",
        description="Says what verl is installed, whether it has loaded srpo_kernels' losses by itself, and whether "
        "the engine and the trainer of srpo_kernels.integrations.verl.main can be imported.",
        epilog="The exit code is 0 if the losses are there, with --trainer if the trainer is there too.",
    )
    parser.add_argument("--trainer", action="store_true", help="fail also where engine or trainer are missing")
    arguments = parser.parse_args()
    has_losses, has_trainer = _report_losses(), _report_trainer()
    return 0 if has_losses and (has_trainer or not arguments.trainer) else 1


def _report_losses() -> bool:
    if not any(entry.value == MODULE for entry in entry_points(group=GROUP)):
        print(f"no entry point of group {GROUP} leads to {MODULE}: install srpo-kernels, or set "
              f"VERL_USE_EXTERNAL_MODULES={MODULE}")  # fmt: skip
        return False
    answer, error = _ask(_HOOKS)
    if answer is None:
        print(f"verl cannot be imported:\n{error}")
        return False
    version, names = answer
    if not names:
        print(f"verl {version} has not loaded the plugin: VERL_USE_EXTERNAL_PLUGINS must be auto or name srpo_kernels, "
              f"and `python -c 'import {MODULE}'` must work")  # fmt: skip
        return False
    print(f"verl {version} has {', '.join(names)}")
    return True


def _report_trainer() -> bool:
    answer, error = _ask(_TRAINER)
    if answer is None:
        print(f"engine and trainer are missing, python -m srpo_kernels.integrations.verl.main does not run: {error}")
        return False
    trainer, engines = answer
    listed = "; ".join(f"{name} on {', '.join(devices)}" for name, devices in engines.items())
    print(f"trainer {trainer}, engines for {listed}: python -m srpo_kernels.integrations.verl.main trains with them")
    return True


def _ask(question: str) -> tuple[Any, str]:
    """The answer on the last line, or None and the last line of what went wrong."""
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if answer.returncode:
        return None, (answer.stderr.strip().splitlines() or ["no error message"])[-1]
    return json.loads(answer.stdout.splitlines()[-1]), ""


if __name__ == "__main__":
    sys.exit(main())
