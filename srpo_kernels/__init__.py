"""SRPO (arXiv 2604.02288) losses from hidden states and the LM head, without the logits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srpo_kernels._names import *
    from srpo_kernels._names import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names are imported with the first that is used, and torch with them: --help waits for neither."""
    if "__all__" not in globals() and (name == "__all__" or not name.startswith("_")):
        names = import_module("srpo_kernels._names")
        globals().update({key: getattr(names, key) for key in ("__all__", *names.__all__)})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("srpo_kernels._names").__all__})
