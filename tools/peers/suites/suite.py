"""What a peer's tests are, and what stands in for its functions while they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest

NO_COUNTERPART = "no counterpart: "


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The loss tests of one peer.

    Args:
        peer: its name.
        paths: folders of the checkout that its tests import from.
        tests: the files of the checkout that are run, or ``file::class``.
        stand_ins: ours by ``"module:name"`` of theirs. Every module that has theirs, under any name, gets ours.
        without: ``(pattern, reason)``: tests whose id the pattern is found in have no counterpart.
        shrink: other values for the parameters of a test; whether to make them smallest, for Triton's interpreter; and
            the test's id.
        absent: packages to fake, which a machine without a GPU does not have.
        asks_for_cuda: its tests name the device "cuda", and are given the CPU.
        conftest: their conftest.py is loaded.
        tests_alone: what they test is installed: of the checkout the folder ``tests`` alone is used.
        reaches: a test has to reach a function of ours, or it has no counterpart.
        prepare: called before a module of theirs is imported.
    """

    peer: str
    paths: tuple[str, ...]
    tests: tuple[str, ...]
    stand_ins: Mapping[str, object]
    without: tuple[tuple[str, str], ...] = ()
    shrink: Callable[[Mapping[str, Any], bool, str], Mapping[str, Any]] = lambda parameters, smallest, name: {}
    absent: tuple[str, ...] = ()
    asks_for_cuda: bool = False
    conftest: bool = True
    tests_alone: bool = False
    reaches: bool = True
    prepare: Callable[[], None] = field(default=lambda: None)


def no_counterpart(reason: str) -> NoReturn:
    """End the running test: what it asks for is not in this library."""
    pytest.skip(NO_COUNTERPART + reason)
