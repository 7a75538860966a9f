"""Teachers: another model, the model itself, or the moving average of its trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from srpo_kernels.integrations.transformers.hidden import call_with_hidden, evaluating, outermost
from srpo_kernels.integrations.transformers.shards import (
    Place,
    from_parts,
    has_parts,
    is_part,
    own_part,
    parameters_of,
    release,
    swapped_parameters,
    to_part,
    whole_shape,
)

T = TypeVar("T")


class _Average(NamedTuple):
    """A trained parameter, all of its places, and the average of this rank's part of it."""

    parameter: Any
    places: list[Place]
    value: Tensor

    def whole(self, like: Tensor | None = None) -> Tensor:
        """The average of the whole parameter, in fp32 or wider; see ``from_parts``."""
        return from_parts(self.parameter, self.value, like)


class AverageTeacher:
    """A model with averaged parameters: ``average += rate * (parameter - average)`` at each ``update``.

    Only parameters that are trained have an average, so that LoRA pays for its adapters alone; it is kept in fp32 or
    wider, where small steps are not rounded away. There is no second model: a call swaps the averages in. Of parameters
    that FSDP1, ``fully_shard``, DeepSpeed's ZeRO-3 or tensor parallelism has sharded, a rank averages its shards; calls
    are then those of every rank.

    ``state_dict`` and ``load_state_dict`` are what a checkpoint needs, and what accelerate's
    ``register_for_checkpointing(teacher)`` calls.

    Args:
        model: the trained model, bare, of PEFT, in DDP, in FSDP1, after ``fully_shard``, or in DeepSpeed's engine.
        rate: in [0, 1]. 0 is a frozen teacher, the model as it is now.

    Raises:
        TypeError: no model of transformers, or a rate that is no number.
        ValueError: a rate out of its range, a model without a trained parameter.
    """

    def __init__(self, model: nn.Module, rate: float = 0.05) -> None:
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"rate must be a number, got {type(rate).__name__}")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be in [0, 1], got {rate!r}")
        # The averages are the same on every rank of DDP, whose hooks a teacher does not need.
        self.model: Any = outermost(model)
        self.rate = float(rate)
        release(self.model)
        places: dict[Any, list[Place]] = {}
        self._averages: dict[str, _Average] = {}
        for name, place, parameter in parameters_of(self.model):
            if not parameter.requires_grad:
                continue
            if parameter not in places:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                value = own_part(parameter).to(wide, copy=True)
                self._averages[name] = _Average(parameter, places.setdefault(parameter, []), value)
            places[parameter].append(place)
        if not self._averages:
            raise ValueError("model must have a parameter that is trained, for an average of it, got none")

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the model: after ``optimizer.step()``."""
        for average in self._averages.values():
            average.value.lerp_(own_part(average.parameter).to(average.value), self.rate)

    @contextmanager
    def applied(self, module: nn.Module | None = None, like: Tensor | None = None) -> Iterator[None]:
        """The model, or ``module`` of it alone, has the averages for its parameters, without gradient.

        Shards are exchanged in place, and gathered again; those of ``module`` are gathered, but for what tensor
        parallelism has in the shards of ``like``.
        """
        within = None if module is None else set(module.modules())
        swapped, exchanged = [], []
        for average in self._averages.values():
            places = [place for place in average.places if within is None or place[0] in within]
            if within is None and is_part(average.parameter):
                exchanged.append((average, own_part(average.parameter).clone()))
            elif places:
                value = average.whole(like).to(average.parameter.dtype)
                swapped += [(place, value) for place in places]
        with swapped_parameters(swapped):
            try:
                with torch.no_grad():
                    for average, _ in exchanged:
                        own_part(average.parameter).copy_(average.value)
                if exchanged:
                    release(self.model)
                yield
            finally:
                with torch.no_grad():
                    for average, kept in exchanged:
                        own_part(average.parameter).copy_(kept)
                if exchanged:
                    release(self.model)

    def call_with_hidden(self, function: Callable[[Tensor, nn.Module], T], **inputs: Any) -> T:
        """``call_with_hidden`` of the model with the averages, without gradient and dropout."""
        with self.applied(), evaluating(self.model):
            return call_with_hidden(self.model, function, **inputs)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each trained parameter, whole, by its name in the model without wrappers."""
        return {name: average.whole() for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages of another ``state_dict``. Raises ValueError for those of other parameters."""
        if state.keys() != self._averages.keys():
            missing, unknown = self._averages.keys() - state.keys(), state.keys() - self._averages.keys()
            raise ValueError(
                f"state must hold the averages of the trained parameters: missing are {sorted(missing)[:3]}, unknown "
                f"{sorted(unknown)[:3]}"
            )
        for name, average in self._averages.items():
            like, value = average.parameter, state[name]
            if value.shape != whole_shape(like):
                raise ValueError(f"state[{name!r}] must have shape {list(whole_shape(like))}, got {list(value.shape)}")
            average.value.copy_(to_part(like, value.to(average.value)))


def is_sharded(teacher: nn.Module | AverageTeacher) -> bool:
    """Whether every rank has to make the calls of a teacher."""
    model = teacher.model if isinstance(teacher, AverageTeacher) else teacher
    return has_parts(model)
