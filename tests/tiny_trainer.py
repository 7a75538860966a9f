"""A model, a tokenizer and trainers small enough to train in a test, whose completions are a fixed script."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig

WORDS = [f"w{index}" for index in range(40)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, "user", "assistant", "system", "after", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(**options: Any) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 47, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(**({"max_position_embeddings": 128} | sizes | heads | ids | options))
    model = LlamaForCausalLM(config)
    # Far from uniform, as a trained model is.
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


def divisible_model() -> LlamaForCausalLM:
    """One of which two ranks can have equal shards."""
    return tiny_model(num_key_value_heads=2, vocab_size=48)


def saved_model(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """The path of a `tiny_model`: TRL loads reference and teacher from where the model came from."""
    tiny_model().to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(count: int = 4, *, chat: bool = True) -> Dataset:
    texts = [" ".join(random.Random(index).choices(WORDS, k=3 + index % 3)) for index in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts] if chat else texts})


def completion(step: int, index: int) -> list[int]:
    """What completion ``index`` of the generation batch at ``step`` says: 2 to 6 words and, usually, an end.

    The first of every group of four has one, so that it can be shown to a teacher.
    """
    draw = random.Random(1000 * step + index)
    ids = [draw.randrange(7, 47) for _ in range(draw.randrange(2, 7))]
    return ids if draw.random() < 0.2 and index % 4 else [*ids, 1]


def one_correct(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for the first completion of every group of four, but in the last group; 0 elsewhere."""
    last = len(completion_ids) - 4
    return [float(index % 4 == 0 and index < last) for index in range(len(completion_ids))]


def graded(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that depends on the completion alone."""
    return [(sum(ids) % 5) / 4 for ids in completion_ids]


def equal(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The same reward for all, whose mean in fp32 is another number."""
    return [0.2] * len(completion_ids)


class Scripted:
    """Replaces sampling, in a trainer of either kind."""

    def _script(self, count: int) -> list[list[int]]:
        first = self.accelerator.process_index * count  # type: ignore[attr-defined]
        return [completion(self.state.global_step, first + index) for index in range(count)]  # type: ignore[attr-defined]


class ScriptedGRPO(Scripted, GRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class ScriptedSRPO(Scripted, SRPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return self._script(len(prompt_ids)), None


class ScriptedSDPO(Scripted, SDPOTrainer):
    def _generate(self, prompt_ids: Any) -> Any:
        return prompt_ids, self._script(len(prompt_ids))


class SharedSRPO(SRPOTrainer, ScriptedGRPO):
    """The script is in the place of what TRL samples, and another one on every rank that has the same rows."""

    def _script(self, count: int) -> list[list[int]]:
        group, rank = divmod(self.accelerator.process_index, self._tp_size)
        first = group * count + 1000 * rank
        return [completion(self.state.global_step, first + index) for index in range(count)]


CONFIGS = {SRPOTrainer: SRPOTrainerConfig, GRPOTrainer: GRPOConfig, SDPOTrainer: SDPOConfig}


def tiny_trainer(cls: Any, folder: Path, *, reward: Any = graded, model: Any = None, **options: Any) -> Any:
    """A trainer of 8 completions per micro-batch in groups of 4; ``options`` go to its config.

    ``processing_class="own"`` is that of a model that is a path.
    """
    peft_config = options.pop("peft_config", None)
    dataset = options.pop("dataset", None)
    tokenizer = options.pop("processing_class", None)
    arguments = {name: options.pop(name) for name in ("teacher_model", "rollout_func") if name in options}
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return cls(
        model=tiny_model() if model is None else model,
        reward_funcs=reward,
        args=next(CONFIGS[base] for base in cls.__mro__ if base in CONFIGS)(**(defaults | options)),
        train_dataset=prompts() if dataset is None else dataset,
        processing_class=tiny_tokenizer() if tokenizer is None else None if tokenizer == "own" else tokenizer,
        peft_config=peft_config,
        **arguments,
    )


def train(cls: Any, folder: Path, **options: Any) -> Any:
    """A `tiny_trainer` that has trained."""
    trainer = tiny_trainer(cls, folder, **options)
    trainer.train()
    return trainer


def curve(trainer: Any, name: str = "loss") -> list[float]:
    """A metric at every logged step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
