"""Where fp32 has little room: as exact as plain torch, in every regime that training meets.

Held to twice the error of the oracle run in fp32, both against fp64, as a root mean square over rows: a single row may
be lucky.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from reference.logits import head_logits
from srpo_kernels import SRPOConfig, fused_loss, srpo_loss, token_stats
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.kernels.launch import vendor_of
from srpo_kernels.rows.mixture import has_mixture, mixture_of
from srpo_kernels.rows.spec import DIVERGENCES, LogitTransform
from tests.comparison import run_loss, run_stats
from tests.inputs import Inputs, cast
from tests.rows.test_extreme_rows import distilled, heads
from tests.strategies import each_backend

ROWS, VOCABULARY = 8, 4097
# Where plain torch is exact by luck: two roundings of a probability, one of a row's; and of every logit at its size.
ROUNDING = 2.0**-23


def logits(regime: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Student's, teacher's, and the options that make them a regime."""
    torch.manual_seed(5)
    z, noise = torch.randn(2, ROWS, VOCABULARY).unbind()
    peak = torch.zeros(VOCABULARY)
    peak[7] = 14.0
    return {
        "flat": (0.5 * z, 0.5 * z + noise, {}),
        "nearly equal": (0.5 * z, 0.5 * z + 1e-3 * noise, {}),
        "nearer still": (0.5 * z, 0.5 * z + 1e-4 * noise, {}),
        "peaked": (z + peak, z + peak + noise, {}),
        "peaked, nearly equal": (z + peak, z + peak + 1e-3 * noise, {}),
        "shifted": (z, z + 100.0 + 0.1 * noise, {}),
        "saturated": (100.0 * z, 100.0 * noise, {}),
        "saturated at 1e6": (1e6 * z, 1e6 * noise, {}),
        "softcap": (0.3 * z, 0.3 * z + 0.3 * noise, {"softcap": 30.0}),
        "small softcap": (0.3 * z, 0.3 * z + 0.3 * noise, {"softcap": 5.0}),
        "softcap of no effect": (0.3 * z, 0.3 * z + 0.3 * noise, {"softcap": 1e6}),
        "softcap reached": (30.0 * z, 30.0 * z + 10.0 * noise, {"softcap": 30.0}),
    }[regime]


REGIMES = (
    "flat", "nearly equal", "nearer still", "peaked", "peaked, nearly equal", "shifted", "saturated",
    "saturated at 1e6", "softcap", "small softcap", "softcap of no effect", "softcap reached",
)  # fmt: skip


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def dlogits(results: dict[str, Tensor]) -> Tensor:
    """A row of the identity's share of dW is the gradient of its logits."""
    return results["grad weight"].T


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("regime", REGIMES)
def test_divergences(regime: str, divergence: str, backend: str, device: torch.device) -> None:
    z, y, options = logits(regime)
    stats = {"divergence": divergence, "alpha": 0.5} | options
    inputs = heads(z, y)
    upstream = torch.zeros(3, ROWS, dtype=torch.float64)
    upstream[2] = 1.0
    runs = [
        run_stats(token_stats, inputs, upstream, ("weight",), backend=backend, **stats),
        run_stats(reference.token_stats, inputs, upstream, ("weight",), **stats),
        run_stats(reference.token_stats, cast(inputs, torch.float64), upstream, ("weight",), **stats),
    ]
    check(runs, inputs, value="divergence", logarithms=of_logarithms(inputs, stats, device))
    config = SRPOConfig(divergence=divergence, dw_beta=0.0, reduction="constant", max_length=1, **options)
    # Gradients alone: of half of the rows they are thousands of numbers still.
    half = ROWS // 2
    inputs = heads(z[:half], y[:half])
    whole = distilled(z[:half], y[:half], sequence_ids=torch.zeros(half, dtype=torch.int64))
    runs = [
        run_loss(srpo_loss, whole, ("weight",), backend=backend, config=config),
        run_loss(reference.srpo_loss, whole, ("weight",), config=config),
        run_loss(reference.srpo_loss, cast(whole, torch.float64), ("weight",), config=config),
    ]
    check(runs, inputs)


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("regime", ["flat", "nearly equal", "nearer still", "peaked, nearly equal", "softcap"])
def test_divergences_of_each_row_s_own(regime: str, divergence: str, backend: str, device: torch.device) -> None:
    z, y, options = logits(regime)
    stats = {"divergence": divergence, "alpha": 0.5} | options
    inputs, upstream = heads(z, y), torch.zeros(3, ROWS, dtype=torch.float64)
    upstream[2] = 1.0
    # A bound that no entry reaches changes nothing but the pass.
    own = {"divergence_clip": torch.full((ROWS,), float("inf"))}
    runs = [
        run_stats(token_stats, inputs | own, upstream, ("weight",), backend=backend, **stats),
        run_stats(reference.token_stats, inputs, upstream, ("weight",), **stats),
        run_stats(reference.token_stats, cast(inputs, torch.float64), upstream, ("weight",), **stats),
    ]
    check(runs, inputs, value="divergence", logarithms=of_logarithms(inputs, stats, device))


