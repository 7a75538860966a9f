"""A training step in TRL: SRPOTrainer beside TRL's own trainers, on the same model and the same completions."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks.timing import quantiles
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig

Branch = Literal["grpo", "sdpo"]
Side = Literal["srpo_kernels", "trl"]
SIDES: tuple[Side, Side] = ("srpo_kernels", "trl")

_STATUS = Path("/proc/self/status")
# Trainers that differ more than rounding explains do not compute the same thing.
_AGREEMENT = 1e-3
_TEMPLATE = "{prompt} {solution}"


@dataclass(frozen=True)
class Step:
    """What is trained: a Llama of ``layers`` layers with SmolLM2-135M's head, on groups of ``group`` completions."""

    layers: int = 4
    """Layers of the model; 30 are SmolLM2-135M."""
    vocab: int = 49152
    """Words of the vocabulary."""
    hidden: int = 576
    """Size of the hidden states."""
    groups: int = 2
    """Prompts of the batch; of every second one no completion is correct, of the others one is."""
    group: int = 4
    """Completions per prompt."""
    length: int = 128
    """Longest completion; they are from half to all of it."""

    def completions(self, index: int) -> list[int]:
        """Token ids of completion ``index``."""
        draw = random.Random(index)
        return [draw.randrange(3, self.vocab) for _ in range(draw.randint(self.length // 2, self.length))]


def trainers(
    branches: tuple[Branch, ...] = ("grpo", "sdpo"),
    step: Step = Step(),
    rounds: int = 5,
    threads: int = torch.get_num_threads(),
    memory: bool = True,
) -> None:
    """Time and extra peak memory of a step of SRPOTrainer and of TRL's trainer, in fp32.

    A step is what follows generation and scoring: the teacher, the student's forward, the loss and the backward; the
    optimizer is left out, which is the same for both. ``grpo`` is beside `GRPOTrainer`, ``sdpo`` beside
    `SDPOTrainer` with full logits; both sides take turns and must agree on the loss. Peak memory is of a fresh
    process.

    Args:
        branches: what to compare.
        step: the sizes.
        rounds: times that every side runs.
        threads: threads of torch.
        memory: measure peak memory too.
    """
    if rounds < 1:
        raise SystemExit(f"rounds must be >= 1, got {rounds}")
    torch.set_num_threads(threads)
    table = Table("branch", "side", "seconds (p20, median, p80)", "of TRL's time", "extra peak MiB", title=str(step))
    for branch in branches:
        with tempfile.TemporaryDirectory() as folder:
            steps = {side: prepare(branch, side, step, Path(folder)) for side in SIDES}
            losses = {side: run() for side, run in steps.items()}
            if abs(losses["srpo_kernels"] - losses["trl"]) > _AGREEMENT * abs(losses["trl"]):
                raise RuntimeError(f"the trainers do not compute the same loss of {branch}: {losses}")
            seconds = _take_turns(steps, rounds)
            del steps
        ratios = quantiles([a / b for a, b in zip(seconds["srpo_kernels"], seconds["trl"], strict=True)])
        for side in SIDES:
            times = ", ".join(f"{value:.2f}" for value in quantiles(seconds[side]))
            ratio = f"{ratios.median:.2f}" if side == "srpo_kernels" else ""
            peak = f"{measure_peak(branch, side, step, threads) / 2**20:,.0f}" if memory else ""
            table.add_row(branch, side, times, ratio, peak)
    Console(width=120).print(table)


def _take_turns(steps: dict[Side, Callable[[], float]], rounds: int) -> dict[Side, list[float]]:
    seconds: dict[Side, list[float]] = {side: [] for side in SIDES}
    for index in range(rounds):
        for side in SIDES if index % 2 else SIDES[::-1]:
            start = time.perf_counter()
            steps[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def measure_peak(branch: Branch, side: Side, step: Step, threads: int) -> int:
    """Extra peak bytes of one step, in a process of its own: highest resident set less that before the step."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(branch, side, step, threads, sender))
    process.start()
    # Nobody else holds the sending end: a process that dies ends the wait.
    sender.close()
    peak: int = receiver.recv()
    process.join()
    return peak


def _peak(branch: Branch, side: Side, step: Step, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        # Imports, thread pools and workspaces that do not grow with the sizes are there before.
        prepare(branch, side, Step(layers=1, vocab=64, hidden=16, length=8), Path(folder))()
        run = prepare(branch, side, step, Path(folder))
        before = _resident_bytes("VmRSS")
        run()
        sender.send(_resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    """A field of this process's status; the kernel gives KiB."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def prepare(branch: Branch, side: Side, step: Step, folder: Path) -> Callable[[], float]:
    """A step of one side: fills the gradients anew and returns the loss."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": step.groups * step.group,
        "num_generations": step.group,
        "max_completion_length": step.length,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    if side == "srpo_kernels":
        # TRL's mean over sequences with equal weights, for the trainer that has no other.
        as_trl: dict[str, Any] = {"loss_type": "grpo", "dw_beta": 0.0} if branch == "sdpo" else {}
        as_trl |= {"teacher_model_kind": "live", "teacher_template": _TEMPLATE}
        config = SRPOTrainerConfig(method=branch, **options, **as_trl)
        return _srpo_step(_trainer(_Srpo, config, step))
    if branch == "grpo":
        return _trl_step(_trainer(_Grpo, GRPOConfig(epsilon_high=0.28, scale_rewards="none", **options), step))
    teacher = {"teacher_model_kind": "live", "reprompt_template": _TEMPLATE}
    full = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}
    solution = {"solution_template": "{successful_previous_attempt}"}
    return _trl_step(_trainer(_Sdpo, SDPOConfig(**options, **teacher, **full, **solution), step))


def _trainer(cls: Any, config: Any, step: Step) -> Any:
    torch.manual_seed(0)
    # Logits of a standard deviation of 2: distributions that differ, as those of a trained model do.
    scale = {"initializer_range": 2.0 * step.hidden**-0.5, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | scale
    sizes = {"hidden_size": step.hidden, "intermediate_size": 8 * step.hidden // 3, "num_hidden_layers": step.layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=step.vocab, **sizes, **heads, pad_token_id=0, eos_token_id=1))
    cls.step = step
    trainer = cls(model, _reward(step), config, _prompts(step), processing_class=_tokenizer(step.vocab))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _tokenizer(vocab: int) -> Any:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def _prompts(step: Step) -> Any:
    texts = [
        " ".join(f"w{3 + (7 * row + word) % (step.vocab - 3)}" for word in range(32)) for row in range(step.groups)
    ]
    return Dataset.from_dict({"prompt": texts})


def _reward(step: Step) -> Any:
    def correct(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(index % (2 * step.group) == 0) for index in range(len(completion_ids))]

    return correct


def _examples(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]


def _srpo_step(trainer: Any) -> Callable[[], float]:
    batch = trainer._generate_and_score_completions(_examples(trainer))

    def run() -> float:
        trainer._prepare_step([batch])
        return _backward(trainer, trainer._compute_loss(trainer.model, batch))

    return run


def _trl_step(trainer: Any) -> Callable[[], float]:
    score = getattr(trainer, "_prepare_training_batch", None) or trainer._generate_and_score_completions
    batch = score(_examples(trainer))
    return lambda: _backward(trainer, trainer.compute_loss(trainer.model, batch))


def _backward(trainer: Any, loss: Any) -> float:
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach())


class _Scripted:
    """Completions of a script in place of generated ones."""

    step: Step

    def _script(self, count: int) -> list[list[int]]:
        return [self.step.completions(index) for index in range(count)]


class _Grpo(_Scripted, GRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class _Srpo(_Scripted, SRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class _Sdpo(_Scripted, SDPOTrainer):
    def _generate(self, prompt_ids: Any) -> Any:
        return prompt_ids, self._script(len(prompt_ids))


if __name__ == "__main__":
    tyro.cli(trainers, prog="python -m benchmarks.trainers")
