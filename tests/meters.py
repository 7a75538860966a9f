"""What a call costs, counted from the operators that torch dispatches: the library's and the benchmarks' meters."""

from srpo_kernels.verify.timing import MemoryMeter
from tools.meters import HostReads, ProductMeter

__all__ = ["HostReads", "MemoryMeter", "ProductMeter"]
