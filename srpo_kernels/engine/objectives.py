"""What the engine asks of an objective, and a caller's function as one: evaluated once per row, on vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from srpo_kernels.losses.derived import Derivation
from srpo_kernels.losses.rows import (
    DIFFERENTIABLE,
    FULL,
    OF_TEACHER,
    PUBLIC,
    STUDENT,
    NotComputed,
    ObjectiveRows,
)
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.rows.contract import RowGradients
from srpo_kernels.rows.mixture import KLS


class Objective(Protocol):
    """A loss on vectors of rows.

    ``whole_sequences``: it sees all rows of a sequence together. ``teacher_first``: it wants the entropies of all rows
    with a teacher, by ``begin``, before any row.
    """

    whole_sequences: bool
    teacher_first: bool

    def reads(self, taught: bool) -> tuple[frozenset[str], frozenset[str]]:
        """The statistics that rows with a teacher, or without one, need, and those that carry gradient."""

    def begin(self, teacher_entropy: Tensor) -> None:
        """Take the entropies, ``[n]``, of all rows with a teacher."""

    def evaluate(self, rows: ObjectiveRows) -> tuple[Tensor, Tensor | None]:
        """The losses of rows ``[n]``, and what multiplies all gradients of earlier calls, None for 1."""

    def judge(self, rows: ObjectiveRows, losses: Tensor, gradients: RowGradients) -> None:
        """See what came of an evaluation."""

    def by_columns(self, taught: bool) -> bool:
        """Whether a few columns of the head say all that rows with a teacher, or without one, need."""

    def widen(self, name: str) -> None:
        """Add a statistic to what is read: a call has turned out to need it."""

    def expect(self, names: frozenset[str]) -> None:
        """Add the gradients of statistics to those of ``reads``, likewise."""


class Evaluation(NamedTuple):
    """Losses ``[n]``, without a graph, their gradients by the statistics ``[n]``, and the factor of ``evaluate``."""

    losses: Tensor
    gradients: RowGradients
    rescale: Tensor | None


def evaluate(
    objective: Objective,
    statistics: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    sequences: Sequences | None,
    num_taught: int,
    *,
    gradient: bool,
    active: bool = True,
) -> Evaluation:
    """Evaluate and differentiate once. Of n rows the first ``num_taught`` have a teacher."""
    leaves = dict(statistics)
    if gradient:
        leaves |= {name: leaves[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in leaves}
    rows = ObjectiveRows(leaves, inputs, sequences, num_taught, active=active)
    with torch.set_grad_enabled(gradient):
        losses, rescale = objective.evaluate(rows)
    gradients = RowGradients()
    if gradient and losses.requires_grad:
        variables = {name: leaves[name] for name in DIFFERENTIABLE if name in leaves}
        found = torch.autograd.grad(losses, list(variables.values()), torch.ones_like(losses), allow_unused=True)
        gradients = RowGradients(**dict(zip(variables, found, strict=True)))
    objective.judge(rows, losses, gradients)
    return Evaluation(losses.detach(), gradients, rescale)


class CustomObjective:
    """A caller's function of ``ObjectiveRows`` as an objective; ``name`` stands for it in errors.

    It is first called on one made-up row, which shows what it reads. Where a real row makes it read more, that row's
    statistics are computed again.
    """

    teacher_first = False

    def __init__(
        self,
        function: Callable[[ObjectiveRows], Tensor],
        name: str,
        derivation: Derivation,
        *,
        whole_sequences: bool,
        has_teacher: bool,
    ) -> None:
        self.function, self.name, self.whole_sequences = function, name, whole_sequences
        self._derivation, self._has_teacher = derivation, has_teacher
        # What it reads by the caller's names, and the gradients by those of the passes.
        self._names, self._gradients = frozenset({"log_probs"}), derivation.sources("log_probs")
        self._bad: list[Tensor] = []

    def discover(self, inputs: Mapping[str, Tensor], like: Tensor) -> None:
        """Find out what the function reads, from the ``inputs`` ``[1]`` of one row; ``like`` has dtype and device."""
        available = [name for name in PUBLIC if self._obstacle(name) is None]
        # Log-probs of an old policy, if that is what an input is, are near these.
        made_up = {name: like.new_full((1,), -1.0 if name.endswith("log_probs") else 0.5) for name in available}
        leaves = {name: x.requires_grad_() if name in (*STUDENT, *FULL) else x for name, x in made_up.items()}
        first = torch.zeros(1, dtype=torch.int64, device=like.device)
        sequences = Sequences(first, 1) if self.whole_sequences else None
        rows = ObjectiveRows(leaves, inputs, sequences, int(self._has_teacher))
        variables = [name for name, x in leaves.items() if x.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(variables)
        try:
            with torch.enable_grad():
                loss = self.function(rows).sum()
            found = torch.autograd.grad(loss, [leaves[name] for name in variables], allow_unused=True)
        # Whatever is wrong with it, the real rows will show, or it is wrong with made-up ones alone.
        except Exception:
            pass
        moving = [name for name, x in zip(variables, found, strict=True) if x is not None]
        self._names = frozenset({"log_probs"} | (rows.read & leaves.keys()) | {*moving})
        self._gradients = frozenset[str]().union(*map(self._derivation.sources, moving)) & {*DIFFERENTIABLE}

    def reads(self, taught: bool) -> tuple[frozenset[str], frozenset[str]]:
        """What is known of it so far."""
        names = frozenset[str]().union(*map(self._derivation.sources, self._read_of(taught)))
        return names, self._gradients & names

    def by_columns(self, taught: bool) -> bool:
        """By what is known of it so far."""
        return self._derivation.by_columns(self._read_of(taught))

    def _read_of(self, taught: bool) -> frozenset[str]:
        return self._names if taught else self._names - OF_TEACHER

    def _obstacle(self, name: str) -> str | None:
        """Why there is no such statistic."""
        if name not in PUBLIC:
            return f"{self.name} reads {[name]} of its rows, which only srpo_loss can"
        if name in OF_TEACHER and not self._has_teacher:
            return f"{self.name} reads rows.{name}, which needs teacher_hidden, got None"
        if name == "teacher_log_probs" and self._derivation.given:
            return (
                f"{self.name} reads rows.{name}, which needs teacher_hidden: of a teacher that is its likeliest tokens "
                "alone, that of the row's own token may not be known"
            )
        if name in KLS and (self._derivation.given or self._derivation.mode != "full"):
            return (
                f"{self.name} reads rows.{name}, which is over the whole vocabulary: it needs teacher_hidden and "
                f"distillation_mode='full', got {self._derivation.mode!r}"
            )
        return None

    def begin(self, teacher_entropy: Tensor) -> None:
        """Not asked for."""

    def widen(self, name: str) -> None:
        """Read this too."""
        if (obstacle := self._obstacle(name)) is not None:
            raise ValueError(obstacle)
        self._names |= {name}

    def expect(self, names: frozenset[str]) -> None:
        """Of what it reads."""
        self._gradients |= names

    def evaluate(self, rows: ObjectiveRows) -> tuple[Tensor, None]:
        """The function's value, after every check of it that reads no data."""
        leaves, rows = rows.tensors(), rows.derived(self._derivation, self._read_of(bool(rows.num_taught)))
        tensors = leaves | rows.tensors()
        versions = {name: x._version for name, x in tensors.items()}
        try:
            losses = self.function(rows)
        except NotComputed:
            raise
        except Exception as error:
            error.add_note(f"raised by {self.name}, the objective of fused_loss, for {len(rows)} rows")
            raise
        for name in sorted(rows.read):
            if (obstacle := self._obstacle(name)) is not None:
                raise ValueError(obstacle)
        changed = [name for name, x in tensors.items() if x._version != versions[name]]
        if changed:
            raise ValueError(f"{self.name} must not change its rows in place, and has changed {changed}")
        if not isinstance(losses, Tensor):
            raise TypeError(f"{self.name} must return a tensor [n] of losses, got {type(losses).__name__}")
        if losses.shape != (len(rows),):
            raise ValueError(f"{self.name} must return one loss per row, [n] = {[len(rows)]}, got {list(losses.shape)}")
        if losses.dtype != rows.log_probs.dtype or losses.device != rows.log_probs.device:
            raise TypeError(
                f"{self.name} must return {rows.log_probs.dtype} on {rows.log_probs.device} as its rows are, got "
                f"{losses.dtype} on {losses.device}"
            )
        if torch.is_grad_enabled() and len(rows):
            self._check_graph(losses, leaves)
        return losses, None

    def judge(self, rows: ObjectiveRows, losses: Tensor, gradients: RowGradients) -> None:
        """Note where a loss or a gradient is NaN that its row is no reason for."""
        self._bad.append(rows.nan([losses.detach(), *gradients]))

    def _check_graph(self, losses: Tensor, tensors: Mapping[str, Tensor]) -> None:
        own = {id(x) for x in tensors.values()}
        leaves = list(_leaves(losses))
        for leaf in leaves:
            if id(leaf) not in own:
                raise ValueError(
                    f"{self.name} must not depend on a tensor of shape {list(leaf.shape)} that requires a gradient and "
                    "is none of its rows: fused_loss gives it none; detach it"
                )
        if not leaves:
            raise ValueError(
                f"the losses of {self.name} must carry gradient to one of rows.{', rows.'.join(STUDENT)}, and have none"
            )

    def check_values(self) -> None:
        """Raise ValueError where ``judge`` has noted a row: one host read."""
        bad = torch.cat(self._bad) if self._bad else None
        if bad is not None and (count := int(bad.sum())):
            raise ValueError(
                f"{self.name} is NaN, or its gradient is, for {count} of {len(bad)} rows, whose statistics are finite"
            )


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaves of a graph that require a gradient."""
    if output.grad_fn is None and output.requires_grad:
        yield output
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes.extend(next_node for next_node, _ in node.next_functions)