def of_logarithms(inputs: Inputs, stats: dict[str, Any], device: torch.device) -> float:
    """What compiled kernels' logarithm adds to a divergence from a mixture m.

    NVIDIA's is off by 2^-22 between 1/2 and 2, and by 2^-22 of itself elsewhere: ``KL(p || m)`` in bits then by 2^-22
    of the sum of ``p max(1, |log2(p / m)|)``.
    """
    if not has_mixture(stats["divergence"]) or vendor_of(device) != "nvidia":
        return 0.0
    mixture, tiny = mixture_of(stats["divergence"], stats["alpha"]), torch.finfo(torch.float32).tiny
    p, q = (
        head_logits(hidden.double(), weight.double(), softcap=stats.get("softcap")).softmax(-1)
        for hidden, weight in (
            (inputs["hidden"], inputs["weight"]),
            (inputs["teacher_hidden"], inputs["teacher_weight"]),
        )
    )
    m = mixture.student_share * p + mixture.teacher_share * q + tiny
    p_bits, q_bits = ((x * (x / m + tiny).log2().abs().clamp_min(1.0)).sum(1) for x in (p, q))
    return 2.0**-22 * math.log(2.0) * rms(mixture.student_weight * p_bits + mixture.teacher_weight * q_bits)


def check(runs: list[dict[str, Tensor]], inputs: Inputs, *, value: str | None = None, logarithms: float = 0.0) -> None:
    """``logarithms`` is what theirs add to the value's error."""
    pairs = [("gradient", *(dlogits(run) for run in runs))]
    if value is not None:
        pairs.append((value, *(run[value] for run in runs)))
    largest = float(inputs["weight"].abs().max())
    for name, actual, plain, exact in pairs:
        error, naive = rms(actual - exact), rms(plain - exact)
        tiny = ROUNDING * (exact[0].numel() ** -0.5 + largest * rms(exact) if name == "gradient" else rms(exact) + 0.1)
        tiny += logarithms if name == value else 0.0
        assert error <= 2 * naive + tiny, f"{name}: {error:.2e} of {rms(exact):.2e}, plain torch {naive:.2e}"


@each_backend
@pytest.mark.parametrize("softcap", [2.0, 30.0, 1e6])
def test_log_probs_under_a_softcap(softcap: float, backend: str) -> None:
    torch.manual_seed(6)
    for scale in (0.01, 0.3, 3.0, 30.0):
        inputs = heads(scale * torch.randn(ROWS, 513))
        upstream = torch.ones(1, ROWS, dtype=torch.float64)
        options = {"softcap": softcap}
        runs = [
            run_stats(token_stats, inputs, upstream, ("weight",), backend=backend, **options),
            run_stats(reference.token_stats, inputs, upstream, ("weight",), **options),
            run_stats(reference.token_stats, cast(inputs, torch.float64), upstream, ("weight",), **options),
        ]
        check(runs, inputs, value="log_probs")


@each_backend
@pytest.mark.parametrize(("softcap", "scale"), [(5.0, 3.0), (30.0, 1.0), (30.0, 100.0), (1e6, 1e4)])
def test_units_at_ids_are_those_of_the_passes(softcap: float, scale: float, backend: str, device: torch.device) -> None:
    """To the last bit: of a token that has all of the mass, the log-prob is 0, whatever a unit stands for."""
    rows, transform = rows_of(backend), LogitTransform(temperature=0.05, softcap=softcap)
    logits = (torch.randn(64, 129) * scale).to(device)
    target_ids = torch.randint(129, (64,)).to(device)
    (sums,) = rows.sums(logits, None, transform, target_ids=target_ids)
    units = rows.units(logits, transform)
    assert torch.equal(units.amax(1), sums.maximum.flatten())
    assert torch.equal(units.gather(1, target_ids[:, None]).flatten(), sums.target.flatten())
    assert rows.units(logits[:0], transform).shape == (0, 129)


@each_backend
def test_one_token_among_those_that_were_sampled_has_all_of_the_mass(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) * 100 for shape in ((6, 8), (33, 8)))
    inputs = {"hidden": hidden, "weight": weight, "target_ids": torch.arange(6)}
    support = torch.stack([(hidden @ weight.T).argmax(1), torch.arange(6)], dim=1)
    support[:, 1] = torch.where(support[:, 0] == support[:, 1], -1, support[:, 1])
    config = SRPOConfig(softcap=1e6, temperature=0.05)
    calls = {"support_ids": support, "objective": lambda rows: rows.full_log_probs - rows.log_probs + rows.full_entropy}
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight")}
    out = fused_loss(**inputs | leaves, **calls, config=config, backend=backend)
    # The sampled tokens' softmax is that of the whole vocabulary: the two log-probs cancel.
    for grad in torch.autograd.grad(out.loss, list(leaves.values())):
        assert float(grad.abs().max()) <= 1e-3
