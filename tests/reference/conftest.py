from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]


@pytest.fixture(scope="session", name="config")
def config_factory() -> Make:
    def config(**overrides: Any) -> SimpleNamespace:
        defaults = {
            "loss_type": "grpo",
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "delta": None,
            "dual_clip": None,
            "log_ratio_clamp": 20.0,
            "kl_coef": 0.0,
            "kl_type": "k3",
            "entropy_coef": 0.0,
            "divergence": "jsd",
            "alpha": 0.5,
            "distillation_mode": "full",
            "topk": 100,
            "add_tail": True,
            "distillation_is_clip": 2.0,
            "dw_beta": 1.0,
            "temperature": 1.0,
            "logit_scale": 1.0,
            "softcap": None,
            "reduction": "token",
            "max_length": 7,
            "count_inactive": False,
            "count_entropy": False,
        }
        assert overrides.keys() <= defaults.keys()
        return SimpleNamespace(**{**defaults, **overrides})

    return config


@pytest.fixture(scope="session", name="batch")
def batch_factory() -> Make:
    def batch(seed: int = 0, sequences: int = 6, length: int = 5, vocabulary: int = 11) -> dict[str, Any]:
        """Unequal lengths, both branches, a zero advantage; NaN and invalid ids where the mask is false."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(1, length + 1, (sequences, 1), generator=generator)
        mask = torch.arange(length) < lengths
        target_ids = torch.randint(vocabulary, mask.shape, generator=generator)
        advantages = randn(sequences)
        advantages[0] = 0
        masked = (~mask)[..., None]
        return {
            "hidden": randn(*mask.shape, 4).masked_fill(masked, torch.nan).requires_grad_(),
            "weight": randn(vocabulary, 4).requires_grad_(),
            "bias": randn(vocabulary).requires_grad_(),
            "target_ids": target_ids.masked_fill(~mask, -100),
            "advantages": advantages,
            "mask": mask,
            "sdpo_mask": torch.arange(sequences) % 3 == 2,
            "teacher_hidden": randn(*mask.shape, 4).masked_fill(masked, torch.inf),
            "old_log_probs": (randn(*mask.shape) - 3).masked_fill(~mask, torch.nan),
            "ref_log_probs": (randn(*mask.shape) - 3).masked_fill(~mask, torch.nan),
            "is_weights": randn(*mask.shape).exp().masked_fill(~mask, torch.nan),
        }

    return batch


@pytest.fixture(scope="session", name="packed")
def packed_factory() -> Make:
    def packed(inputs: dict[str, Any]) -> dict[str, Any]:
        """The valid rows alone, shuffled, with their sequence ids; advantages and routes per token."""
        mask = inputs["mask"]
        order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(1))
        sequence_ids = torch.arange(10, 10 + len(mask))
        padded = inputs | {"sequence_ids": sequence_ids}
        for name in ("advantages", "sdpo_mask", "sequence_ids"):
            padded[name] = padded[name][:, None].expand_as(mask)
        shared = {name: padded.pop(name) for name in ("weight", "bias")}
        del padded["mask"]
        return {name: value[mask][order] for name, value in padded.items()} | shared

    return packed


@pytest.fixture(scope="session", name="grads")
def grads_factory() -> Make:
    def grads(loss: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"], inputs["bias"]]))

    return grads
