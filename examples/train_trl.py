"""Train SmolLM2-135M-Instruct with SRPO through TRL, on a CPU: `python -m examples.train_trl`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from examples.rollouts import load_model
from examples.tasks import problems
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig

PROBLEMS = list(problems(("products", "chain_sum", "gcd"), 40, seed=0))


def correct(completions: list[list[dict[str, str]]], problem: list[int], **_: Any) -> list[float]:
    """1.0 for a right answer."""
    return [PROBLEMS[index].reward(reply[0]["content"]) for reply, index in zip(completions, problem, strict=True)]


def main() -> None:
    model, tokenizer = load_model(None)
    rows = [{"prompt": [{"role": "user", "content": p.question}], "problem": i} for i, p in enumerate(PROBLEMS)]
    config = SRPOTrainerConfig(
        "runs/trl",
        method="srpo",
        questions_per_batch=5,
        per_device_train_batch_size=8,
        max_completion_length=24,
        temperature=0.7,
        learning_rate=1e-5,
        max_steps=8,
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
