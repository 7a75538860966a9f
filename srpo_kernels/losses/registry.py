"""Policy losses by name: what ``SRPOConfig`` can choose, with the options of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from srpo_kernels.losses.log_ratio import bounded
from srpo_kernels.losses.sequences import Sequences


class PolicyRows(NamedTuple):
    """What a policy loss sees of n rows, ``[n]`` each, in fp32 (fp64 for fp64 inputs).

    ``log_probs`` and ``log_ratio = log_probs - old_log_probs`` carry gradient; the latter is bounded by
    ``log_ratio_clamp``, so that its exponential is finite. ``old_log_probs``, the current ones where none were given,
    and ``advantages`` do not. ``sequences`` is None where the loss is not of whole sequences.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    sequences: Sequences | None

    @classmethod
    def of(
        cls,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        sequences: Sequences | None,
        clamp: float | None,
    ) -> PolicyRows:
        """With the log-ratio bounded by ``clamp``; ``old_log_probs`` None: the current ones."""
        old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
        return cls(log_probs, old_log_probs, bounded(log_probs - old_log_probs, clamp), advantages, sequences)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Each row's value replaced by the sum over its sequence, on all ranks that have rows of it."""
        return self._whole().sum(values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Each row's value replaced by the mean over its sequence, on all ranks that have rows of it."""
        return self._whole().mean(values)

    def sequence_lengths(self) -> Tensor:
        """The number of rows of each row's sequence, ``[n]``."""
        return self._whole().lengths(self.advantages)

    def _whole(self) -> Sequences:
        if self.sequences is None:
            raise ValueError("a policy loss that reads sequences must be registered with whole_sequences=True")
        return self.sequences


class TokenLoss(NamedTuple):
    """A policy loss ``[n]``, and where its clips hold it: bool ``[n]``, None where it has no such clip."""

    loss: Tensor
    clip_low: Tensor | None = None
    clip_high: Tensor | None = None
    dual_clip: Tensor | None = None


PolicyFunction = Callable[..., Tensor | TokenLoss]
# What an option must be, in words, and as a test of it.
Range = tuple[str, Callable[[float], bool]]


@dataclass(frozen=True)
class PolicyLoss:
    """A registered policy loss. ``fields`` are the fields of ``SRPOConfig`` that it reads, ``options`` its own."""

    name: str
    function: PolicyFunction
    fields: tuple[str, ...]
    options: Mapping[str, float]
    ranges: Mapping[str, Range]
    whole_sequences: bool
    whole_batch: bool
    zero_without_advantage: bool

    def __call__(self, rows: PolicyRows, options: Mapping[str, Any]) -> TokenLoss:
        """The loss of ``rows`` with these values of ``fields`` and ``options``."""
        result = self.function(rows, **options)
        loss = result if isinstance(result, TokenLoss) else TokenLoss(result)
        if not isinstance(loss.loss, Tensor) or loss.loss.shape != rows.log_probs.shape:
            got = list(loss.loss.shape) if isinstance(loss.loss, Tensor) else type(loss.loss).__name__
            raise ValueError(
                f"the policy loss {self.name!r} must return one loss per row, {list(rows.log_probs.shape)}, got {got}"
            )
        return loss


# By name; `register_policy_loss` alone adds to it.
POLICY_LOSSES: dict[str, PolicyLoss] = {}
# The fields of SRPOConfig that a policy loss may read.
POLICY_FIELDS = ("epsilon_low", "epsilon_high", "delta", "dual_clip")


def policy_loss_of(name: str) -> PolicyLoss:
    """The policy loss of a name. Raises ValueError for one that is not registered in this process."""
    if name not in POLICY_LOSSES:
        raise ValueError(f"loss_type must be one of {tuple(POLICY_LOSSES)}, got {name!r}")
    return POLICY_LOSSES[name]


def register_policy_loss(
    name: str,
    function: PolicyFunction,
    *,
    ranges: Mapping[str, Range] | None = None,
    whole_sequences: bool = False,
    whole_batch: bool = False,
    zero_without_advantage: bool = False,
) -> None:
    """Make ``function`` a policy loss: ``SRPOConfig(loss_type=name)`` chooses it, in every function and trainer.

    ``function(rows, *, option, ...)`` takes ``PolicyRows`` and returns the token losses ``[n]``, to be minimised, or a
    ``TokenLoss`` that says where its clips hold them, too. autograd differentiates it. A keyword-only parameter
    without a default is a field of ``SRPOConfig``, as ``epsilon_low`` is; one with a default, a number, is an option
    of its own, which ``SRPOConfig(loss_options={...})`` sets. A row's loss may depend on other rows of its sequence
    with ``whole_sequences``, and on all rows of the call with ``whole_batch``.

    Args:
        name: what ``loss_type`` will be.
        function: the loss. It must not change its arguments in place.
        ranges: what an option must be, as in ``{"tau": ("> 0", lambda tau: tau > 0)}``. None: any finite number.
        whole_sequences: every call sees all policy rows of a sequence together, and ``rows.sequences``.
        whole_batch: every call sees all policy rows of the batch together. Rows that do not fit a chunk then cost one
            matmul more.
        zero_without_advantage: the loss is 0, and so is its gradient, wherever the advantage is 0: such rows are then
            left out, with ``whole_sequences`` those of sequences that have no other.

    Raises:
        TypeError: a name that is no string, no function, or a parameter that is neither a field nor a number.
        ValueError: a name that is taken, or an empty one; ``whole_batch`` with ``whole_sequences`` or
            ``zero_without_advantage``, which leaves rows out.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not name or name in POLICY_LOSSES:
        raise ValueError(f"name must be a new one, not empty and none of {tuple(POLICY_LOSSES)}, got {name!r}")
    if not callable(function):
        raise TypeError(f"function must be callable, got {function!r}")
    if whole_batch and (whole_sequences or zero_without_advantage):
        raise ValueError("whole_batch must be without whole_sequences and zero_without_advantage, which leave rows out")
    fields, options = _parameters(name, function)
    unknown = sorted(set(ranges or ()) - set(options))
    if unknown:
        raise ValueError(f"ranges must be of the options {tuple(options)}, got {unknown}")
    POLICY_LOSSES[name] = PolicyLoss(
        name, function, fields, options, dict(ranges or {}), whole_sequences, whole_batch, zero_without_advantage
    )


def _parameters(name: str, function: PolicyFunction) -> tuple[tuple[str, ...], dict[str, float]]:
    """The fields of the config and the options that a policy loss reads."""
    fields: list[str] = []
    options: dict[str, float] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = parameter.default
        if default is inspect.Parameter.empty:
            if key not in POLICY_FIELDS:
                raise TypeError(
                    f"the policy loss {name!r} has a parameter {key!r}, which must be one of SRPOConfig's "
                    f"{POLICY_FIELDS} or have a default"
                )
            fields.append(key)
        elif isinstance(default, bool) or not isinstance(default, (int, float)):
            raise TypeError(f"the default of {key!r} of the policy loss {name!r} must be a number, got {default!r}")
        else:
            options[key] = float(default)
    return tuple(fields), options
