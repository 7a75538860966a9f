"""Whether the verl that is installed has what is overridden here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import verl

SUPPORTED = (0, 9)


def check_version() -> None:
    """Raise ImportError for a verl other than 0.9."""
    version = tuple(int(part) for part in verl.__version__.split(".")[:2])
    if version != SUPPORTED:
        raise ImportError(
            f"srpo_kernels' engine and trainer are for verl >= 0.9, < 0.10, got verl {verl.__version__}; the loss "
            "hooks of srpo_kernels.integrations.verl.plugin are all that other versions can have"
        )


def check_signature(owner: type, name: str, parameters: Sequence[str]) -> None:
    """Raise ImportError unless ``owner`` has a method ``name`` with these parameters after ``self``."""
    method: Any = getattr(owner, name, None)
    got = None if method is None else list(inspect.signature(method).parameters)[1:]
    if got != list(parameters):
        raise ImportError(
            f"{owner.__module__}.{owner.__qualname__}.{name} of verl {verl.__version__} must have the parameters "
            f"{list(parameters)}, which srpo_kernels overrides, got {got}"
        )
