"""A divergence that is each row's own: its mixture weight, a bound of its entries, both KLs beside it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import srpo_kernels as sk
from srpo_kernels.losses.options import DistillationMode
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES, Divergence
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_as_accurate, assert_same, run_loss, run_stats
from tests.inputs import LEAVES, cast, head_inputs, loss_inputs, with_given_topk, workspace_floor
from tests.parity import STATS_FIELDS, check_loss_in, coefficients
from tests.strategies import each_backend, shapes

ROWS = (5, 6)
ENDS = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.999999], dtype=torch.float64)


def own_numbers(divergence: str, rows: tuple[int, ...] = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """For each row an alpha, with those of the KLs where a jsd can have them, and a bound, which may be none."""
    generator = torch.Generator().manual_seed(seed)
    alphas = ENDS if divergence == "jsd" else ENDS[2:]
    alpha = alphas[torch.randint(len(alphas), rows, generator=generator)]
    clips = torch.tensor([1e-3, 0.02, 0.3, math.inf], dtype=torch.float64)
    numbers = {"divergence_clip": clips[torch.randint(len(clips), rows, generator=generator)]}
    return numbers | ({"divergence_alpha": alpha} if divergence in MIXTURE_DIVERGENCES else {})


@each_backend
@pytest.mark.parametrize("mode", ["full", "topk"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity(divergence: Divergence, mode: DistillationMode, backend: str) -> None:
    for rows, softcap in itertools.product(shapes(backend), (None, 20.0)):
        config = sk.SRPOConfig(divergence=divergence, distillation_mode=mode, topk=5, softcap=softcap, temperature=0.7)
        inputs = loss_inputs(1, rows, teacher_size=5, config=config) | own_numbers(divergence, rows)
        check_loss_in(inputs, config, backend)


@each_backend
@pytest.mark.parametrize("mode", ["full", "topk", "given"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_statistics(divergence: Divergence, mode: str, backend: str) -> None:
    topk: dict[str, Any] = {} if mode == "full" else {"distillation_mode": "topk", "topk": 5}
    if mode == "given":
        topk["topk_of"] = "teacher"
    config = sk.SRPOConfig(divergence=divergence, softcap=20.0, temperature=0.7, **topk)
    options = {name: getattr(config, name) for name in STATS_FIELDS if name != "divergence_clip"}
    for rows in (ROWS, (11,)) if backend == "torch" else ((2, 4), (7,)):
        inputs = head_inputs(1, rows, 8, 33, 5)
        inputs = with_given_topk(inputs, config, 5) if mode == "given" else inputs
        inputs |= own_numbers(divergence, rows)
        if backend == "triton":
            inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items() if x is not None}
        upstream, wide = coefficients(inputs), cast(inputs, torch.float64)
        for workspace in (None, 4 * workspace_floor(33, 8, 2, backend)):
            actual = run_stats(
                sk.token_stats, inputs, upstream, config=config, backend=backend, workspace_bytes=workspace
            )
            expected = run_stats(reference.token_stats, wide, upstream, **options)
            naive = run_stats(reference.token_stats, inputs, upstream, **options)
            if backend == "triton":
                assert_as_accurate(actual, naive, expected)
            else:
                assert_same(actual, expected, 1e-9)


@pytest.mark.kernels
def test_statistics_refuse_what_the_loss_does() -> None:
    inputs, own = head_inputs(1, ROWS, 8, 33, 5), {"divergence_clip": torch.ones(ROWS)}
    with pytest.raises(ValueError, match=r"divergence_alpha needs a config\.divergence from a mixture"):
        sk.token_stats(**inputs, divergence="reverse_kl", divergence_alpha=torch.ones(ROWS))
    with pytest.raises(ValueError, match=r"divergence_alpha must be in \[0, 1\] in every row .* 1\.5 at row 0"):
        sk.token_stats(**inputs, divergence_alpha=torch.full(ROWS, 1.5))
    masked = torch.full(ROWS, 0.5).masked_fill(~inputs["mask"], math.nan)
    assert sk.token_stats(**inputs, divergence_alpha=masked).divergence.isfinite().all()
    nobody = {name: None for name in inputs if name.startswith("teacher")}
    with pytest.raises(ValueError, match="divergence_clip needs a teacher"):
        sk.token_stats(**inputs | nobody, **own)
    halves = {name: x.float() for name, x in inputs.items() if x.is_floating_point()}
    with torch.no_grad(), pytest.raises(ValueError, match="engine='tile' does not support divergence_clip of each row"):
        sk.token_stats(**inputs | halves, **own, divergence="reverse_kl", backend="triton", engine="tile")


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_bound_for_all(divergence: Divergence, backend: str) -> None:
    config = sk.SRPOConfig(divergence=divergence, divergence_clip=0.01)
    check_loss_in(loss_inputs(1, ROWS, teacher_size=5, config=config), config, backend)


@each_backend
def test_numbers_that_are_the_configs_change_nothing(backend: str) -> None:
    for divergence in DIVERGENCES:
        config = sk.SRPOConfig(divergence=divergence, alpha=0.3)
        inputs = loss_inputs(1, ROWS, teacher_size=5, config=config)
        own = {"divergence_clip": torch.full(ROWS, math.inf)}
        if divergence in MIXTURE_DIVERGENCES:
            own["divergence_alpha"] = torch.full(ROWS[:1], 0.3, dtype=torch.float64)
        expected = run_loss(sk.srpo_loss, inputs, LEAVES, config=config)
        assert_same(run_loss(sk.srpo_loss, inputs | own, LEAVES, config=config), expected, 1e-9)


@pytest.mark.parametrize(("alpha", "kl"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_a_jsd_are_the_kls(alpha: float, kl: Any) -> None:
    inputs = loss_inputs(1, ROWS, teacher_size=5)
    expected = run_loss(sk.srpo_loss, inputs, LEAVES, config=sk.SRPOConfig(divergence=kl))
    own = {"divergence_alpha": torch.full((ROWS[0], 1), alpha)}
    assert_same(run_loss(sk.srpo_loss, inputs | own, LEAVES, config=sk.SRPOConfig()), expected, 1e-9)


@each_backend
def test_chunks_and_order_do_not_matter(backend: str) -> None:
    config = sk.SRPOConfig()
    inputs = loss_inputs(1, (23,), teacher_size=5, config=config) | own_numbers("jsd", (23,))
    dtype = torch.float64 if backend == "torch" else torch.float32
    inputs = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    tolerance = 1e-9 if backend == "torch" else 1e-5
    whole = run_loss(sk.srpo_loss, inputs, LEAVES, config=config, backend=backend)
    parts = run_loss(sk.srpo_loss, inputs, LEAVES, config=config, backend=backend, workspace_bytes=12 * 33 * 8 * 8)
    assert_same(parts, whole, tolerance)


def test_rows_that_are_not_distilled_are_not_read() -> None:
    inputs = loss_inputs(1, ROWS, teacher_size=5)
    own = own_numbers("jsd")
    unread = ~(inputs["mask"] & inputs["sdpo_mask"][:, None])
    spoilt = {name: x.masked_fill(unread, math.nan) for name, x in own.items()}
    expected = run_loss(sk.srpo_loss, inputs | own, config=sk.SRPOConfig())
    assert_same(run_loss(sk.srpo_loss, inputs | spoilt, config=sk.SRPOConfig()), expected, 0.0)


def both_kls(rows: Any) -> Tensor:
    """Entropy-aware distillation (arXiv 2603.07079) in a line, and the config's divergence beside it."""
    uncertain = rows.teacher_entropy > 2.5
    return rows.reverse_kl + uncertain * rows.forward_kl + 0.5 * rows.divergence - rows.log_probs * rows.teacher_entropy


