"""``teacher_stats`` against the oracle, and through ``Normalizers`` into the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from reference.logits import entropy, head_logits
from srpo_kernels import Normalizers, SRPOConfig, TeacherStats, srpo_loss, teacher_stats, token_stats
from tests.comparison import assert_same, largest, run_loss
from tests.inputs import Inputs, cast, for_backend, head_inputs, loss_inputs
from tests.strategies import Case, each_backend, stats_cases

OPTIONS = ("temperature", "logit_scale", "softcap")


def teacher_of(inputs: Inputs) -> Inputs:
    """The arguments of ``teacher_stats`` in those of ``token_stats``; the student where there is no teacher."""
    bias = inputs["bias"] if inputs["teacher_weight"] is None else inputs["teacher_bias"]
    return {
        "teacher_hidden": inputs["hidden"] if inputs["teacher_hidden"] is None else inputs["teacher_hidden"],
        "teacher_weight": inputs["weight"] if inputs["teacher_weight"] is None else inputs["teacher_weight"],
        "teacher_bias": bias,
        "mask": inputs["mask"],
    }


def oracle(teacher: Inputs, **options: Any) -> dict[str, Tensor]:
    logits = head_logits(
        teacher["teacher_hidden"].flatten(0, -2), teacher["teacher_weight"], teacher["teacher_bias"], **options
    )
    shape = teacher["teacher_hidden"].shape[:-1]
    values = {"entropy": entropy(logits).view(shape), "logsumexp": logits.logsumexp(1).view(shape)}
    if teacher["mask"] is None:
        return values
    return {name: value.masked_fill(~teacher["mask"], 0.0) for name, value in values.items()}


@given(stats_cases())
def test_fp64_parity(case: Case) -> None:
    teacher, options = teacher_of(case.inputs), {name: case.options[name] for name in OPTIONS}
    actual = teacher_stats(**teacher, **options, workspace_bytes=case.workspace_bytes)
    assert_same(actual._asdict(), oracle(teacher, **options), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_low_precision_is_as_accurate_as_plain_torch_with_fp32_logits(dtype: torch.dtype, backend: str) -> None:
    teacher = cast(teacher_of(head_inputs(0, (5, 9), 16, 1009, teacher_size=16, spread=4.0)), dtype)
    exact, naive, actual = (
        oracle(cast(teacher, torch.float64)),
        oracle(teacher),
        teacher_stats(**teacher, backend=backend),
    )
    for name, value in exact.items():
        ours = getattr(actual, name)
        assert ours.dtype == torch.float32
        assert largest(ours - value) <= 2 * largest(naive[name] - value) + 2**-20 * largest(value)


def test_carries_no_gradient() -> None:
    inputs = teacher_of(head_inputs(0, (4, 6), 8, 33, teacher_size=5))
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        inputs[name].requires_grad_()
    assert not any(x.requires_grad for x in teacher_stats(**inputs))


@each_backend
def test_masked_rows_are_never_read_and_come_back_as_zero(backend: str) -> None:
    inputs = for_backend(teacher_of(head_inputs(0, (4, 6), 8, 33, teacher_size=5)), backend)
    expected = teacher_stats(**inputs, backend=backend)
    inputs["teacher_hidden"][~inputs["mask"]] = torch.inf
    actual = teacher_stats(**inputs, backend=backend)
    assert isinstance(actual, TeacherStats)
    assert_same(actual._asdict(), expected._asdict(), 0.0)
    assert not actual.entropy[~inputs["mask"]].any()


@each_backend
def test_a_uniform_teacher_has_the_entropy_of_its_vocabulary(backend: str) -> None:
    stats = teacher_stats(torch.zeros(3, 4), torch.randn(1009, 4), backend=backend)
    torch.testing.assert_close(stats.entropy, torch.full((3,), 1009.0).log())
    torch.testing.assert_close(stats.logsumexp, torch.full((3,), 1009.0).log())


@pytest.mark.parametrize("routed_only", [False, True])
def test_its_entropies_give_the_normalizers_of_the_batch(routed_only: bool) -> None:
    config = SRPOConfig(dw_beta=2.0, temperature=0.7, reduction="sequence")
    inputs = loss_inputs(1, (6, 5), teacher_size=5, config=config)
    mask, routed = inputs["mask"], inputs["sdpo_mask"]
    teacher = teacher_of(inputs)
    if routed_only:
        teacher |= {"teacher_hidden": inputs["teacher_hidden"][routed], "mask": mask[routed]}
    stats = teacher_stats(**teacher, config=config)
    normalizers = Normalizers.from_batch(mask, routed, stats.entropy, config=config)
    given = run_loss(srpo_loss, inputs, config=config, normalizers=normalizers)
    assert_same(given, run_loss(srpo_loss, inputs, config=config), 1e-12)


DESCRIBED = SRPOConfig(
    temperature=0.7, logit_scale=0.5, softcap=5.0, divergence="reverse_kl", alpha=0.9, dw_beta=3.0, topk=3
)


def test_a_config_stands_in_for_the_keywords() -> None:
    inputs = head_inputs(0, (4, 6), 8, 33, teacher_size=5)
    keywords = {name: getattr(DESCRIBED, name) for name in OPTIONS}
    teacher = teacher_of(inputs)
    expected = teacher_stats(**teacher, **keywords)
    assert_same(teacher_stats(**teacher, config=DESCRIBED)._asdict(), expected._asdict(), 0.0)
    keywords |= {"divergence": DESCRIBED.divergence, "alpha": DESCRIBED.alpha}
    stats = token_stats(**inputs, **keywords)
    assert_same(token_stats(**inputs, config=DESCRIBED)._asdict(), stats._asdict(), 0.0)
    batch = inputs["mask"], inputs["mask"], expected.entropy
    assert Normalizers.from_batch(*batch, config=DESCRIBED) == Normalizers.from_batch(*batch, DESCRIBED.dw_beta)


@pytest.mark.parametrize("config", [SRPOConfig(temperature=0.7, softcap=3.0), SRPOConfig(logit_scale=2.0, dw_beta=0.5)])
def test_with_the_config_of_the_loss_the_mean_weight_is_one(config: SRPOConfig) -> None:
    inputs = loss_inputs(1, (6, 5), teacher_size=5, config=config)
    stats = teacher_stats(**teacher_of(inputs), config=config)
    normalizers = Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], stats.entropy, config=config)
    given = run_loss(srpo_loss, inputs, config=config, normalizers=normalizers)
    assert_same(given, run_loss(srpo_loss, inputs, config=config), 1e-12)


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap", "divergence", "alpha", "dw_beta"])
def test_a_config_and_a_keyword_are_not_both_taken(name: str) -> None:
    """A value that is the default too: only one of them says what the logits are."""
    inputs = head_inputs(0, (4, 6), 8, 33, teacher_size=5)
    both = {"config": DESCRIBED, name: getattr(SRPOConfig, name)}
    message = f"config must stand alone, got it beside.*{name}"
    if name == "dw_beta":
        with pytest.raises(ValueError, match=message):
            Normalizers.from_batch(inputs["mask"], None, None, **both)
        return
    with pytest.raises(ValueError, match=message):
        token_stats(**inputs, **both)
    if name in OPTIONS:
        with pytest.raises(ValueError, match=message):
            teacher_stats(**teacher_of(inputs), **both)


def test_a_divergence_needs_a_teacher() -> None:
    inputs, config = head_inputs(0, (4, 6), 8, 33), SRPOConfig(distillation_mode="topk")
    assert token_stats(**inputs, config=config).divergence is not None
    assert token_stats(**inputs | {"teacher_hidden": None}, config=config).divergence is None


@pytest.mark.parametrize("config", [{"temperature": 0.7}, 0.7, SRPOConfig])
def test_what_is_no_config_is_refused(config: object) -> None:
    inputs = head_inputs(0, (4, 6), 8, 33)
    with pytest.raises(TypeError, match="config must be an SRPOConfig or None, got"):
        token_stats(**inputs, config=config)
    with pytest.raises(TypeError, match="config must be an SRPOConfig or None, got"):
        teacher_stats(inputs["hidden"], inputs["weight"], config=config)
    with pytest.raises(TypeError, match="config must be an SRPOConfig or None, got"):
        Normalizers.from_batch(inputs["mask"], None, None, config=config)


def test_normalizers_need_the_strength_of_the_weights() -> None:
    with pytest.raises(ValueError, match="dw_beta or config is required, got neither"):
        Normalizers.from_batch(torch.ones(2, 3, dtype=torch.bool), None, None)


def of_other_logits(inputs: Inputs, config: SRPOConfig) -> Normalizers:
    """Normalizers from entropies without the logit transform."""
    entropy = teacher_stats(**teacher_of(inputs)).entropy
    return Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], entropy, config=config)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_whole_batch_whose_mean_weight_is_not_one_is_named(compiled: bool) -> None:
    call = torch.compile(srpo_loss, backend="aot_eager", fullgraph=True) if compiled else srpo_loss
    config = SRPOConfig(temperature=0.7)
    inputs = loss_inputs(1, (6, 5), teacher_size=5, config=config)
    with pytest.warns(RuntimeWarning, match=r"normalizers\.dw_log_mean.*mean 2.01 in place of 1.*the config of this"):
        out = call(**inputs, config=config, normalizers=of_other_logits(inputs, config))
    assert out.metrics["dw_weight_sum"] / out.metrics["sdpo_tokens"] > 1.1


@pytest.mark.parametrize("dw_beta", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_is_said_of_a_batch_that_may_be_right(dtype: torch.dtype, dw_beta: float) -> None:
    config = SRPOConfig(temperature=0.7, dw_beta=dw_beta)
    inputs = cast(loss_inputs(1, (6, 5), teacher_size=5, config=config), dtype)
    teacher = teacher_stats(**teacher_of(inputs), config=config)
    whole = Normalizers.from_batch(inputs["mask"], inputs["sdpo_mask"], teacher.entropy, config=config)
    srpo_loss(**inputs, config=config, normalizers=whole)
    if dw_beta:
        # A part of a batch has any mean, and normalizers made by hand do not say of what rows.
        other = of_other_logits(inputs, config)
        for unknown in (other.merge(other), other._replace(sdpo_count=None)):
            srpo_loss(**inputs, config=config, normalizers=unknown)
