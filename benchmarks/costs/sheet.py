"""The cost sheet: every provider on every kind of rows, every kernel, as tables and as lines of a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from benchmarks.costs import CaseName, ProviderName
from benchmarks.costs.measure import PerRow, StepCost, measure
from benchmarks.costs.steps import CHUNKS, REMARKS
from benchmarks.costs.tiles import TileCost, measure_tiles

_STEPS = (
    "One step, forward and backward to dX and dW, of rows of one kind with fp32 logits. Products: matrix products in "
    "units of N·H·V; dots: those inside Triton kernels. Bytes are per row: V is the vocabulary, numbers without it are "
    "a row's own. Kernels: what Triton kernels load and store; torch: what unfused operators beside them read and "
    "write, but for the products. Launches: of Triton kernels, per chunk. Workspace: bytes alive per row of a chunk."
)
_KERNELS = "What a launch of a Triton kernel loads and stores: bytes per vocabulary element of a row, and beside them."
_TILES = (
    "`tile_stats` with bf16 operands, whole tiles: how often a model's weight and hidden states are read, bytes of the "
    "sums per row and tile, and the dots' FLOP as a multiple of 2·N·H·V."
)


@dataclass(frozen=True)
class Sheet:
    """Costs of steps, or the reason why there are none, and of ``tile_stats``."""

    steps: dict[tuple[CaseName, ProviderName], StepCost | str]
    tiles: Sequence[TileCost]

    def tables(self) -> dict[str, tuple[pd.DataFrame, str]]:
        """Tables by name, each with what its cells say."""
        return {
            "steps": (pd.DataFrame(self._step_cells()), _STEPS),
            "kernels": (self._kernel_cells(), _KERNELS),
            "tile_stats": (pd.DataFrame([_tile_cells(tile) for tile in self.tiles]), _TILES),
        }

    def lines(self) -> pd.DataFrame:
        """Numbers in long format."""
        return pd.DataFrame(self._lines(), columns=["rows", "provider", "kernel", "metric", "value"])

    def _measured(self) -> Iterator[tuple[CaseName, ProviderName, StepCost]]:
        for (case, provider), cost in self.steps.items():
            if isinstance(cost, StepCost):
                yield case, provider, cost

    def _step_cells(self) -> Iterator[dict[str, str]]:
        for (case, provider), cost in self.steps.items():
            cells: dict[str, str] = {"rows": case, "provider": provider}
            if isinstance(cost, str):
                yield cells | dict.fromkeys(_STEP_COLUMNS, "-") | {"chunk": "-", "remark": cost}
            else:
                cells |= {name: text(cost) for name, text in _STEP_COLUMNS.items()}
                yield cells | {"chunk": CHUNKS[provider, case], "remark": REMARKS.get((provider, case), "")}

    def _kernel_cells(self) -> pd.DataFrame:
        """Kernels that cost the same in several cases share a line."""
        cells = pd.DataFrame(
            {
                "provider": provider,
                "kernel": _short(name),
                "rows": case,
                "loaded": f"{kernel.loaded.per_element / kernel.launches:.4g}",
                "stored": f"{kernel.stored.per_element / kernel.launches:.4g}",
                "extra per row": f"{(kernel.loaded.constant + kernel.stored.constant) / kernel.launches:.0f}",
            }
            for case, provider, cost in self._measured()
            for name, kernel in cost.kernels.items()
        )
        if cells.empty:
            return cells
        keys = [column for column in cells.columns if column != "rows"]
        shared = cells.groupby(keys, sort=False)["rows"].agg(", ".join).reset_index()
        return shared[list(cells.columns)]

    def _lines(self) -> Iterator[tuple[str, str, str, str, float]]:
        for case, provider, cost in self._measured():
            for name in ("products", "operators", "workspace", "launches", "dots"):
                yield case, provider, "", name, getattr(cost, name)
            for name, kernel in cost.kernels.items():
                for direction in ("loaded", "stored"):
                    amount: PerRow = getattr(kernel, direction)
                    yield case, provider, _short(name), f"{direction}_per_element", amount.per_element
                    yield case, provider, _short(name), f"{direction}_per_row", amount.constant
                yield case, provider, _short(name), "launches", kernel.launches
        for tile in self.tiles:
            values = asdict(tile)
            models = values.pop("models")
            for name, value in values.items():
                yield f"{models} model(s)", "srpo_kernels", "tile_stats", name, value


def measure_sheet(
    cases: Sequence[CaseName], providers: Sequence[ProviderName], progress: Callable[[str], None]
) -> Sheet:
    """Measure everything; a provider that is not installed gets that as its reason."""
    steps: dict[tuple[CaseName, ProviderName], StepCost | str] = {}
    for case in cases:
        for provider in providers:
            progress(f"{case}, {provider}")
            try:
                steps[case, provider] = measure(provider, case)
            except ImportError as error:
                steps[case, provider] = f"not installed: {error.name}"
    progress("tile_stats")
    return Sheet(steps, [measure_tiles(models) for models in (1, 2)])


def _text(amount: PerRow) -> str:
    parts = []
    if amount.per_element:
        parts.append(f"{amount.per_element:.4g} V")
    if round(amount.constant):
        parts.append(f"{amount.constant:,.0f}")
    return " + ".join(parts) or "0"


_STEP_COLUMNS: dict[str, Callable[[StepCost], str]] = {
    "products": lambda cost: f"{cost.products:g}",
    "dots": lambda cost: f"{cost.dots:g}",
    "kernels load": lambda cost: _text(cost.loaded),
    "kernels store": lambda cost: _text(cost.stored),
    "torch": lambda cost: _text(PerRow(cost.operators)),
    "all bytes": lambda cost: _text(cost.loaded + cost.stored + PerRow(cost.operators)),
    "launches": lambda cost: str(cost.launches),
    "workspace": lambda cost: _text(PerRow(cost.workspace)),
}


def _tile_cells(tile: TileCost) -> dict[str, str]:
    return {
        "models": "student and teacher" if tile.models == 2 else "student",
        "weight read": f"once for {tile.rows_per_weight_read:g} rows",
        "hidden read": f"once for {tile.columns_per_hidden_read:g} columns",
        "sums stored": f"{tile.sums_stored:g}",
        "sums loaded": f"{tile.sums_loaded:g}",
        "dots": f"{tile.dots:g}",
    }


def _short(kernel: str) -> str:
    """A kernel's name without its module and what all of them end in."""
    return kernel.rpartition(".")[2].strip("_").removesuffix("_kernel")
