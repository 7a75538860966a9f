"""``response_loss`` and its parts: from token ids, the loss of the model's own logits of rows without padding."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

import reference
import srpo_kernels as sk
from srpo_kernels.integrations.transformers import (
    AverageTeacher,
    call_with_hidden,
    check_model,
    config_for,
    head_operands,
    logit_transform,
    response_loss,
    response_normalizers,
    response_stats,
    teacher_rows,
)
from tests.tiny_models import tiny_model_of

# Padding before, within, behind, and none.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9])
RESPONSES = torch.tensor(
    [[0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 0, 0, 0, 0], [0] * 6 + [1] * 3]
).bool()
IDS = torch.randint(10, 90, (4, 9), generator=torch.Generator().manual_seed(1))
ROUTED, ADVANTAGES = torch.tensor([True, False, False, True]), torch.tensor([0.3, -1.0, 0.7, 0.2])
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "gpt2": {},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
}


def wide(name: str = "llama", **fields: Any) -> Any:
    model = tiny_model_of(name, **(MODELS[name] | fields)).double()
    for parameter in model.get_output_embeddings().parameters():
        # A bias is 0 at first.
        nn.init.normal_(parameter, std=0.3)
    return model


def rows_alone(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The log-softmax of the model's own logits, row by row without padding."""
    return [
        model(input_ids=row[None, valid.bool()]).logits[0].log_softmax(-1) for row, valid in zip(ids, mask, strict=True)
    ]


def packed_log_probs(model: Any, ids: Tensor, mask: Tensor, responses: Tensor) -> Tensor:
    """Log-probs of a model's vocabulary, ``[N, V]``, that predict the responses."""
    parts = []
    for row, log_probs in enumerate(rows_alone(model, ids, mask)):
        parts.append(log_probs[:-1][responses[row, mask[row].bool()][1:]])
    return torch.cat(parts)


def oracle(student: Tensor, teacher: Tensor | None, routed: Tensor = ROUTED, **options: Any) -> Tensor:
    """The loss from log-probs ``[N, V]``: they are logits too, whose head is the identity and scale is 1."""
    rows = RESPONSES.nonzero()[:, 0]
    return reference.srpo_loss(
        student,
        torch.eye(student.shape[-1], dtype=student.dtype),
        IDS[RESPONSES],
        advantages=ADVANTAGES.double()[rows],
        sdpo_mask=routed[rows],
        sequence_ids=rows,
        teacher_hidden=teacher,
        teacher_weight=None if teacher is None else torch.eye(teacher.shape[-1], dtype=teacher.dtype),
        **options,
    ).loss


