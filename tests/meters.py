"""What a call costs, counted from the operators that torch dispatches: the library's and the benchmarks' meters."""

from benchmarks.meters import ProductMeter
from srpo_kernels.verify.timing import MemoryMeter

__all__ = ["MemoryMeter", "ProductMeter"]
