"""Whole steps, forward and backward to dX and dW: this library beside everything that is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from srpo_kernels.verify.agreement import TOLERANCES, Truth
from srpo_kernels.verify.batches import Batch, Case, make_batch
from srpo_kernels.verify.checks import describe
from srpo_kernels.verify.data_sheets import data_sheet
from srpo_kernels.verify.kinds import PROVIDERS, ProviderName
from srpo_kernels.verify.providers import Step, Unsupported, prepare
from srpo_kernels.verify.roofline import work_of
from srpo_kernels.verify.rounds import Rounds, interleave, quantiles
from srpo_kernels.verify.timing import free_bytes, peak_mib

_ROUNDS = Rounds(7, budget=10.0)


def measure_step(case: Case, device: torch.device, device_name: str) -> dict[str, Any]:
    """Time, extra peak memory and error of each provider, or its reason to have none; and what counting predicts."""
    batch = make_batch(case, device)
    found: dict[ProviderName, dict[str, Any]] = {name: {} for name in PROVIDERS}
    steps: dict[ProviderName, Step] = {}
    for name in PROVIDERS:
        _try(found[name], partial(_prepare, steps, name, batch))
    truth = Truth(steps, batch)
    for name, step in list(steps.items()):
        _try(found[name], partial(_alone, found[name], name, step, batch, truth, case))
        if "reason" in found[name]:
            del steps[name]
    del truth
    seconds = interleave(steps, _ROUNDS, device, lambda _: None)
    for name, times in seconds.items():
        found[name]["seconds"] = quantiles(times)._asdict()
        if "bare" in seconds:
            ratios = [a / b for a, b in zip(times, seconds["bare"], strict=True)]
            found[name]["ratio_to_bare"] = quantiles(ratios)._asdict()
    work, sheet = work_of(batch), data_sheet(device_name)
    return {
        **case.labels,
        "name": case.name,
        "work": asdict(work),
        "seconds_at_peak": None if sheet is None else work.seconds(sheet),
        "providers": found,
    }


def _try(found: dict[str, Any], action: Callable[[], object]) -> None:
    """A reason goes into ``found`` where it does not go well."""
    try:
        action()
    except Unsupported as reason:
        found["reason"] = str(reason)
    except Exception as reason:
        # A peer's fault or ours: the others are measured all the same.
        found.update(reason=describe(reason), failed=True)


def _prepare(steps: dict[ProviderName, Step], name: ProviderName, batch: Batch) -> None:
    steps[name] = prepare(name, batch)


def _alone(found: dict[str, Any], name: ProviderName, step: Step, batch: Batch, truth: Truth, case: Case) -> None:
    """Warm up, compare and meter an accelerator's memory."""
    result = step()
    if name != "bare":
        found["errors"] = truth.errors(name, result, TOLERANCES[case.dtype])._asdict()
    del result
    # What counts a CPU's memory keeps a step from being compiled.
    if not batch.hidden.is_cpu:
        # What others have left is given back.
        free_bytes(batch.hidden.device)
        found["peak_mib"] = peak_mib(step, [], batch.hidden.device)
