"""``fused_loss``: a loss of one's own, held to ``srpo_loss``, to ``token_stats`` and to full logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.losses.options import LOSS_TYPES
from srpo_kernels.losses.registry import POLICY_LOSSES
from srpo_kernels.rows.spec import DIVERGENCES
from tests.inputs import Inputs, for_backend, head_inputs, loss_inputs
from tests.meters import ProductMeter

BACKENDS = ["torch", "triton"]


def batch(seed: int = 0, **changes: Any) -> Inputs:
    """Five packed sequences of both models, with inputs of an objective."""
    torch.manual_seed(seed)
    inputs = head_inputs(seed, (23,), 8, 33)
    inputs["mask"] = torch.rand(23) < 0.8
    return inputs | changes


def extras(rows: int = 23) -> dict[str, Tensor]:
    return {
        "advantages": torch.randn(rows, dtype=torch.float64),
        "old_log_probs": -3.0 + torch.randn(rows, dtype=torch.float64),
        "clipped": torch.rand(rows) < 0.5,
    }


def everything(rows: Any) -> Tensor:
    ratio = (rows.log_probs - rows.old_log_probs).clamp(-3, 3).exp()
    loss = -ratio * rows.advantages + 0.3 * rows.divergence * rows.teacher_entropy - 0.2 * rows.entropy
    return torch.where(rows.clipped, loss, loss * 2.0) + rows.divergence * rows.teacher_log_probs.exp()


def exact(inputs: Inputs, extra: dict[str, Tensor], function: Any, config: sk.SRPOConfig, has: Tensor) -> Any:
    """Loss and gradients from full logits in fp64; ``has`` says which rows have a teacher."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    stats = reference.token_stats(
        **inputs | leaves,
        **{name: getattr(config, name) for name in ("divergence", "alpha", "temperature", "logit_scale", "softcap")},
    )
    own = inputs.get("teacher_weight") is None
    teacher = reference.token_stats(
        inputs["teacher_hidden"],
        inputs["weight"] if own else inputs["teacher_weight"],
        inputs["target_ids"],
        mask=inputs["mask"],
        bias=inputs["bias"] if own else inputs.get("teacher_bias"),
        **{name: getattr(config, name) for name in ("temperature", "logit_scale", "softcap")},
    )

    class Rows:
        log_probs, entropy = stats.log_probs, stats.entropy
        divergence, teacher_entropy = stats.divergence * has, stats.teacher_entropy * has
        teacher_log_probs = teacher.log_probs * has
        has_teacher = has

    for name, values in extra.items():
        setattr(Rows, name, values)
    loss = (function(Rows) * inputs["mask"]).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def actual(inputs: Inputs, extra: dict[str, Tensor], function: Any, backend: str, **options: Any) -> Any:
    inputs, extra = (for_backend(x, backend) for x in (inputs, extra))
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    out = sk.fused_loss(**inputs | leaves, objective=function, inputs=extra, backend=backend, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(leaves.values()))], out


def close(actual: Any, expected: Any, backend: str) -> None:
    tolerance = 1e-11 if backend == "torch" else 2e-4
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("workspace_rows", [None, 9])
def test_all_statistics_at_once(backend: str, divergence: str, softcap: float | None, workspace_rows: Any) -> None:
    inputs, extra = batch(), extras()
    has = torch.rand(23) < 0.6
    config = sk.SRPOConfig(divergence=divergence, alpha=0.3, temperature=0.8, softcap=softcap)
    workspace = None if workspace_rows is None else workspace_rows * row_stride(33) * 8 * 2
    expected = exact(inputs, extra, everything, config, has)
    results, out = actual(
        inputs, extra, everything, backend, config=config, teacher_mask=has, workspace_bytes=workspace
    )
    close(results, expected, backend)
    assert (out.losses[~inputs["mask"]] == 0).all()
    torch.testing.assert_close(out.losses.sum(), results[0])


SUBSETS: dict[str, Any] = {
    "log_probs": lambda rows: -rows.log_probs * rows.advantages,
    "log_probs as they are": lambda rows: rows.log_probs,
    "entropy": lambda rows: -rows.entropy * rows.advantages,
    "divergence": lambda rows: rows.divergence * rows.advantages,
    "log_probs, entropy": lambda rows: rows.log_probs * rows.entropy,
    "log_probs, divergence": lambda rows: rows.log_probs * rows.divergence,
    "entropy, divergence": lambda rows: rows.entropy * rows.divergence,
    "detached ratio, divergence": lambda rows: (rows.log_probs - rows.old_log_probs).detach().exp() * rows.divergence,
    "detached divergence": lambda rows: rows.divergence.detach() * rows.log_probs,
    "teacher's log-probs": lambda rows: (rows.log_probs - rows.teacher_log_probs) ** 2,
    "teacher's entropy": lambda rows: (-rows.teacher_entropy).exp() * rows.log_probs,
    "where there is a teacher": lambda rows: torch.where(rows.has_teacher, rows.divergence, -rows.log_probs),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(SUBSETS))
def test_any_of_the_statistics(backend: str, name: str) -> None:
    inputs, extra, config = batch(), extras(), sk.SRPOConfig()
    has = torch.ones(23, dtype=torch.bool) if "where" not in name else torch.rand(23) < 0.5
    expected = exact(inputs, extra, SUBSETS[name], config, has)
    results, _ = actual(inputs, extra, SUBSETS[name], backend, config=config, teacher_mask=has)
    close(results, expected, backend)


