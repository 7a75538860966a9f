"""What the makers of devices say of them."""

from __future__ import annotations

import re
from typing import NamedTuple


class DataSheet(NamedTuple):
    """A product's memory bandwidth and its dense matmuls of bf16 operands with fp32 sums."""

    gigabytes_per_second: float
    teraflops: float


# NVIDIA's A100, H100, H200 and B200 in their SXM form, and AMD's MI300X, each from its maker's data sheet; sparsity,
# which doubles NVIDIA's figures there, is taken out.
DATA_SHEETS: dict[str, DataSheet] = {
    "A100": DataSheet(2_039, 312),
    "H100": DataSheet(3_350, 989),
    "H200": DataSheet(4_800, 989),
    "B200": DataSheet(8_000, 2_250),
    "MI300X": DataSheet(5_300, 1_307),
}
# What these call themselves; a PCIe card of the same name is slower.
_NAMES = {
    "A100": r"A100-SXM4-80GB",
    "H100": r"H100 80GB HBM3",
    "H200": r"H200(?! NVL)",
    "B200": r"\bB200",
    "MI300X": r"MI300X",
}


def data_sheet(device_name: str) -> DataSheet | None:
    """Of the device that calls itself so; None where it is not in the table."""
    return next((DATA_SHEETS[name] for name, pattern in _NAMES.items() if re.search(pattern, device_name)), None)
