"""One check at a time: run the library and the oracle, compare both with the oracle in fp64 on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import srpo_kernels
import srpo_kernels_reference as reference
from srpo_kernels import SRPOConfig
from srpo_kernels.engine.backends import BackendName
from srpo_kernels.verify import objective
from srpo_kernels.verify.inputs import COMPARED, TRANSFORM, Case, Inputs, Op, Size, cast, make_inputs
from srpo_kernels.verify.rounding import GradientTerms
from srpo_kernels_reference.logits import project_wide

Results = dict[str, Tensor]

_CPU = torch.device("cpu")
# A few roundings of fp32, relative to the size of the logits that an entry comes from.
_ROUNDING = 2.0**-20
_FP64_TOLERANCE = 1e-9
_REPEATS = 3


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    ``tensor`` is the worst one, relative to what is ``allowed``; ``message`` says why there are no numbers.
    """

    kind: Literal["parity", "determinism"]
    op: Op
    group: str
    case: str
    backend: BackendName
    dtype: str
    seconds: float
    tensor: str | None = None
    error: float = math.nan
    allowed: float = math.nan
    message: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN never does."""
        return self.message is None and self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """Error over allowed error."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.allowed else math.inf


def parity(case: Case, dtype: torch.dtype, backends: Sequence[BackendName], device: torch.device) -> Iterator[Check]:
    """``error(ours) <= 2 error(plain torch in dtype, logits in fp32) + a few roundings``, for the worst tensor.

    Errors are from plain torch in fp64 on the same, rounded inputs. Where dlogits are operands in bf16, a gradient may
    also be off by what that rounds.
    """
    try:
        inputs = cast(make_inputs(case), dtype, device)
        function = objective.oracle if case.op == "fused_loss" else getattr(reference, case.op)
        oracle, terms = partial(function, **_options(case)), GradientTerms()
        exact = _results(partial(oracle, project=terms), cast(inputs, torch.float64, _CPU), case.leaves)
        plain = _results(partial(oracle, project=project_wide), inputs, case.leaves)
        rounding = terms.rounding(inputs["weight"]) if "weight" in inputs else {}
    except Exception as reason:
        for backend in backends:
            yield _check("parity", case, backend, dtype, 0.0, message=f"in plain torch: {describe(reason)}")
        return
    for backend in backends:
        start = time.perf_counter()
        try:
            actual = _results(_library(case, backend, dtype), inputs, case.leaves)
            tensor, error, allowed = _worst(case, dtype, actual, plain, exact, rounding)
            found: dict[str, Any] = {"tensor": tensor, "error": error, "allowed": allowed}
        except Exception as reason:
            found = {"message": describe(reason)}
        yield _check("parity", case, backend, dtype, time.perf_counter() - start, **found)


def determinism(case: Case, dtype: torch.dtype, backend: BackendName, device: torch.device) -> Iterator[Check]:
    """The same call several times: every result and gradient the same to the last bit."""
    start = time.perf_counter()
    try:
        inputs = cast(make_inputs(case), dtype, device)
        function = _library(case, backend, dtype)
        first, *others = (_results(function, inputs, case.leaves) for _ in range(_REPEATS))
        differences = {name: max(_largest(x[name] - value) for x in others) for name, value in first.items()}
        tensor = max(differences, key=lambda name: _rank(differences[name]))
        found: dict[str, Any] = {"tensor": tensor, "error": differences[tensor], "allowed": 0.0}
    except Exception as reason:
        found = {"message": describe(reason)}
    yield _check("determinism", case, backend, dtype, time.perf_counter() - start, **found)


def determinism_cases(size: Size) -> list[Case]:
    """The sums that could depend on timing: over rows, over the vocabulary, over sequences, over a support."""
    configs = {
        "defaults": SRPOConfig(),
        "gspo, entropy bonus": SRPOConfig(loss_type="gspo", entropy_coef=0.1),
        "topk": SRPOConfig(distillation_mode="topk", topk=3),
    }
    runs = [Case("srpo_loss", "repeated runs", name, size, config) for name, config in configs.items()]
    stats = Case("token_stats", "repeated runs", "defaults", size)
    tiled = replace(stats, name="engine=tile", config=SRPOConfig(divergence="reverse_kl"), engine="tile", leaves=())
    return [*runs, stats, tiled]


