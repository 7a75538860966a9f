"""``fused_loss`` over the tokens that rows were sampled from, and what ``config.distillation_mode`` compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from srpo_kernels.engine.workspace import row_stride
from srpo_kernels.losses.derived import Derivation
from srpo_kernels.rows.mixture import Divergence
from srpo_kernels.rows.spec import DIVERGENCES
from tests.api.test_fused_loss import BACKENDS, actual, close, extras
from tests.inputs import Inputs, cast, head_inputs, random_support, take, with_given_topk, workspace_floor
from tests.meters import ProductMeter
from tests.parity import STATS_FIELDS

Objective = Any
FEW = torch.arange(11)


def batch(vocab_size: int = 33, support: int | None = 5, teacher_size: int | None = 5) -> Inputs:
    torch.manual_seed(0)
    inputs = head_inputs(0, (23,), 8, vocab_size, teacher_size)
    inputs["mask"] = torch.rand(23) < 0.8
    if support is not None:
        inputs["support_ids"] = random_support(inputs["target_ids"], vocab_size, support)
    return inputs


def everything(rows: Any) -> Tensor:
    ratio = (rows.log_probs - rows.old_log_probs).clamp(-3, 3).exp()
    loss = -ratio * rows.advantages + 0.3 * rows.divergence * rows.teacher_entropy - 0.2 * rows.entropy
    whole = rows.full_log_probs * rows.full_entropy + 0.1 * rows.full_logsumexp**2
    return torch.where(rows.clipped, loss, loss * 2.0) + whole + 0.1 * rows.logsumexp * rows.divergence


def exact(inputs: Inputs, extra: dict[str, Tensor], function: Objective, config: sk.SRPOConfig, has: Tensor) -> Any:
    """Loss and gradients from full logits in fp64, composed of the oracle's statistics; ``has``: there is a teacher."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    options = {name: getattr(config, name) for name in STATS_FIELDS}
    stats = reference.token_stats(**inputs | leaves, **options)
    full = reference.token_stats(**inputs | leaves | {"support_ids": None}, **options)

    class Rows:
        log_probs, entropy, logsumexp = stats.log_probs, stats.entropy, stats.logsumexp
        full_log_probs, full_entropy, full_logsumexp = full.log_probs, full.entropy, full.logsumexp
        divergence = 0.0 if stats.divergence is None else stats.divergence * has
        teacher_entropy = 0.0 if stats.teacher_entropy is None else stats.teacher_entropy * has

    for name, values in extra.items():
        setattr(Rows, name, values)
    loss = (function(Rows) * inputs["mask"]).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


