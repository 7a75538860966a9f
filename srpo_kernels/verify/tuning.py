"""Launches of the kernels that are not the engine's, timed on the GPU that is there."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.verify.device_report.probes import KINDS, pass_rates
from srpo_kernels.verify.rounds import Clock

_REPEATS = 5
_COLUMNS = (
    "target", "kind", "models", "lanes", "block_rows", "block_vocab", "block_hidden", "num_warps", "num_stages",
    "time", "chosen",
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """A launch: what it is ``of``, its time ``on_paper``, and its ``rate`` in bytes or FLOP per second.

    ``rate`` is None where the device refuses it, for the ``reason``. ``chosen``: it is the engine's.
    """

    of: str
    launch: str
    on_paper: float
    chosen: bool
    rate: float | None
    reason: str = ""


@dataclass(frozen=True)
class Size:
    """What is timed: ``rows`` of logits, and for tiles hidden states, of a head ``[vocab_size, hidden_size]``."""

    rows: int = 1_024
    vocab_size: int = 151_936
    hidden_size: int = 4_096


def target_of(device: torch.device) -> str:
    """The architecture of a GPU, as compilers call it."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def read_choices(path: Path, target: str) -> list[dict[str, str]]:
    """The launches of a file that ``tools.launches`` has written, for ``target``. Raises ValueError for none."""
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"--tune {path}: {error.strerror}") from error
    if not lines or not set(_COLUMNS) <= set(lines[0]):
        raise ValueError(f"--tune {path}: no file of python -m tools.launches, which has columns {list(_COLUMNS)}")
    found = [line for line in lines if line["target"] == target]
    if not found:
        known = ", ".join(sorted({line["target"] for line in lines}))
        raise ValueError(f"--tune {path}: it has launches for {known}, and none for this device's {target}")
    return found


def tune(choices: list[dict[str, str]], device: torch.device, size: Size) -> Iterator[Tuned]:
    """Time every launch."""
    for choice in choices:
        name, chosen = _name(choice), choice["chosen"] == "True"
        of = f"{choice['kind']}, {'student' if choice['models'] == '1' else 'student and teacher'}"
        try:
            with _launched_as(choice):
                rate = _RATES[choice["kind"]](int(choice["models"]), device, size)
        except Exception as error:
            # Whatever a driver or a compiler says of too many resources.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Tuned(of, name, float(choice["time"]), chosen, None, reason)
        else:
            yield Tuned(of, name, float(choice["time"]), chosen, rate)


def _name(choice: dict[str, str]) -> str:
    if choice["kind"] == "rows":
        return f"{choice['lanes']} lanes, {choice['num_warps']} warps"
    blocks = " × ".join(choice[name] for name in ("block_rows", "block_vocab", "block_hidden"))
    return f"{blocks}, {choice['num_warps']} warps, {choice['num_stages']} stages"


def _launched_as(choice: dict[str, str]) -> AbstractContextManager[Any]:
    """The kernels' launches are this one."""
    from srpo_kernels.kernels import launch, rows, tiles

    numbers = {name: int(choice[name]) for name in _COLUMNS[3:9]}
    if choice["kind"] == "rows":
        own = launch.RowLaunch(numbers["lanes"], numbers["num_warps"], numbers["num_stages"])
        return patch.object(rows, "row_launch", lambda *_: own)
    del numbers["lanes"]
    tile = launch.TileLaunch(**numbers)
    return patch.object(tiles, "tile_launch", lambda *_: tile)


def _row_rate(models: int, device: torch.device, size: Size) -> float:
    """Bytes per second of statistics and gradient together."""
    kind = "policy" if models == 1 else "jsd"
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    found = pass_rates(device, "triton", size.vocab_size, size.rows, kind, KINDS[kind], dtype)
    rates: list[float] = list(found["bytes_per_second"].values())
    return statistics.harmonic_mean(rates)


def _tile_rate(models: int, device: torch.device, size: Size) -> float:
    """FLOP per second of the statistics, their reductions and all."""
    from srpo_kernels.kernels.tiles import Projection, tile_stats

    def model() -> Projection:
        hidden, weight = (torch.randn(n, size.hidden_size, device=device) for n in (size.rows, size.vocab_size))
        return Projection(hidden.bfloat16(), weight.bfloat16(), None)

    student, teacher = model(), model() if models == 2 else None
    spec = RowSpec() if teacher is None else RowSpec(divergence="reverse_kl")
    target_ids = torch.zeros(size.rows, dtype=torch.int64, device=device)
    step: Callable[[], object] = partial(tile_stats, student, teacher, spec, target_ids)
    clock = Clock(device)
    # The first run compiles.
    seconds = [clock.seconds(step) for _ in range(_REPEATS + 1)][1:]
    return 2.0 * models * size.rows * size.vocab_size * size.hidden_size / statistics.median(seconds)


_RATES: dict[str, Callable[[int, torch.device, Size], float]] = {"rows": _row_rate, "tiles": _tile_rate}
