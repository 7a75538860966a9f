"""What an objective sees: the statistics and inputs of n rows, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from srpo_kernels.losses.derived import Derivation
from srpo_kernels.losses.sequences import Sequences

# Of the student, with gradient, and of the teacher, without: what a row has to say.
STUDENT = ("log_probs", "entropy", "divergence", "logsumexp")
TEACHER = ("teacher_entropy", "teacher_log_probs")
# The student's over the whole vocabulary, where the others are over the tokens that a row was sampled from.
FULL = ("full_log_probs", "full_entropy", "full_logsumexp")
# What rows without a teacher have nothing to say of.
OF_TEACHER = frozenset({"divergence", *TEACHER})
# What a caller's objective reads.
PUBLIC = (*STUDENT, *FULL, *TEACHER)
# Those of the tokens that the models are compared at, ``[n, K]``, and of the rest; and of those that a row was sampled
# from, ``[n, S]``: what others are made of.
SUPPORT = ("support_log_probs", "log_tail")
TEACHER_SUPPORT = ("teacher_support_log_probs", "teacher_log_tail")
PER_TOKEN = ("support_log_probs", "teacher_support_log_probs", "sampled_log_probs")
DIFFERENTIABLE = (*STUDENT, *SUPPORT, "sampled_log_probs")
STATISTICS = (*STUDENT, *TEACHER, *SUPPORT, *TEACHER_SUPPORT, "sampled_log_probs")
# Where in its support a row's own token is: no input of a caller.
POSITION = "support_position"


class NotComputed(Exception):
    """An objective reads a statistic that this call has not computed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class ObjectiveRows:
    """n rows of a batch, in any order: their statistics and inputs as attributes, ``[n]`` each.

    ``log_probs``, ``entropy``, ``divergence`` and ``logsumexp``, of the transformed logits, carry gradient;
    ``teacher_entropy`` and ``teacher_log_probs`` do not; all in nats. In rows without a teacher its own and the
    divergence are 0; ``has_teacher`` ``[n]``, bool, says which have one. With ``support_ids`` all of the student's but
    the divergence are over the tokens that a row was sampled from; ``full_log_probs``, ``full_entropy`` and
    ``full_logsumexp`` are over the whole vocabulary, always.
    The inputs have the names that ``fused_loss`` was given them by. With ``whole_sequences`` all rows of a sequence are
    here, and ``sequences`` ``[n]`` int64 numbers them from 0 to ``num_sequences - 1``.
    """

    def __init__(
        self,
        statistics: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        sequences: Sequences | None,
        num_taught: int,
        *,
        active: bool = True,
    ) -> None:
        self._statistics, self._inputs, self._sequences = statistics, inputs, sequences
        self.num_taught, self.active = num_taught, active
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Tensor:
        if name in STATISTICS or name in FULL:
            self.read.add(name)
            if name in self._statistics:
                return self._statistics[name]
            if name in OF_TEACHER and not self.num_taught:
                return torch.zeros_like(self._statistics["log_probs"])
            raise NotComputed(name)
        if name in self._inputs:
            return self._inputs[name]
        raise AttributeError(
            f"rows have no {name!r}: they have the statistics {PUBLIC}, and as inputs {tuple(self._inputs)}"
        )

    def tensors(self) -> dict[str, Tensor]:
        """All statistics and inputs by name."""
        return {**self._statistics, **self._inputs}

    def finite(self) -> Tensor:
        """Which rows have finite statistics, ``[n]``, bool."""
        return torch.stack([_per_row(x.detach().isfinite()).all(1) for x in self._statistics.values()]).all(0)

    def nan(self, values: Iterable[Tensor | None]) -> Tensor:
        """Which rows have finite statistics and a NaN in one of these, ``[n]`` or ``[n, K]``; ``[n]``, bool."""
        return torch.stack([_per_row(x.isnan()).any(1) for x in values if x is not None]).any(0) & self.finite()

    def derived(self, derivation: Derivation, names: Iterable[str]) -> ObjectiveRows:
        """These rows as a caller sees them."""
        inputs = {name: x for name, x in self._inputs.items() if name != POSITION}
        statistics = derivation.derive(names, self._statistics, self.num_taught, self._inputs.get(POSITION))
        return ObjectiveRows(statistics, inputs, self._sequences, self.num_taught, active=self.active)

    def select_inputs(self, rows: slice) -> dict[str, Tensor]:
        """The inputs of some rows, by name."""
        return {name: values[rows] for name, values in self._inputs.items()}

    def __len__(self) -> int:
        return len(self._statistics["log_probs"])

    @property
    def has_teacher(self) -> Tensor:
        """Which rows have a teacher, ``[n]``, bool."""
        return torch.arange(len(self), device=self._statistics["log_probs"].device) < self.num_taught

    @property
    def sequences(self) -> Tensor:
        """The sequence of each row, ``[n]`` int64."""
        return self.whole_sequences.ids

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return self.whole_sequences.number

    @property
    def whole_sequences(self) -> Sequences:
        """The sequences, with their sums and means over all ranks that have rows of them."""
        if self._sequences is None:
            raise ValueError("an objective that reads sequences needs whole_sequences=True")
        return self._sequences

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Each row's value replaced by the sum over the rows of its sequence, on every rank that has some; ``[n]``."""
        return self.whole_sequences.sum(values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Each row's value replaced by the mean over the rows of its sequence, on every rank that has some; ``[n]``."""
        return self.whole_sequences.mean(values)


def _per_row(values: Tensor) -> Tensor:
    """``[n]`` or ``[n, K]`` as ``[n, K]``."""
    return values.view(len(values), -1) if len(values) else values.new_zeros(0, 1)


# Names that no input can have.
RESERVED = frozenset({*STATISTICS, *FULL, POSITION, "num_taught", "active", "read", *vars(ObjectiveRows)})