@pytest.mark.parametrize("name", MODELS)
def test_loss_log_probs_and_gradients_are_those_of_the_models_logits(name: str) -> None:
    model = wide(name)
    ema = AverageTeacher(copy.deepcopy(model), 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    config = config_for(model, reduction="sequence", entropy_coef=0.01)
    out = response_loss(
        model, IDS, MASK, response_mask=RESPONSES, advantages=ADVANTAGES.double(), sdpo_mask=ROUTED, teacher=ema,
        config=config,
    )  # fmt: skip
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student = packed_log_probs(model, IDS, MASK, RESPONSES)
    with torch.no_grad():
        teacher = packed_log_probs(ema.model, IDS[ROUTED], MASK[ROUTED], RESPONSES[ROUTED])
    plain = sk.SRPOConfig(reduction="sequence", entropy_coef=0.01)
    expected = oracle(student, teacher, config=plain)
    expected.backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    targets = student.gather(1, IDS[RESPONSES][:, None])[:, 0]
    torch.testing.assert_close(out.log_probs[RESPONSES], targets, rtol=0.0, atol=1e-9)
    assert not out.log_probs[~RESPONSES].any()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (gradients[key] - parameter.grad).abs().amax() / parameter.grad.abs().amax().clamp(min=1e-12)
            # The others have norms in fp32 whatever their dtype.
            assert error < (1e-9 if name in ("gpt2", "phi") else 1e-5), key


def test_labels_are_another_way_to_say_it() -> None:
    model = wide()
    options = {"advantages": ADVANTAGES.double()}
    by_mask = response_loss(model, IDS, MASK, response_mask=RESPONSES, **options)
    by_labels = response_loss(model, IDS, MASK, labels=torch.where(RESPONSES, IDS, -100), **options)
    torch.testing.assert_close(by_labels.loss, by_mask.loss, rtol=0.0, atol=0.0)


def test_what_one_call_says_of_a_token_is_what_another_takes() -> None:
    model = wide()
    with torch.no_grad():
        old = response_stats(model, IDS, MASK, response_mask=RESPONSES)
    out = response_loss(
        model, IDS, MASK, response_mask=RESPONSES, advantages=ADVANTAGES.double(), old_log_probs=old.log_probs,
        ref_log_probs=old.log_probs + RESPONSES, is_weights=torch.full((4, 1), 2.0).double(),
        config=config_for(model, kl_coef=0.5, kl_type="k1"),
    )  # fmt: skip
    # The ratio is 1, and the KL is -1 at each token.
    lengths = RESPONSES.sum(1)
    expected = -2.0 * (ADVANTAGES * lengths).sum() / lengths.sum() - 0.5
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(out.log_probs, old.log_probs)
    entropy = packed_log_probs(model, IDS, MASK, RESPONSES)
    torch.testing.assert_close(old.entropy[RESPONSES], -(entropy.exp() * entropy).sum(1))


def test_a_teacher_with_another_prompt_and_micro_batches_that_add_up() -> None:
    model, other = wide(), wide(hidden_size=16)
    # Two more tokens before each row, and the rows' own padding.
    routed_ids = torch.cat([torch.full((2, 2), 5), IDS[ROUTED]], 1)
    routed_mask = nn.functional.pad(MASK[ROUTED], (2, 0), value=1)
    responses = nn.functional.pad(RESPONSES[ROUTED], (2, 0))
    rows = teacher_rows(other, routed_ids, routed_mask, response_mask=responses)
    norms = response_normalizers(RESPONSES, ROUTED, rows, config=config_for(model))
    with torch.no_grad():
        teacher = packed_log_probs(other, routed_ids, routed_mask, responses)
        expected = oracle(packed_log_probs(model, IDS, MASK, RESPONSES), teacher, config=sk.SRPOConfig())
    torch.testing.assert_close(rows.entropy, -(teacher.exp() * teacher).sum(1))
    losses = []
    for index, part in enumerate((slice(0, 1), slice(1, 4))):
        shown = [x[index : index + 1] for x in (routed_ids, routed_mask, responses)]
        taught = teacher_rows(other, *shown[:2], response_mask=shown[2], entropy=False)
        out = response_loss(
            model, IDS[part], MASK[part], response_mask=RESPONSES[part], advantages=ADVANTAGES[part].double(),
            sdpo_mask=ROUTED[part], teacher=taught, normalizers=norms,
        )  # fmt: skip
        losses.append(out.loss.item())
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["live", "average", "another"])
def test_teachers_read_without_dropout_gradient_or_a_trace(kind: str) -> None:
    model = wide(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    teacher: Any = {"live": model, "average": AverageTeacher(model), "another": wide(attention_dropout=0.5).train()}[
        kind
    ]
    source = teacher.model if kind == "average" else teacher
    modes = [module.training for module in source.modules()]
    before = {name: (id(p), p.detach().clone()) for name, p in source.named_parameters()}
    first, second = (teacher_rows(teacher, IDS, MASK, response_mask=RESPONSES) for _ in range(2))
    torch.testing.assert_close(first.hidden, second.hidden)
    assert not first.hidden.requires_grad
    assert [module.training for module in source.modules()] == modes
    for name, parameter in source.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
    out = response_loss(model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=torch.ones(4).bool(), teacher=teacher)
    out.loss.backward()
    if kind == "another":
        assert all(parameter.grad is None for parameter in source.parameters())


@pytest.mark.parametrize("own", [None, 0.7])
@pytest.mark.parametrize("names", [("llama", "gemma2"), ("gemma2", "granite")])
def test_a_teacher_with_a_logit_transform_of_its_own(names: tuple[str, str], own: float | None) -> None:
    model, other = map(wide, names)
    config = config_for(model, temperature=0.8)
    if own is not None:
        transform = logit_transform(other.config)._replace(temperature=own)
        config = dataclasses.replace(config, teacher_transform=transform)
    options: dict[str, Any] = {"advantages": ADVANTAGES.double(), "sdpo_mask": ROUTED, "config": config}
    shown = teacher_rows(other, IDS[ROUTED], MASK[ROUTED], response_mask=RESPONSES[ROUTED], config=config)
    losses = [
        response_loss(model, IDS, MASK, response_mask=RESPONSES, teacher=teacher, **options).loss
        for teacher in (other, shown)
    ]
    with torch.no_grad():
        student = packed_log_probs(model, IDS, MASK, RESPONSES)
        teacher = packed_log_probs(other, IDS[ROUTED], MASK[ROUTED], RESPONSES[ROUTED])
    teachers = sk.LogitTransform(0.8 if own is None else own)
    plain = sk.SRPOConfig(temperature=0.8, teacher_transform=teachers)
    expected = oracle(student, teacher, config=plain)
    for loss in losses:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    tempered = (teacher / teachers.temperature).log_softmax(-1)
    torch.testing.assert_close(shown.entropy, -(tempered.exp() * tempered).sum(1))


def test_a_teacher_in_another_dtype() -> None:
    model, teacher = wide().bfloat16(), wide(hidden_size=16).float()
    out = response_loss(model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=torch.ones(4).bool(), teacher=teacher)
    out.loss.backward()
    expected = response_loss(
        wide().float(), IDS, MASK, response_mask=RESPONSES, sdpo_mask=torch.ones(4).bool(), teacher=teacher
    )
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)


