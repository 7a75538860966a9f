"""The options of every command, in a module that waits for no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from benchmarks import RESULTS, costs
from srpo_kernels.verify.kinds import (
    COMPARED,
    DEFAULT_ACTIVE,
    HEADS,
    PROVIDERS,
    DtypeName,
    HeadName,
    ProviderName,
    Workload,
)

Axis = Literal["rows", "vocabulary", "active"]
Branch = Literal["grpo", "sdpo"]
Loss = Literal["grpo", "own", "ratio-mask", "certainty", "topk-teacher", "support"]
Way = Literal["bare", "fused_loss", "token_stats", "srpo_loss", "naive", "naive-compiled"]

# What is published is replaced by those alone who name it.
_OWN = Path("runs/benchmarks")
_ROOT = RESULTS.parent.parent


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What all that measure have."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is a GPU where there is one."""
    threads: int | None = None
    """Threads of torch. Default: torch's choice."""
    resume: bool = False
    """Keep the cases that are in `out` already and measure the others."""


@dataclass(frozen=True, kw_only=True)
class Speed(Measured):
    """Time and extra peak memory of forward + backward to dX and dW, every provider beside the others.

    Providers take turns in one process, in an order that rotates, and must agree on loss and gradients before
    they are timed. Times are medians over rounds with their 20th and 80th percentiles; ratios to `bare`, the
    unavoidable matrix products on the same active rows, are taken within each round. Peak memory comes from a
    fresh process per provider and case.
    """

    heads: tuple[HeadName, ...] = ()
    """LM heads by the model they are of; `tiny` is for trying out. Default: the published list of cases,
    without a use for `workloads`, `dtypes`, `rows`, `softcap` and `active`."""
    workloads: tuple[Workload, ...] = ("policy", "jsd", "routed")
    """All rows policy, all rows distilled with one divergence, or a routed batch: 40 % of the sequences are distilled,
    30 % of the others have advantage 0, and there is padding."""
    dtypes: tuple[DtypeName, ...] = ("float32",)
    """Of hidden states and head."""
    rows: int | None = None
    """Positions of a batch, padding included, a multiple of 32; each head's own number if not given."""
    softcap: float | None = None
    """Bound of the logits."""
    active: float = DEFAULT_ACTIVE
    """Share of a routed batch's rows that can move a weight, at most 0.82; padding makes up the rest."""
    providers: tuple[ProviderName, ...] = PROVIDERS
    """What to compare."""
    rounds: int = 5
    """Times that every provider runs, at most."""
    budget: float = 45.0
    """Seconds of a case after which no round begins, but for the first three."""
    memory: bool = True
    """Measure peak memory too."""
    out: Path = _OWN / "speed.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class Memory(Measured):
    """Extra peak memory alone, for more rows than there is time to compare in `speed`.

    Every provider takes one step on every kind of batch, in a fresh process. One that refuses, or that is killed for
    want of memory, has that as its reason.
    """

    head: HeadName = "qwen3-0.6b"
    """LM head by the model it is of."""
    workloads: tuple[Workload, ...] = ("policy", "jsd", "routed")
    """Kinds of batches."""
    rows: int = 4_096
    """Positions of a batch, padding included, a multiple of 32."""
    dtype: DtypeName = "float32"
    """Of hidden states and head."""
    providers: tuple[ProviderName, ...] = COMPARED
    """What to compare."""
    out: Path = _OWN / "memory.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class Accuracy(Measured):
    """Error of loss, log-probs, dX and dW against the fp64 oracle in `reference/`, for every provider.

    The oracle gets the same inputs, rounded to the dtype, in fp64. Errors of loss and gradients are relative in the
    Euclidean norm, those of log-probs are the largest absolute one, in nats. A provider without weights for distilled
    tokens is held to the oracle without them.
    """

    head: HeadName = "smollm2-135m"
    """LM head by the model it is of."""
    workloads: tuple[Workload, ...] = ("policy", "jsd", "forward_kl", "reverse_kl", "routed")
    """Kinds of batches."""
    dtypes: tuple[DtypeName, ...] = get_args(DtypeName)
    """Of hidden states and head."""
    providers: tuple[ProviderName, ...] = COMPARED
    """What to compare."""
    rows: int = 256
    """Positions of a batch, padding included, a multiple of 32; the oracle holds all logits in fp64."""
    out: Path = _OWN / "accuracy.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class Scaling(Measured):
    """Time and memory of a routed batch as one thing about it grows, and the exponents of a power law through them."""

    head: HeadName = "smollm2-135m"
    """LM head by the model it is of."""
    axes: tuple[Axis, ...] = get_args(Axis)
    """What grows: rows, the vocabulary, or the share of rows that can move a weight."""
    providers: tuple[ProviderName, ...] = ("srpo_kernels", "naive", "trl")
    """What to compare."""
    # Each grows eightfold: from where what does not grow, reading W and writing dW, is small, to where a peer still
    # ends.
    rows: tuple[int, ...] = (1_024, 2_048, 4_096, 8_192)
    """Positions of a batch, padding included."""
    vocab_sizes: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    """Words of the head."""
    # The last is about the largest share that a routed batch can have: no padding.
    active: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    """Shares of active rows, at most 0.82."""
    fixed_rows: int = 4_096
    """Positions where something else grows."""
    rounds: int = 5
    """Times that every provider runs, at most."""
    budget: float = 30.0
    """Seconds of a case after which no round begins, but for the first."""
    memory: bool = True
    """Measure peak memory too."""
    out: Path = _OWN / "scaling.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True)