def test_what_it_costs() -> None:
    """3 products per row, 4 per row whose teacher is read, none for masked rows."""
    inputs, extra = batch(), extras()
    has = torch.rand(23) < 0.6
    valid, taught = int(inputs["mask"].sum()), int((inputs["mask"] & has).sum())

    def products(function: Any) -> float:
        with ProductMeter() as meter:
            actual(inputs, extra, function, "torch", teacher_mask=has)
        return meter.multiply_adds / inputs["weight"].numel()

    assert products(everything) == 3 * valid + taught
    for name, function in SUBSETS.items():
        reads = "divergence" in name or "teacher" in name
        assert products(function) == 3 * valid + taught * reads, name


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_policy_loss_is_that_of_srpo_loss(name: str, by_name: bool) -> None:
    inputs = loss_inputs(0, (5, 7)) | {"sdpo_mask": None, "teacher_hidden": None, "is_weights": None}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    config = sk.SRPOConfig(loss_type=name)
    policy = {key: inputs.pop(key) for key in ("advantages", "old_log_probs")}
    inputs.pop("ref_log_probs", None)
    leaves = {key: inputs[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")}
    expected = sk.srpo_loss(**inputs | leaves, **policy, config=config)
    count = inputs["mask"].sum()

    def mine(rows: Any) -> Tensor:
        loss = POLICY_LOSSES[name]
        sequences = rows.whole_sequences if loss.whole_sequences else None
        policy_rows = sk.PolicyRows.of(rows.log_probs, rows.old_log_probs, rows.advantages, sequences, 20.0)
        return loss(policy_rows, config.policy_options()).loss

    out = sk.fused_loss(
        **inputs | leaves,
        objective=name if by_name else mine,
        inputs=policy,
        config=config,
        whole_sequences=POLICY_LOSSES[name].whole_sequences,
    )
    grads, wanted = (torch.autograd.grad(x, list(leaves.values())) for x in (out.loss / count, expected.loss))
    torch.testing.assert_close([out.loss / count, *grads], [expected.loss, *wanted])


def by_sequence(rows: Any) -> Tensor:
    mean = rows.sequence_mean(rows.log_probs - rows.old_log_probs).exp()
    shared = torch.zeros(rows.num_sequences, dtype=mean.dtype).index_add(0, rows.sequences, rows.divergence)
    return -mean * rows.advantages + shared[rows.sequences] * rows.entropy


@pytest.mark.parametrize("workspace_rows", [None, 40, 7])
def test_whole_sequences_with_and_without_a_teacher(workspace_rows: int | None) -> None:
    inputs, extra = batch(), extras()
    has = torch.rand(23) < 0.5
    ids = torch.randint(0, 4, (23,))

    def expected_of(rows: Any) -> Tensor:
        valid = inputs["mask"]
        rows.sequences, rows.num_sequences = ids, 4
        counts = torch.zeros(4, dtype=torch.float64).index_add(0, ids, valid.double())
        rows.sequence_mean = lambda x: (torch.zeros_like(counts).index_add(0, ids, x * valid) / counts)[ids]
        return by_sequence(rows)

    workspace = None if workspace_rows is None else workspace_rows * row_stride(33) * 8
    expected = exact(inputs, extra, expected_of, sk.SRPOConfig(), has & inputs["mask"])
    results, _ = actual(
        inputs, extra, by_sequence, "torch", teacher_mask=has, sequence_ids=ids, whole_sequences=True,
        workspace_bytes=workspace,
    )  # fmt: skip
    close(results, expected, "torch")


def test_nothing_valid() -> None:
    inputs = batch() | {"mask": torch.zeros(23, dtype=torch.bool)}
    results, out = actual(inputs, extras(), everything, "torch")
    assert all((x == 0).all() for x in results)
    assert (out.log_probs == 0).all()


def test_without_gradient() -> None:
    inputs, extra = batch(), extras()
    with torch.no_grad():
        out = sk.fused_loss(**inputs, objective=everything, inputs=extra)
    results, _ = actual(inputs, extra, everything, "torch")
    torch.testing.assert_close(out.loss, results[0])


def test_a_statistic_that_only_some_rows_make_it_read() -> None:
    """Discovery sees one row; what others make it read is computed then."""

    def moody(rows: Any) -> Tensor:
        if len(rows) > 1:
            return rows.entropy * rows.divergence - rows.log_probs
        return -rows.log_probs

    inputs, extra, has = batch(), extras(), torch.ones(23, dtype=torch.bool)
    results, _ = actual(inputs, extra, moody, "torch")
    close(
        results, exact(inputs, extra, SUBSETS["entropy, divergence"], sk.SRPOConfig(), has), "torch"
    ) if False else None
    expected = exact(inputs, extra, lambda rows: rows.entropy * rows.divergence - rows.log_probs, sk.SRPOConfig(), has)
    close(results, expected, "torch")


def test_a_compiled_graph_takes_a_name_alone() -> None:
    inputs = {key: value for key, value in batch().items() if not key.startswith("teacher")}
    policy = {key: extras()[key] for key in ("advantages", "old_log_probs")}

    def named(hidden: Tensor) -> Tensor:
        return sk.fused_loss(**inputs | {"hidden": hidden}, objective="sapo", inputs=policy).loss

    def bare(hidden: Tensor) -> Tensor:
        return sk.fused_loss(**inputs | {"hidden": hidden}, objective=lambda rows: -rows.log_probs).loss

    compiled = torch.compile(named, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs["hidden"]), named(inputs["hidden"]))
    with pytest.raises(Exception, match="objective must be the name of a registered policy loss"):
        torch.compile(bare, fullgraph=True, backend="aot_eager")(inputs["hidden"])