@each_backend
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_objective_of_several_divergences(divergence: Divergence, softcap: float | None, backend: str) -> None:
    config = sk.SRPOConfig(divergence=divergence, softcap=softcap, logit_scale=1.5)
    inputs = loss_inputs(1, (23,), teacher_size=5)
    names = ("hidden", "weight", "bias", "target_ids", "mask", "teacher_hidden", "teacher_weight", "teacher_bias")
    inputs = {name: inputs[name] for name in names if name in inputs}
    own = own_numbers(divergence, (23,))

    def exact(**leaves: Tensor) -> Tensor:
        mask, options = inputs["mask"], {"temperature": 1.0, "logit_scale": config.logit_scale, "softcap": softcap}
        heads = [
            (leaves["hidden"], leaves["weight"], leaves["bias"]),
            (inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"]),
        ]
        logits = [
            reference.logits.transform(torch.nn.functional.linear(hidden[mask], weight, bias), **options)
            for hidden, weight, bias in heads
        ]
        log_p, log_q = (z.log_softmax(-1) for z in logits)
        entropy = torch.special.entr(log_q.exp()).sum(-1)
        alpha = own.get("divergence_alpha")
        value = reference.distillation.configured_divergence(
            log_p, log_q, config, None if alpha is None else alpha[mask], own["divergence_clip"][mask]
        )
        kls = reference.distillation.reverse_kl(log_p, log_q) + (entropy > 2.5) * reference.distillation.forward_kl(
            log_p, log_q
        )
        log_probs = log_p.gather(1, inputs["target_ids"][mask][:, None])[:, 0]
        return (kls + 0.5 * value - log_probs * entropy).sum()

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
        loss = function(**leaves)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    dtype = torch.float64 if backend == "torch" else torch.float32
    rest = {name: x for name, x in inputs.items() if name not in ("hidden", "weight", "bias")}
    rest = {name: x.to(dtype) if x.is_floating_point() else x for name, x in (rest | own).items()}
    actual = gradients(
        lambda **leaves: sk.fused_loss(**leaves, **rest, objective=both_kls, config=config, backend=backend).loss, dtype
    )
    for ours, theirs in zip(actual, gradients(exact, torch.float64), strict=True):
        tolerance = 1e-10 if backend == "torch" else 3e-6
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_kl_of_a_few_tokens_is_refused() -> None:
    inputs = loss_inputs(1, (23,), teacher_size=5)
    names = ("hidden", "weight", "target_ids", "teacher_hidden", "teacher_weight")
    with pytest.raises(ValueError, match=r"reads rows\.forward_kl, which is over the whole vocabulary"):
        sk.fused_loss(
            **{name: inputs[name] for name in names},
            objective=lambda rows: rows.forward_kl,
            config=sk.SRPOConfig(distillation_mode="topk"),
        )


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"divergence_alpha": torch.full(ROWS, 1.5)}, {}, "divergence_alpha must be in \\[0, 1\\] in every row"),
        ({"divergence_alpha": torch.full(ROWS, math.nan)}, {}, "divergence_alpha must be in \\[0, 1\\]"),
        ({"divergence_alpha": torch.ones(ROWS)}, {"divergence": "skew_forward_kl"}, "strictly between 0 and 1"),
        ({"divergence_alpha": torch.ones(ROWS)}, {"divergence": "forward_kl"}, "config.divergence from a mixture"),
        ({"divergence_clip": torch.zeros(ROWS)}, {}, "divergence_clip must be > 0, infinite for no bound"),
        ({"divergence_clip": torch.ones(3)}, {}, "divergence_clip must have shape"),
        ({"divergence_clip": torch.ones(ROWS)}, {"distillation_mode": "sampled"}, "divergence_clip must be None"),
        ({"divergence_clip": torch.ones(ROWS), "sdpo_mask": None}, {}, "divergence_clip needs a teacher"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], config: dict[str, Any], message: str) -> None:
    inputs = loss_inputs(1, ROWS, teacher_size=5)
    if "sdpo_mask" in changes:
        changes = changes | {name: None for name in inputs if name.startswith("teacher_")}
    with pytest.raises(ValueError, match=message):
        sk.srpo_loss(**inputs | changes, config=sk.SRPOConfig(**config))
    with pytest.raises(ValueError, match="divergence_clip must be"):
        sk.SRPOConfig(divergence_clip=0.0)