def test_nothing_to_distill_and_nothing_in_the_loss() -> None:
    model, nobody = wide(), torch.zeros(4, dtype=torch.bool)
    options = {"advantages": ADVANTAGES.double()}
    plain = response_loss(model, IDS, MASK, response_mask=RESPONSES, **options)
    out = response_loss(model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=nobody, teacher=model, **options)
    torch.testing.assert_close(out.loss, plain.loss, rtol=0.0, atol=0.0)
    nothing = teacher_rows(model, IDS[nobody], MASK[nobody], response_mask=RESPONSES[nobody])
    assert (nothing.hidden.shape, nothing.entropy.shape) == ((0, 32), (0,))
    out = response_loss(model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=nobody, teacher=nothing, **options)
    torch.testing.assert_close(out.loss, plain.loss, rtol=0.0, atol=0.0)
    empty = response_loss(model, IDS, MASK, response_mask=torch.zeros_like(RESPONSES), **options)
    empty.loss.backward()
    assert empty.loss.item() == 0.0
    assert not model.lm_head.weight.grad.any()


def test_more_arguments_of_a_forward_go_with_their_rows() -> None:
    model = wide("gpt2")
    positions = torch.arange(3, 12).expand(4, 9)
    out = response_loss(
        model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=ROUTED, teacher=model, advantages=ADVANTAGES.double(),
        model_inputs={"position_ids": positions},
    )  # fmt: skip
    other = response_loss(
        model, IDS, MASK, response_mask=RESPONSES, sdpo_mask=ROUTED, teacher=model, advantages=ADVANTAGES.double()
    )
    # The same model on the same rows is its own teacher.
    assert out.metrics["divergence_sum"].item() == pytest.approx(0.0, abs=1e-12)
    assert (out.log_probs - other.log_probs).abs().amax() > 0.1


def test_a_config_has_the_models_transform_and_no_other() -> None:
    config = config_for(wide("gemma2"), temperature=0.5)
    assert (config.softcap, config.temperature) == (3.0, 0.5)
    assert config_for(wide("granite").config).logit_scale == 1 / 3
    with pytest.raises(TypeError, match="softcap"):
        config_for(wide("gemma2"), softcap=30.0)


@pytest.fixture
def bf16_accelerator() -> Iterator[Any]:
    """accelerate keeps one state per process, which a trainer of another test may have set up."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_autocast_is_not_lost(bf16_accelerator: Any) -> None:
    accelerator = bf16_accelerator
    model = accelerator.prepare(tiny_model_of("gemma2"))
    options = {"response_mask": RESPONSES, "advantages": ADVANTAGES}
    with pytest.raises(ValueError, match=r"make the call within accelerator\.autocast\(\)"):
        response_loss(model, IDS, MASK, **options)
    with accelerator.autocast():
        check_model(model)
        dtype = call_with_hidden(model, lambda *args: head_operands(*args).hidden.dtype, input_ids=IDS)
        out = response_loss(model, IDS, MASK, **options)
        logits = model(input_ids=IDS[3:]).logits.log_softmax(-1)[0, :-1].gather(1, IDS[3, 1:, None])
    assert dtype == torch.bfloat16
    torch.testing.assert_close(out.log_probs[3, 6:], logits[-3:, 0], rtol=0.0, atol=0.05)