MODES: list[dict[str, Any]] = [
    {},
    {"distillation_mode": "topk", "topk": 4},
    {"distillation_mode": "topk", "topk": 4, "topk_of": "teacher", "add_tail": False},
    {"distillation_mode": "sampled"},
]
GIVEN: dict[str, Any] = {"distillation_mode": "topk", "topk_of": "teacher"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", [None, 1, 5])
def test_all_statistics_at_once(support: int | None, divergence: Divergence, backend: str) -> None:
    inputs, extra, has = take(batch(support=support), FEW), extras(11), torch.rand(11) < 0.6
    chunks_of_two = 2 * workspace_floor(33, 8 if backend == "torch" else 4, 2, backend)
    for options in MODES:
        config = sk.SRPOConfig(divergence=divergence, alpha=0.3, temperature=0.8, softcap=9.0, **options)
        expected = exact(inputs, extra, everything, config, has)
        for workspace in (None, chunks_of_two):
            results, _ = actual(
                inputs, extra, everything, backend, config=config, teacher_mask=has, workspace_bytes=workspace
            )
            close(results, expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_is_its_likeliest_tokens(divergence: Divergence, add_tail: bool, backend: str) -> None:
    config = sk.SRPOConfig(divergence=divergence, add_tail=add_tail, softcap=9.0, **GIVEN)
    for support in (None, 5):
        inputs = with_given_topk(take(batch(support=support), FEW), config, 4)
        extra, has = extras(11), torch.rand(11) < 0.6
        expected = exact(inputs, extra, everything, config, has)
        results, _ = actual(inputs, extra, everything, backend, config=config, teacher_mask=has)
        close(results, expected, backend)
        routed = {name: inputs[name][has] for name in ("teacher_topk_ids", "teacher_topk_log_probs")}
        again, _ = actual(inputs | routed, extra, everything, backend, config=config, teacher_mask=has)
        torch.testing.assert_close(again, results, rtol=0, atol=0)


def by_support(rows: Any) -> Tensor:
    ratio = (rows.log_probs - rows.old_log_probs).clamp(-3, 3).exp()
    return -ratio * rows.advantages - 0.2 * rows.entropy + 0.1 * rows.logsumexp**2


def by_given(rows: Any) -> Tensor:
    return by_support(rows) + rows.divergence * (-rows.teacher_entropy).exp()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("workspace_rows", [None, 7])
def test_columns_of_the_head_where_they_are_cheaper(softcap: float | None, workspace_rows: int | None) -> None:
    workspace = None if workspace_rows is None else workspace_rows * row_stride(600) * 8
    config = sk.SRPOConfig(softcap=softcap, add_tail=False, divergence="reverse_kl", **GIVEN)
    inputs, extra, has = with_given_topk(batch(600), config, 4), extras(), torch.rand(23) < 0.6
    taught, alone = int((inputs["mask"] & has).sum()), int((inputs["mask"] & ~has).sum())
    ids = torch.randint(0, 4, (23,))

    def products(function: Objective, config: sk.SRPOConfig, **options: Any) -> float:
        expected = exact(inputs, extra, function, config, has)
        with ProductMeter(columns=True) as meter:
            results, _ = actual(
                inputs, extra, function, "torch", config=config, teacher_mask=has, workspace_bytes=workspace, **options
            )
        close(results, expected, "torch")
        return meter.multiply_adds / inputs["weight"].numel()

    assert products(by_support, config) == 0
    assert products(by_given, config) == 0
    # What the tokens outside of both lists are for costs what it always does.
    tailed = sk.SRPOConfig(softcap=softcap, divergence="reverse_kl", **GIVEN)
    assert products(by_given, tailed) == 3 * taught
    assert products(lambda rows: by_given(rows) + rows.full_log_probs, config) == 3 * (taught + alone)
    if workspace is None:
        assert products(by_given, tailed, sequence_ids=ids, whole_sequences=True) == 3 * taught


def test_an_objective_that_turns_out_to_need_the_whole_vocabulary() -> None:
    def moody(rows: Any) -> Tensor:
        return rows.full_entropy - rows.log_probs if len(rows) > 1 else -rows.log_probs

    inputs, extra, has = batch(600), extras(), torch.ones(23, dtype=torch.bool)
    results, _ = actual(inputs, extra, moody, "torch")
    close(results, exact(inputs, extra, lambda rows: rows.full_entropy - rows.log_probs, sk.SRPOConfig(), has), "torch")


def test_whole_sequences() -> None:
    inputs, extra, has = batch(), extras(), torch.rand(23) < 0.5
    ids, valid = torch.randint(0, 4, (23,)), inputs["mask"]

    def objective(rows: Any) -> Tensor:
        return -rows.sequence_mean(rows.log_probs - rows.old_log_probs).exp() * rows.advantages + rows.divergence

    def expected_of(rows: Any) -> Tensor:
        counts = torch.zeros(4, dtype=torch.float64).index_add(0, ids, valid.double())
        rows.sequence_mean = lambda x: (torch.zeros_like(counts).index_add(0, ids, x * valid) / counts)[ids]
        return objective(rows)

    for rows in (None, 7):
        workspace = None if rows is None else rows * row_stride(33) * 8
        expected = exact(inputs, extra, expected_of, sk.SRPOConfig(), has & valid)
        results, _ = actual(
            inputs, extra, objective, "torch", teacher_mask=has, sequence_ids=ids, whole_sequences=True,
            workspace_bytes=workspace,
        )  # fmt: skip
        close(results, expected, "torch")


def test_a_named_policy_loss_is_that_of_srpo_loss() -> None:
    inputs = {name: x for name, x in batch().items() if not name.startswith("teacher")}
    policy = {name: extras()[name] for name in ("advantages", "old_log_probs")}
    fused = sk.fused_loss(**inputs, objective="grpo", inputs=policy)
    expected = sk.srpo_loss(**inputs, **policy, sequence_ids=torch.arange(23))
    torch.testing.assert_close(fused.loss / inputs["mask"].sum(), expected.loss)
    # Rows whose advantage is 0 are no rows of srpo_loss.
    torch.testing.assert_close(fused.log_probs, expected.log_probs)


def test_the_divergence_is_that_of_srpo_loss() -> None:
    for options in (*MODES, GIVEN):
        config = sk.SRPOConfig(dw_beta=0.0, **options)
        inputs = batch(support=None)
        if options is GIVEN:
            inputs = with_given_topk(inputs, config, 4)
        out = sk.fused_loss(**inputs, objective=lambda rows: rows.divergence, config=config)
        expected = sk.srpo_loss(**inputs, sdpo_mask=torch.ones(23, dtype=torch.bool), config=config)
        torch.testing.assert_close(out.loss / inputs["mask"].sum(), expected.loss)


def test_what_a_teachers_likeliest_tokens_do_not_say() -> None:
    config = sk.SRPOConfig(**GIVEN)
    inputs = with_given_topk(batch(), config, 4)
    with pytest.raises(ValueError, match=r"reads rows.teacher_log_probs, which needs teacher_hidden: of a teacher"):
        sk.fused_loss(**inputs, objective=lambda rows: rows.log_probs - rows.teacher_log_probs, config=config)


@pytest.mark.parametrize(
    ("support_ids", "message"),
    [
        (torch.full((23, 1), 33), "support_ids must be below 33, .*got 33"),
        (torch.zeros(23, 2, dtype=torch.int64), "support_ids must be distinct in each row"),
        (torch.zeros(23, dtype=torch.int64), r"support_ids must have shape .*'K'"),
    ],
)
def test_a_bad_support_is_named(support_ids: Tensor, message: str) -> None:
    inputs = batch() | {"support_ids": support_ids}
    with pytest.raises(ValueError, match=message):
        sk.fused_loss(**inputs, objective=by_support, inputs=extras())
    with pytest.raises(ValueError, match=message):
        sk.token_stats(**inputs)


@pytest.mark.kernels
def test_an_engine_without_logits_has_no_support() -> None:
    inputs = cast(batch(teacher_size=None), torch.float32)
    with pytest.raises(ValueError, match="engine='tile' does not support the log-probs of more than one token"):
        sk.token_stats(**inputs, backend="triton", engine="tile")


def test_compiled_calls_are_eager_ones() -> None:
    config = sk.SRPOConfig(**GIVEN)
    inputs = with_given_topk(batch(), config, 4)
    policy = {name: extras()[name] for name in ("advantages", "old_log_probs")}

    def call(hidden: Tensor) -> tuple[Tensor, Tensor]:
        own = inputs | {"hidden": hidden}
        stats = sk.token_stats(**own, config=config)
        assert stats.divergence is not None
        named = sk.fused_loss(**own, objective="sapo", inputs=policy, config=config)
        return named.loss, (stats.divergence * stats.log_probs - stats.entropy * stats.logsumexp).sum()

    def run(function: Any) -> list[Tensor]:
        hidden = inputs["hidden"].clone().requires_grad_()
        first, second = function(hidden)
        return [first.detach(), second.detach(), *torch.autograd.grad(first + second, hidden)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(call))


def test_what_is_made_of_what() -> None:
    plain = Derivation.of(sk.SRPOConfig(), None, 33, has_support=False)
    assert plain.sources("log_probs") == plain.sources("full_log_probs") == {"log_probs"}
    assert not plain.by_columns(["log_probs"])
    support = Derivation.of(sk.SRPOConfig(distillation_mode="sampled"), None, 33, has_support=True)
    assert support.sources("entropy") == {"log_probs", "sampled_log_probs"}
    assert support.by_columns(["entropy", "logsumexp"]) and not support.by_columns(["log_probs", "divergence"])
