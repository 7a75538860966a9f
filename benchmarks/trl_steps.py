"""Steps of SRPOTrainer and of TRL's own trainers, on scripted completions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks.options import Sizes
from benchmarks.processes import extra_resident_bytes
from benchmarks.trainers import Side, Step
from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig
from srpo_kernels.verify.batches import DTYPES

_TEMPLATE = "{prompt} {solution}"


def measure_peak(side: Side, step: Step, threads: int) -> int | None:
    """Extra peak bytes of one step in this process, which must be a fresh one; None where the system does not tell."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        # Imports, thread pools and workspaces that do not grow with the sizes are there before.
        small = Sizes(layers=1, vocab=64, hidden=16, length=8)
        prepare(side, Step(step.branch, sizes=small, dtype=step.dtype), Path(folder))()
        return extra_resident_bytes(prepare(side, step, Path(folder)))


def extra_device_bytes(step: Callable[[], Tensor]) -> int:
    """Extra peak bytes of one step on the GPU."""
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def prepare(side: Side, step: Step, folder: Path) -> Callable[[], Tensor]:
    """A step of one side: fills the gradients anew and returns the head's, which is the embedding's too."""
    sizes = step.sizes
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": sizes.groups * sizes.group,
        "num_generations": sizes.group,
        "max_completion_length": sizes.length,
        "use_cpu": step.device == "cpu",
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    if side == "srpo_kernels":
        # TRL's mean over sequences with equal weights, for the trainer that has no other.
        as_trl: dict[str, Any] = {"loss_type": "grpo", "dw_beta": 0.0} if step.branch == "sdpo" else {}
        as_trl |= {"teacher_model_kind": "live", "teacher_template": _TEMPLATE, "solution_template": "{solution}"}
        # Their log is a forward of completions that cannot move a weight.
        as_trl["log_entropy"] = False
        config = SRPOTrainerConfig(method=step.branch, **options, **as_trl)
        return _srpo_step(_trainer(_Srpo, config, step))
    if step.branch == "grpo":
        return _trl_step(_trainer(_Grpo, GRPOConfig(epsilon_high=0.28, scale_rewards="none", **options), step))
    teacher = {"teacher_model_kind": "live", "reprompt_template": _TEMPLATE}
    full = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}
    solution = {"solution_template": "{successful_previous_attempt}"}
    return _trl_step(_trainer(_Sdpo, SDPOConfig(**options, **teacher, **full, **solution), step))


def _trainer(cls: Any, config: Any, step: Step) -> Any:
    torch.manual_seed(0)
    sizes = step.sizes
    # Logits of a standard deviation of 2: distributions that differ, as those of a trained model do.
    scale = {"initializer_range": 2.0 * sizes.hidden**-0.5, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | scale
    width = {"hidden_size": sizes.hidden, "intermediate_size": 8 * sizes.hidden // 3}
    layers = {"num_hidden_layers": sizes.layers, "vocab_size": sizes.vocab}
    shape = LlamaConfig(**layers, **width, **heads, pad_token_id=0, eos_token_id=1)
    with torch.device(step.device):
        model = LlamaForCausalLM(shape).to(DTYPES[step.dtype])
    cls.step = step
    trainer = cls(model, _reward(step), config, _prompts(sizes), processing_class=_tokenizer(sizes.vocab))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _tokenizer(vocab: int) -> Any:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def _prompts(sizes: Sizes) -> Any:
    texts = [
        " ".join(f"w{3 + (7 * row + word) % (sizes.vocab - 3)}" for word in range(32)) for row in range(sizes.groups)
    ]
    return Dataset.from_dict({"prompt": texts})


def _reward(step: Step) -> Any:
    def correct(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [step.reward(index) for index in range(len(completion_ids))]

    return correct


def _examples(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]


def _srpo_step(trainer: Any) -> Callable[[], Tensor]:
    batch = trainer._generate_and_score_completions(_examples(trainer))

    def run() -> Tensor:
        trainer._prepare_step([batch])
        return _backward(trainer, trainer._compute_loss(trainer.model, batch))

    return run


def _trl_step(trainer: Any) -> Callable[[], Tensor]:
    score = getattr(trainer, "_prepare_training_batch", None) or trainer._generate_and_score_completions
    batch = score(_examples(trainer))
    return lambda: _backward(trainer, trainer.compute_loss(trainer.model, batch))


def _backward(trainer: Any, loss: Tensor) -> Tensor:
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    gradient: Tensor = trainer.model.lm_head.weight.grad
    return gradient


class _Scripted:
    """Completions of a script in place of generated ones."""

    step: Step

    def _script(self, count: int) -> list[list[int]]:
        return [self.step.completion(index) for index in range(count)]


class _Grpo(_Scripted, GRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class _Srpo(_Scripted, SRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class _Sdpo(_Scripted, SDPOTrainer):
    def _generate(self, prompt_ids: Any) -> Any:
        return prompt_ids, self._script(len(prompt_ids))
