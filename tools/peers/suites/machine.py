"""What tests for a GPU need on a machine without one: the CPU under the name of cuda, and packages to import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        keywords = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        return func(*args, **keywords)


def _on_cpu(value: Any) -> Any:
    is_device = isinstance(value, (str, torch.device))
    return torch.device("cpu") if is_device and str(value).split(":")[0] == "cuda" else value


def pretend_cuda() -> None:
    """A GPU of an architecture that every kernel supports, which is the CPU."""
    CpuForCuda().__enter__()
    properties = SimpleNamespace(multi_processor_count=1, major=9, minor=0, name="CPU", total_memory=2**34)
    pretended: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, function in pretended.items():
        setattr(torch.cuda, name, function)


class _Anything(ModuleType):
    """A module, class, decorator or value: whatever is read of it, called or subscripted is another one."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Anything(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        # As a decorator it leaves what it decorates.
        return args[0] if len(args) == 1 and callable(args[0]) and not keywords else _Anything("value")

    def __getitem__(self, key: Any) -> Any:
        return _Anything("item")

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self._fakes(name) else None

    def create_module(self, spec: Any) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def _fakes(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:length]) in self.names for length in range(1, len(parts) + 1))


def fake(names: Iterable[str]) -> None:
    """Let these packages and all below them be imported, as something of which nothing is ever called."""
    sys.meta_path.insert(0, _Finder(names))
