"""TRL's tests of its `GRPOTrainer`, with `SRPOTrainer` in its place."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from trl import GRPOConfig

from srpo_kernels.integrations.trl import SRPOTrainer, SRPOTrainerConfig
from tools.peers.suites import trl_models
from tools.peers.suites.suite import Suite


@dataclass
class _Config(SRPOTrainerConfig):
    """Ours with TRL's defaults."""

    method: str = "grpo"
    learning_rate: float = GRPOConfig.learning_rate
    epsilon_high: float | None = GRPOConfig.epsilon_high
    scale_rewards: str = GRPOConfig.scale_rewards
    use_bias_correction_kl: bool = GRPOConfig.use_bias_correction_kl
    # Not the epochs of a GPU.
    max_steps: int = 3


class _Trainer(SRPOTrainer):
    """Ours, which makes a config of TRL's defaults where none is given."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **arguments: Any) -> None:
        super().__init__(model, reward_funcs, _Config("out") if args is None else args, **arguments)


_PROMPTS = ("What is better than ugly", "Explicit is", "Simple is better", "Complex", "Flat", "Sparse is better") * 3


def _load_dataset(path: str, name: str, split: str | None = None, *, streaming: bool = False) -> Any:
    """Prompts of the shape of their little data sets."""
    if "image" in path:
        pytest.skip("no counterpart: images of a data set on a hub")
    rows: list[Any] = [*_PROMPTS]
    if name == "conversational_prompt_only":
        rows = [[{"role": "user", "content": text}] for text in rows]
    parts: dict[str, Any] = {"train": rows[:-2], "test": rows[-2:]}
    data: dict[str, Any] = {key: Dataset.from_dict({"prompt": prompts}) for key, prompts in parts.items()}
    if streaming:
        data = {key: one.to_iterable_dataset() for key, one in data.items()}
    if split is not None:
        return data[split]
    return IterableDatasetDict(data) if isinstance(data["train"], IterableDataset) else DatasetDict(data)


def _missing(name: str) -> Callable[[], bool]:
    """Another version of TRL asks for packages that the installed one does not."""
    if not name.startswith("is_"):
        raise AttributeError(name)
    return lambda: False


def _prepare() -> None:
    vars(importlib.import_module("trl.import_utils"))["__getattr__"] = _missing
    trl_models.save_all(os.environ["HF_HUB_CACHE"])


SUITE = Suite(
    peer="TRL's GRPOTrainer",
    paths=(),
    tests=("tests/test_grpo_trainer.py",),
    tests_alone=True,
    reaches=False,
    stand_ins={
        "trl.trainer.grpo_trainer:GRPOTrainer": _Trainer,
        "trl.trainer.grpo_config:GRPOConfig": _Config,
        "datasets.load:load_dataset": _load_dataset,
        # Of older versions of transformers.
        "trl.import_utils:is_jmespath_available": lambda: True,
    },
    without=(
        ("TestGetHighEntropyMask|TestTransformersContinuousBatchingContract", "none of the trainer's loss"),
        ("TestGRPOTrainerVLM|vlm", "image processors of a hub"),
        ("NemotronH|test_trust_remote_code", "a model whose code is on a hub"),
        (
            "TestGRPORolloutDispatch|test_train_moe_peft_model|entropy_bonus_flows_gradients",
            "what other versions of TRL and PEFT do, judged from the installed code",
        ),
        ("test_prepare_input_called|owned_data_requires_max_steps", "the number of steps, which is reduced"),
        # Once they are in a model's class, they are in every later test.
        (r"liger|(loss_types|bias_correction_kl|delta_clipping)\[.*True\]", "kernels of Liger that no CPU runs"),
    ),
    prepare=_prepare,
)
