"""Stands in for ray, which `import verl` needs and its loss functions do not: 200 MB that no test calls."""

from __future__ import annotations

from unittest.mock import MagicMock


def __getattr__(name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=f"ray.{name}")
