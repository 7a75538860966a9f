"""Forwards without padding: the same log-probs, loss and gradients, of every architecture or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

from srpo_kernels.integrations.transformers import AverageTeacher, check_model, config_for, response_loss
from tests.integrations.test_transformers_models import ACCEPTED, OTHERS, padding_error
from tests.tiny_models import VOCAB, tiny_model_of

# States, convolutions and positions that a model counts itself go on from one sequence to the next.
REFUSED = ("recurrent_gemma", "mamba", "rwkv", "falcon_h1", "xlstm")
REFUSED += ("bart", "bloom", "mpt", "falcon", "xglm", "biogpt", "opt")
PACKED = tuple(name for name in ACCEPTED if name not in REFUSED)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_have_the_log_probs_of_rows_alone(name: str) -> None:
    model = tiny_model_of(name)
    check_model(model, padding_free=True)
    assert padding_error(model, padding_free=True) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_not_take_them_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="padding_free must be False with "):
        check_model(tiny_model_of(name), padding_free=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture_is_right_or_refused(name: str) -> None:
    model = tiny_model_of(name)
    try:
        check_model(model, padding_free=True)
    except ValueError as refusal:
        assert str(refusal).startswith(("padding_free must ", "model must "))
    else:
        assert padding_error(model, padding_free=True) < 1e-5


def batch() -> dict[str, Tensor]:
    """Three rows with padding on the left, with one token, and on the right; the middle one is distilled."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    ids = torch.randint(1, VOCAB, (3, 7))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "response_mask": mask.bool() & (mask.cumsum(1) > 2),
        "advantages": torch.randn(3),
        "sdpo_mask": torch.tensor([False, True, False]),
    }


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_padded_rows(name: str) -> None:
    model, inputs = tiny_model_of(name), batch()
    teacher = AverageTeacher(tiny_model_of(name))
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    results = []
    for padding_free in (False, True):
        model.zero_grad()
        options: dict[str, Any] = {"padding_free": padding_free, "config": config_for(model, entropy_coef=0.1)}
        out = response_loss(model, **inputs, teacher=teacher, **options)
        out.loss.backward()
        results.append([out.loss.detach(), out.log_probs, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    # Of the check: eight tokens alone, twice, then sixteen with padding or thirteen without, behind two rows.
    assert seen == [8, 8, 16, 21, 8, 8, 13, 13, 15]


def test_nothing_but_padding_has_a_loss_of_0() -> None:
    model, inputs = tiny_model_of("llama"), batch()
    for name in ("attention_mask", "response_mask"):
        inputs[name] = torch.zeros_like(inputs[name])
    inputs["sdpo_mask"][:] = False
    out = response_loss(model, **inputs, padding_free=True)
    out.loss.backward()
    assert out.loss.item() == 0.0


def test_positions_of_ones_own_are_refused() -> None:
    model, inputs = tiny_model_of("llama"), batch()
    inputs["sdpo_mask"][:] = False
    with pytest.raises(ValueError, match="position_ids must not be given with padding_free"):
        response_loss(model, **inputs, padding_free=True, model_inputs={"position_ids": torch.zeros(3, 7).long()})


def test_a_trainer_trains_alike(tmp_path: Path) -> None:
    pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
    from tests.tiny_trainer import ScriptedSRPO, curve, one_correct, saved_model, tiny_trainer

    runs, tokens = [], []
    for padding_free in (False, True):
        options: dict[str, Any] = {"model": saved_model(tmp_path / "model"), "beta": 0.1, "num_iterations": 2}
        trainer = tiny_trainer(
            ScriptedSRPO, tmp_path, reward=one_correct, max_steps=4, padding_free=padding_free, **options
        )
        seen: list[int] = []
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].numel())
        )
        trainer.train()
        runs.append(trainer)
        tokens.append(sum(seen))
    for name in ("loss", "grad_norm", "kl", "srpo/teacher_entropy", "srpo/divergence"):
        assert curve(runs[1], name) == pytest.approx(curve(runs[0], name), rel=1e-3, abs=1e-5), name
    assert curve(runs[1], "srpo/divergence")[0] > 0.0
    assert tokens[1] < 0.9 * tokens[0]
