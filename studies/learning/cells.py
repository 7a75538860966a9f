"""The cells of "When does SRPO pay?", in the order in which they are run: `questions.md` says why these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

from studies.learning.options import Method, Recipe
from studies.learning.tasks import Family

# Of the choice of learning rates; a comparison has the seeds from 0 on.
CHOICE_SEEDS = (100,)
SEEDS = 10
RECIPE = Recipe(steps=120, prompts=8, evaluate_every=6, evaluation_problems=128, evaluation_replies=1)
STARTS = (0.1, 0.3, 0.6)


@dataclass(frozen=True)
class Cell:
    """What methods are compared in: a task, the first model, and the learning rates to choose from."""

    family: Family
    start: float
    """Held-out accuracy of the first model: of ``STARTS`` where supervised training has stopped there."""
    lrs: tuple[float, ...]
    noise: bool = True
    """The first model is one that was taught further, and lost the rest to noise on its weights."""
    group_size: int = RECIPE.group_size
    """Replies per problem; a step has as many replies with any."""

    @property
    def first_model(self) -> str:
        """The task and the start in percent: ``chain-20~10`` with noise, ``chain-20@10`` where training stopped."""
        return f"{self.family}{'~' if self.noise else '@'}{100 * self.start:.0f}"

    @property
    def name(self) -> str:
        """The first model; the size of groups where it is not the usual one, the rate where all methods have one:
        ``chain-20~10g4``, ``chain-20~10r0.0002``.
        """
        groups = f"g{self.group_size}" if self.group_size != RECIPE.group_size else ""
        return self.first_model + groups + (f"r{self.lrs[0]:g}" if len(self.lrs) == 1 else "")

    def recipe(self, lr: float) -> Recipe:
        """That of its runs."""
        replies = RECIPE.prompts * RECIPE.group_size
        return replace(RECIPE, lr=lr, group_size=self.group_size, prompts=replies // self.group_size)


KEY = ("cell", "method", "seed", "lr")
Key = tuple[str, str, int, float | None]


class Setting(Protocol):
    """What a cell is called, and the learning rates to choose from."""

    @property
    def name(self) -> str: ...

    @property
    def lrs(self) -> tuple[float, ...]: ...


SettingT = TypeVar("SettingT", bound=Setting)


class Stage(NamedTuple, Generic[SettingT]):
    """Methods to compare in a cell."""

    cell: SettingT
    methods: tuple[Method, ...]


class Run(NamedTuple, Generic[SettingT]):
    """One run; ``lr`` None is the one that the method's choice has shown to be best in this cell."""

    cell: SettingT
    method: Method
    seed: int
    lr: float | None

    @property
    def key(self) -> Key:
        """What tells it from all others in the CSV file."""
        return self.cell.name, self.method, self.seed, self.lr


_MAIN: tuple[Method, ...] = ("grpo", "srpo", "sdpo")
_ABLATIONS: tuple[Method, ...] = ("srpo-unweighted", "mixing")


def _cell(family: Family, start: float, group_size: int = RECIPE.group_size) -> Cell:
    """Short replies bear a higher rate."""
    least = 1e-4 if family in ("chain-6", "sort-4") else 5e-5
    return Cell(family, start, tuple(least * factor for factor in (1, 2, 4, 8, 16)), group_size=group_size)


PLAN = (
    Stage(_cell("chain-6", 0.1), _MAIN),
    Stage(_cell("chain-20", 0.1), _MAIN),
    Stage(_cell("chain-6", 0.5), _MAIN),
    Stage(_cell("chain-20", 0.5), _MAIN),
    Stage(_cell("sort-8", 0.1), _MAIN),
    Stage(_cell("chain-20", 0.1), _ABLATIONS),
    Stage(_cell("chain-12", 0.1), _MAIN),
    Stage(Cell("chain-6", 0.1, (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3), noise=False), _MAIN),
    Stage(_cell("sort-4", 0.1), _MAIN),
    Stage(_cell("chain-20", 0.3), _MAIN),
    Stage(_cell("sort-8", 0.5), _MAIN),
    Stage(Cell("chain-20", 0.1, (2e-4,)), ("grpo", "srpo")),
    Stage(_cell("chain-20", 0.1, group_size=4), ("grpo", "srpo")),
    Stage(_cell("chain-20", 0.1, group_size=16), ("grpo", "srpo")),
)


def choice_runs(stage: Stage[SettingT]) -> list[Run[SettingT]]:
    """Every learning rate on the seeds of the choice."""
    return [
        Run(stage.cell, method, seed, lr) for seed in CHOICE_SEEDS for lr in stage.cell.lrs for method in stage.methods
    ]


def comparison_runs(stage: Stage[SettingT], seeds: int = SEEDS) -> list[Run[SettingT]]:
    """The paired seeds, each for every method before the next."""
    return [Run(stage.cell, method, seed, None) for seed in range(seeds) for method in stage.methods]
