"""What a call of a public function hands to the engine: its tensors in the caller's shapes, and its options.

The fields are the arguments of an operator, in its schema's order: an operator takes no tuples.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.rows.spec import LogitTransform


class LossArguments(NamedTuple):
    """The tensors of a call of ``srpo_loss`` or ``fused_loss`` in its caller's shapes.

    ``teacher_mask`` says which rows have a teacher, in whose place its likeliest tokens may be given. Its heads are
    ``teacher_weights``, the student's own where there is none, with as many ``teacher_biases`` or none;
    ``teacher_head_ids`` says which one a row's is, the only one where it is None. ``support_ids`` are what rows were
    sampled from, in ``srpo_loss`` those without a teacher. Four are ``Normalizers``' fields, ``srpo_loss``'s alone;
    ``inputs`` are the objective's.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target_ids: Tensor
    mask: Tensor | None
    teacher_mask: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weights: list[Tensor]
    teacher_biases: list[Tensor]
    teacher_head_ids: Tensor | None
    teacher_topk_ids: Tensor | None
    teacher_topk_log_probs: Tensor | None
    support_ids: Tensor | None
    sequence_ids: Tensor | None
    token_count: Tensor | None
    dw_log_mean: Tensor | None
    sdpo_count: Tensor | None
    sequence_count: Tensor | None
    inputs: list[Tensor]


# Of the arguments, the fields of a batch's normalizers.
NORMALIZERS = ("token_count", "dw_log_mean", "sdpo_count", "sequence_count")


class LossOptions(NamedTuple):
    """The options of such a call; ``config`` is an ``SRPOConfig``, encoded, groups are names.

    ``objective`` is ``"srpo"``, the name of a policy loss, or a function, which no operator takes.
    ``input_names`` are those of ``inputs``.
    """

    objective: str | Callable[..., Tensor]
    input_names: list[str]
    config: str
    whole_sequences: bool
    backend: str
    workspace_bytes: int | None
    vocab_parallel_group: str | None = None
    sequence_parallel_group: str | None = None


class StatsArguments(NamedTuple):
    """The tensors of a call of ``token_stats`` in its caller's shapes; without ``target_ids`` no log-prob is wanted.

    A teacher's likeliest tokens may be in its place; ``support_ids`` are what rows were sampled from. The last two are
    each row's own of the options ``alpha`` and ``divergence_clip``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target_ids: Tensor | None
    mask: Tensor | None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_topk_ids: Tensor | None = None
    teacher_topk_log_probs: Tensor | None = None
    support_ids: Tensor | None = None
    own_alpha: Tensor | None = None
    own_clip: Tensor | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether it is known by its states, or by its likeliest tokens."""
        return self.teacher_hidden is not None or self.teacher_topk_ids is not None


class StatsOptions(NamedTuple):
    """The options of a call of ``token_stats``: fields of ``SRPOConfig``, and others; the group is a name.

    ``teacher_transform`` is the teacher's own temperature, logit scale and, if there is one, softcap.
    """

    divergence: str = "jsd"
    alpha: float = 0.5
    distillation_mode: str = "full"
    topk: int = 100
    topk_of: str = "student"
    add_tail: bool = True
    divergence_clip: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    teacher_transform: list[float] | None = None
    backend: str = "auto"
    engine: str = "auto"
    workspace_bytes: int | None = None
    vocab_parallel_group: str | None = None

    def config(self) -> SRPOConfig:
        """What they say of the logits and of what is compared."""
        options = dict(islice(self._asdict().items(), self._fields.index("backend")))
        if self.teacher_transform is not None:
            options["teacher_transform"] = LogitTransform(*self.teacher_transform)
        return SRPOConfig(**options)


def parse(arguments: tuple[Any, ...], *groups: Any) -> list[Any]:
    """The flat arguments of an operator as the named tuples that they were."""
    rest = iter(arguments)
    return [group._make(islice(rest, len(group._fields))) for group in groups]
