"""The file of a report: what each section found, or why it found nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "done", "failed"]

_FORMAT = 1


class Record:
    """``report.json`` of a folder, written anew after every change.

    A section is ``{"state", "seconds", "result"}``, or ``{"state", "message"}``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "report.json"
        self._content: dict[str, Any] = {
            "format": _FORMAT, "identity": None, "sections": {}, "missing": [], "kernels": {},
        }  # fmt: skip
        if self.path.exists():
            self._content = json.loads(self.path.read_text())

    def identify(self, identity: dict[str, Any]) -> None:
        """What all sections have in common; ValueError where those that are there have something else."""
        if self._content["identity"] not in (None, identity) or self._content["format"] != _FORMAT:
            there = f"{self._content['identity']} in format {self._content['format']}"
            raise ValueError(
                f"{self.path} is of {there}, and this is {identity} in format {_FORMAT}: give another folder"
            )
        self._content["identity"] = identity
        self._write()

    @property
    def content(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return self._content

    def state(self, section: str) -> State | None:
        """None where it has not begun."""
        found: State | None = self._content["sections"].get(section, {}).get("state")
        return found

    def begin(self, section: str) -> None:
        """Who finds it running later knows that the process ended in it."""
        self._put(section, {"state": "running"})

    def finish(self, section: str, result: Any, seconds: float) -> None:
        """With what it found."""
        self._put(section, {"state": "done", "seconds": seconds, "result": _finite(result)})

    def fail(self, section: str, message: str) -> None:
        """With the reason."""
        self._put(section, {"state": "failed", "message": message})

    def blame(self, message: str) -> None:
        """Whatever was running when its process ended has failed."""
        for name, section in self._content["sections"].items():
            if section["state"] == "running":
                self.fail(name, message)

    def forget(self, state: State) -> None:
        """Make sections in this state ones that have not begun."""
        sections = self._content["sections"]
        self._content["sections"] = {name: x for name, x in sections.items() if x["state"] != state}
        self._write()

    def add_kernels(self, kernels: list[dict[str, Any]]) -> None:
        """What kernels were compiled to, each once."""
        self._content["kernels"] |= {kernel["hash"]: kernel for kernel in kernels}
        self._write()

    def missing(self, names: list[str]) -> None:
        """Sections that there was no time for."""
        self._content["missing"] = names
        self._write()

    def _put(self, section: str, value: dict[str, Any]) -> None:
        self._content["sections"][section] = value
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one step: a process that ends in the middle leaves the old file.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self._content, indent=1, allow_nan=False) + "\n")
        os.replace(new, self.path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite are null."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
