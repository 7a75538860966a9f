"""A pretrained model through the TRL trainer: SmolLM2-135M-Instruct on problems of reasoning-gym."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from transformers.trainer_callback import PrinterCallback

from benchmarks.results import resolve_device
from examples.rollouts import load_model
from examples.tasks import TaskName, problems
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig
from studies.learning.cells import CHOICE_SEEDS, Run, Stage, choice_runs, comparison_runs
from studies.learning.comparison import with_chosen_lr
from studies.learning.options import Pretrained
from studies.learning.runs import run_missing

_TASKS: tuple[TaskName, ...] = ("products", "chain_sum", "lcm")
_REPLIES = 8
# A line is of as many steps: with 4 questions of 8 replies each, 128 replies to new problems.
_STEPS_PER_LINE = 4
# The first fifth has to have two lines for an area.
_LEAST_STEPS = 10 * _STEPS_PER_LINE

# Names in the file, and in the trainer's log.
_LOGGED = {
    "accuracy": "reward",
    "reply_length": "completions/mean_length",
    "sdpo_tokens": "srpo/sdpo_token_fraction",
    "teacher_entropy": "srpo/teacher_entropy",
    "dw_weight_std": "srpo/dw_weight_std",
    "grad_norm": "grad_norm",
    "seconds": "step_time",
}


def pretrained(options: Pretrained) -> None:
    """What ``Pretrained`` describes."""
    steps, choice_steps, out = options.steps, options.choice_steps, options.out
    if min(steps, choice_steps) < _LEAST_STEPS or steps % _STEPS_PER_LINE or choice_steps % _STEPS_PER_LINE:
        raise SystemExit(
            f"steps and choice_steps must be multiples of {_STEPS_PER_LINE} and at least {_LEAST_STEPS}, "
            f"got {steps} and {choice_steps}"
        )
    where = resolve_device(options.device)
    stage = Stage(replace(options, device=where.type), options.methods)
    threads = 1 if options.workers > 1 else torch.get_num_threads()
    train_missing = partial(
        run_missing,
        train=partial(train, threads),
        files=(out,),
        workers=options.workers,
        place=(where, threads),
        console=Console(soft_wrap=True),
    )
    train_missing(choice_runs(stage))
    train_missing(with_chosen_lr(comparison_runs(stage, options.seeds), out))


def train(threads: int, planned: Run[Pretrained]) -> tuple[pd.DataFrame]:
    """One run: means over every four steps of what the trainer has logged."""
    torch.set_num_threads(threads)
    cell = planned.cell
    steps = cell.choice_steps if planned.seed in CHOICE_SEEDS else cell.steps
    return (lines(_train(planned, steps)),)


def lines(history: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over every four steps of a trainer's log, up to the last step of each."""
    log = pd.DataFrame({name: row.get(key) for name, key in _LOGGED.items()} for row in history if "reward" in row)
    # A step that distils nothing has no teacher, and no weights.
    log.loc[log["sdpo_tokens"] == 0, ["teacher_entropy", "dw_weight_std"]] = float("nan")
    log.insert(0, "step", log.index + 1)
    log["train_seconds"] = log.pop("seconds").cumsum()
    grouped = log.groupby(log.index // _STEPS_PER_LINE)
    return grouped.mean().assign(**grouped[["step", "train_seconds"]].last())


def _train(planned: Run[Pretrained], steps: int) -> list[dict[str, Any]]:
    cell, lr = planned.cell, planned.lr
    assert lr is not None
    model, tokenizer = load_model(cell.model)
    drawn = list(problems(_TASKS, steps * cell.questions, planned.seed))

    def correct(completions: list[list[dict[str, str]]], problem: list[int], **_: Any) -> list[float]:
        return [drawn[index].reward(reply[0]["content"]) for reply, index in zip(completions, problem, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": p.question}], "problem": i} for i, p in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        config = SRPOTrainerConfig(
            folder,
            method=planned.method,
            questions_per_batch=cell.questions,
            per_device_train_batch_size=_REPLIES,
            num_generations=_REPLIES,
            max_completion_length=24,
            temperature=1.0,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_entropy=False,
            gradient_checkpointing=False,
            use_cpu=cell.device == "cpu",
            bf16=False,
            seed=planned.seed,
        )
        trainer = SRPOTrainer(model, correct, config, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history: list[dict[str, Any]] = trainer.state.log_history
    return history
