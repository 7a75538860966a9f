"""What a call costs, counted from the operators that torch dispatches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ProductMeter(TorchDispatchMode):
    """Multiply-adds of products of two matrices; torch's own counter misses ``addmm_``."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        elif name in ("bmm", "baddbmm", "addbmm", "addr"):
            raise NotImplementedError(f"{func} is a product that is not counted")
        return func(*args, **(kwargs or {}))


class MemoryMeter(TorchDispatchMode):
    """The most bytes that were alive at a time of what was allocated inside, and the largest allocation."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self._known = {StorageWeakRef(x.untyped_storage()) for x in known if x is not None}
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._known:
                    self._alive[storage] = tensor.untyped_storage().nbytes()
                    self.largest = max(self.largest, self._alive[storage])
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