def _check(
    kind: Literal["parity", "determinism"],
    case: Case,
    backend: BackendName,
    dtype: torch.dtype,
    seconds: float,
    **found: Any,
) -> Check:
    return Check(kind, case.op, case.group, case.name, backend, dtype_name(dtype), seconds, **found)


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: fp32, bf16."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _library(case: Case, backend: BackendName, dtype: torch.dtype) -> Callable[..., Any]:
    """The public function with the options of a case."""
    function = objective.library if case.op == "fused_loss" else getattr(srpo_kernels, case.op)
    options: dict[str, Any] = {"config": case.config} if case.op == "token_stats" else _options(case)
    if case.op in ("token_stats", "teacher_stats"):
        options["engine"] = case.engine
    return partial(function, backend=backend, workspace_bytes=case.workspace_bytes(dtype), **options)


def _options(case: Case) -> dict[str, Any]:
    """The options of a case as the oracle takes them, and the library but for ``token_stats``."""
    if case.op in ("srpo_loss", "fused_loss"):
        return {"config": case.config}
    names = (*TRANSFORM, *COMPARED) if case.op == "token_stats" else TRANSFORM
    return {name: getattr(case.config, name) for name in names}


def _results(function: Callable[..., Any], inputs: Inputs, leaves: tuple[str, ...]) -> Results:
    """What a call returns and the gradients of the leaves that are there, by name."""
    present = [name for name in leaves if inputs.get(name) is not None]
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in present}
    out = function(**inputs)
    values: Results = {name: x for name, x in out._asdict().items() if isinstance(x, Tensor)}
    results = {name: x.detach() for name, x in values.items()}
    if present:
        total = values["loss"] if "loss" in values else _weighted_sum(values)
        gradients = torch.autograd.grad(total, [inputs[name] for name in present])
        results |= {f"grad {name}": x for name, x in zip(present, gradients, strict=True)}
    return results


def _weighted_sum(values: Results) -> Tensor:
    """A scalar whose gradient differs from row to row and from statistic to statistic."""
    terms = []
    for phase, x in enumerate(x for x in values.values() if x.requires_grad):
        weights = torch.cos(torch.arange(x.numel(), dtype=torch.float32) + phase)
        terms.append((x * weights.to(x).view(x.shape)).sum())
    return torch.stack(terms).sum()


def _worst(
    case: Case, dtype: torch.dtype, actual: Results, plain: Results, exact: Results, rounding: dict[str, float]
) -> tuple[str, float, float]:
    """The tensor with the largest error relative to what is allowed, its error and what is allowed."""
    if actual.keys() != exact.keys():
        raise ValueError(f"returned {sorted(actual)}, expected {sorted(exact)}")
    log_probs = exact.get("log_probs", exact.get("entropy"))
    assert log_probs is not None
    # Whatever is made of logits and log-probs is rounded at their size even where it comes out near 0, and a loss's
    # gradient at a row's share of that.
    unit = 8.0 + _largest(log_probs)
    share = 1.0 / log_probs.numel() if case.op == "srpo_loss" else 1.0
    found: dict[str, tuple[float, float]] = {}
    for name, value in exact.items():
        ours, theirs = actual[name], plain[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(f"{name} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}")
        error = _largest(_exactly(ours) - value)
        if dtype == torch.float64:
            allowed = _FP64_TOLERANCE * _largest(value) + 1e-12
        else:
            scale = _largest(value) + unit * (share if name.startswith("grad") else 1.0)
            allowed = 2.0 * _largest(_exactly(theirs) - value) + _ROUNDING * case.condition * scale
            allowed += rounding.get(name, 0.0)
        found[name] = error, allowed
    name = max(found, key=lambda name: _rank(found[name][0] / found[name][1]))
    return name, *found[name]


def _exactly(x: Tensor) -> Tensor:
    return x.to(_CPU, torch.float64)


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(x.abs().max()) if x.numel() else 0.0


def _rank(ratio: float) -> float:
    """NaN is worse than any number."""
    return math.inf if math.isnan(ratio) else ratio


def describe(reason: Exception) -> str:
    """The exception's type and the first line of what it says."""
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0] if lines else ''}"
