"""What a call costs, counted from the operators that torch dispatches: the meters of the benchmarks."""

from benchmarks.meters import MemoryMeter, ProductMeter

__all__ = ["MemoryMeter", "ProductMeter"]