class Sizes:
    """A Llama of ``layers`` layers with SmolLM2-135M's head, and groups of ``group`` completions."""

    layers: int = 4
    """Layers of the model; 30 are SmolLM2-135M."""
    vocab: int = 49152
    """Words of the vocabulary."""
    hidden: int = 576
    """Size of the hidden states."""
    groups: int = 2
    """Prompts of the batch."""
    group: int = 4
    """Completions per prompt."""
    length: int = 128
    """Longest completion; they are from half to all of it."""


@dataclass(frozen=True, kw_only=True)
class Trainers(Measured):
    """Time and extra peak memory of a step of SRPOTrainer and of TRL's trainer.

    A step is what follows generation and scoring: the teacher, the student's forward, the loss and the backward; the
    optimizer is left out, which is the same for both. `grpo` is beside `GRPOTrainer`, `sdpo` beside `SDPOTrainer` with
    full logits; both sides take turns and must agree on the gradient of the head. Peak memory is of a fresh process on
    the CPU, of the allocator on a GPU.
    """

    branches: tuple[Branch, ...] = ("grpo", "sdpo")
    """What to compare."""
    silent: tuple[float, ...] = (0.0, 0.5)
    """Shares of groups without a correct completion, which move no weight; the others have one."""
    sizes: Sizes = Sizes()
    """Of the model and the batch."""
    dtype: DtypeName = "float32"
    """Of the model's weights."""
    rounds: int = 5
    """Times that every side runs."""
    memory: bool = True
    """Measure peak memory too."""
    out: Path = _OWN / "trainers.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class Objectives(Measured):
    """Time, extra peak memory and error of a loss that a user writes in ten lines, in every way to compute it.

    `grpo` is the clipped ratio; `own` is a ratio, a JSD and an entropy bonus at once, every row with a teacher;
    `ratio-mask` masks by the change of a probability; `certainty` adds forward KL to reverse KL by the teacher's
    entropy; `topk-teacher` has 100 tokens of a teacher in place of its hidden states; `support` is GRPO over the 64
    tokens that a row was sampled from, beside the products of the whole row. All are in fp32, forward and backward to
    dX and dW. Ways take turns, and must agree with the loss and the gradients of full logits in fp64 before they are
    timed.
    """

    heads: tuple[HeadName, ...] = tuple(name for name in HEADS if name != "tiny")
    """LM heads by the model they are of; `tiny` is for trying out."""
    losses: tuple[Loss, ...] = get_args(Loss)
    """What to compute."""
    rows: int | None = None
    """Positions of a batch, a multiple of 32; each head's own number if not given."""
    ways: tuple[Way, ...] = get_args(Way)
    """`bare` is the unavoidable matrix products; `srpo_loss` computes GRPO alone."""
    rounds: int = 5
    """Times that every way runs, at most."""
    budget: float = 45.0
    """Seconds of a case after which no round begins, but for the first three."""
    memory: bool = True
    """Measure peak memory too."""
    out: Path = _OWN / "objectives.csv"
    """CSV file to write; without `resume` one that is there is replaced."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one step that no hardware changes: products, memory traffic, launches and workspace.

    Kernels run in Triton's interpreter, on the CPU, on small batches; costs are per row and vocabulary element.
    """

    cases: tuple[costs.CaseName, ...] = costs.CASES
    """Kinds of rows: GRPO's clipped ratio, or one of the divergences."""
    providers: tuple[costs.ProviderName, ...] = costs.PROVIDERS
    """What to measure; `srpo_kernels-bf16` is with a model in bf16, all others with one in fp32."""
    csv: Path | None = None
    """File to write, a line per number."""
    docs: Path | None = None
    """Markdown file whose tables to replace, between `<!-- cost:traffic -->` and `<!-- /cost:traffic -->`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the pictures and write the tables of `docs/benchmarks.md` and `docs/gpu.md` from the results."""

    results: Path = RESULTS
    """Folder with speed.csv, accuracy.csv and scaling.csv; where memory.csv, trainers.csv or objectives.csv is not
    there, the command that writes it takes the place of its table. Reports of devices that
    `python -m srpo_kernels.verify --report` wrote are gpu.json and small.json."""
    docs: Path = _ROOT / "docs"
    """Folder with benchmarks.md, which takes every table between its markers, and gpu.md, which takes both reports of
    devices; the pictures go to its folder `figures`."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What vocabulary parallelism costs and saves on 8, 64 and 1,024 GPUs, on paper."""

    docs: Path | None = None
    """Markdown file whose table to replace, between `<!-- wire:layouts -->` and `<!-- /wire:layouts -->`."""
