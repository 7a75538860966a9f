"""A case of a check: one call of a public function, and its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import srpo_kernels_reference as reference
from srpo_kernels import Normalizers, SRPOConfig

Op = Literal["srpo_loss", "fused_loss", "token_stats", "teacher_stats"]
Inputs = dict[str, Any]

# What the options of token_stats and teacher_stats are called in a config.
TRANSFORM = ("temperature", "logit_scale", "softcap")
COMPARED = (
    "divergence", "alpha", "distillation_mode", "topk", "topk_of", "add_tail", "divergence_clip", "teacher_transform",
)  # fmt: skip

_MODEL_TENSORS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
_LEAVES = ("hidden", "weight", "bias")
# Logits of this standard deviation are a trained model's; larger ones would only test the rounding of fp32 logits.
_LOGIT_STD = 2.0
_LOG_PROB_NOISE = 0.3
# Of consecutive sequences, and again from the start: both branches, both signs, and one that moves no weight.
_ROUTED = (True, False, False, False, True, False)
_ADVANTAGES = (0.5, 0.9, -1.1, 0.0, -0.7, 0.4)
# Of packed sequences: any integers, not sorted.
_SEQUENCE_IDS = (7, -3, 2**40, 0, 11)


_DEFAULTS = SRPOConfig()


class Size(NamedTuple):
    """Sequences and their length, and the vocabulary's and the hidden states' width."""

    sequences: int
    length: int
    vocab_size: int
    hidden_size: int = 16


REALISTIC = Size(3, 4, 151_936, 1024)


@dataclass(frozen=True)
class Case:
    """One call of ``op``. ``chunked`` bounds the workspace to a few rows; ``edit`` changes the finished inputs.

    ``engine`` is an option of the statistics alone, and ``"tile"`` one of the triton backend.
    """

    op: Op
    group: str
    name: str
    size: Size
    config: SRPOConfig = _DEFAULTS
    packed: bool = False
    teacher_size: int | None = None
    chunked: bool = False
    engine: str = "auto"
    leaves: tuple[str, ...] = _LEAVES
    edit: Callable[[Inputs], Inputs] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of ``target_ids``."""
        return (self.size.sequences * self.size.length,) if self.packed else (self.size.sequences, self.size.length)

    @property
    def realistic(self) -> bool:
        """Whether its size is a current model's."""
        return self.size.vocab_size == REALISTIC.vocab_size

    @property
    def condition(self) -> float:
        """How much the rounding of a logit can grow on its way to the result."""
        # Weights are exponentials of dw_beta times an entropy; the sampled mode multiplies two log-probs.
        growth = 1.0 + 4.0 * self.config.dw_beta if self.op == "srpo_loss" else 1.0
        return growth * (2.0 * math.log(self.size.vocab_size) if self.config.distillation_mode == "sampled" else 1.0)

    def workspace_bytes(self, dtype: torch.dtype) -> int | None:
        """Two rows of everything that is a row long: both models' logits and five temporaries."""
        if not self.chunked:
            return None
        return 2 * 7 * (self.size.vocab_size + 16) * torch.promote_types(dtype, torch.float32).itemsize


def make_inputs(case: Case) -> Inputs:
    """The tensor arguments of a case, in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size, rows, width = case.size, case.rows, case.teacher_size or case.size.hidden_size
    scale = _LOGIT_STD / math.sqrt(size.hidden_size)
    hidden = normal(*rows, size.hidden_size) * scale
    mask = torch.rand(rows, generator=generator) < 0.8
    # No sequence is empty.
    mask.view(-1)[: size.sequences] = True
    mask.view(size.sequences, -1)[:, 0] = True
    own_head = case.teacher_size is not None
    inputs: Inputs = {
        "hidden": hidden,
        "weight": normal(size.vocab_size, size.hidden_size),
        "target_ids": torch.randint(0, size.vocab_size, rows, generator=generator),
        "bias": 0.5 * normal(size.vocab_size),
        "mask": mask,
        "teacher_hidden": normal(*rows, width) * scale if own_head else hidden + 0.5 * scale * normal(*rows, width),
        "teacher_weight": normal(size.vocab_size, width) if own_head else None,
        "teacher_bias": 0.5 * normal(size.vocab_size) if own_head else None,
    }
    if case.op in ("srpo_loss", "fused_loss"):
        inputs |= _loss_rows(case, inputs, normal)
    inputs = inputs if case.edit is None else case.edit(inputs)
    return _teacher_alone(inputs) if case.op == "teacher_stats" else inputs


def _loss_rows(case: Case, inputs: Inputs, normal: Callable[..., Tensor]) -> Inputs:
    """What a loss wants to know of each row; old and reference log-probs are near the student's."""
    student = {name: inputs[name] for name in ("hidden", "weight", "target_ids", "bias")}
    options = {name: getattr(case.config, name) for name in TRANSFORM}
    log_probs = reference.token_stats(**student, **options).log_probs
    sequences = torch.arange(case.rows[0]) % len(_SEQUENCE_IDS if case.packed else _ROUTED)
    return {
        "advantages": torch.tensor(_ADVANTAGES)[sequences],
        "sdpo_mask": torch.tensor(_ROUTED)[sequences],
        "old_log_probs": log_probs + _LOG_PROB_NOISE * normal(*case.rows),
        "ref_log_probs": log_probs + _LOG_PROB_NOISE * normal(*case.rows),
        "is_weights": 1.0 + 0.5 * normal(*case.rows).tanh(),
        "sequence_ids": torch.tensor(_SEQUENCE_IDS)[sequences] if case.packed else None,
    }


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The model's tensors in ``dtype``, what the caller says of each row in fp32 or, for fp64, in fp64."""
    row_dtype = torch.promote_types(dtype, torch.float32)

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [convert(name, x) for x in value]
        if isinstance(value, Normalizers):
            return Normalizers._make(None if x is None else convert(name, x) for x in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, Tensor) else value
        return value.to(device, dtype if name in _MODEL_TENSORS else row_dtype)

    return {name: convert(name, value) for name, value in inputs.items()}


def _teacher_alone(inputs: Inputs) -> Inputs:
    """The arguments of ``teacher_stats``: the teacher's head is the student's where it has none of its own."""
    own_head = inputs["teacher_weight"] is not None
    return {
        "teacher_hidden": inputs["teacher_hidden"],
        "teacher_weight": inputs["teacher_weight" if own_head else "weight"],
        "teacher_bias": inputs["teacher_bias" if own_head else "bias"],
        "mask": inputs["mask"],
    }


def without(*names: str) -> Callable[[Inputs], Inputs]:
    """An edit that leaves these out."""
    return lambda inputs: inputs | dict.fromkeys(names)


def poison(inputs: Inputs) -> Inputs:
    """Masked rows that would spoil everything if they were read."""
    masked = ~inputs["mask"]
    rows = [name for name in inputs if name in ("hidden", "teacher_hidden") or name.endswith(("_probs", "is_weights"))]
    spoilt = {name: inputs[name].clone() for name in rows}
    for values in spoilt.values():
        values[masked] = math.nan
    return inputs | spoilt | {"target_ids": inputs["target_ids"].masked_fill(masked, -100)}


def of_a_larger_batch(inputs: Inputs) -> Inputs:
    """Normalizers that are not this batch's."""
    # The counts of a batch of which this is about half, whose teacher's mean entropy is about 2 nats.
    counts = [torch.tensor(2 * inputs["mask"].numel()), torch.tensor(-2.0), torch.tensor(inputs["mask"].numel())]
    return inputs | {"normalizers": Normalizers(counts[0], counts[1], counts[2])}


def routed_teacher(inputs: Inputs) -> Inputs:
    """The teacher's states of routed sequences alone."""
    return inputs | {"teacher_hidden": inputs["teacher_hidden"][inputs["sdpo_mask"]]}


def given_topk(inputs: Inputs, k: int = 5) -> Inputs:
    """The teacher's likeliest tokens in the place of its hidden states, fewer of them in the first row."""
    own = inputs["teacher_weight"] is not None
    head = [inputs[name] for name in (("teacher_weight", "teacher_bias") if own else ("weight", "bias"))]
    logits = reference.logits.head_logits(inputs["teacher_hidden"], *head)
    log_probs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    ids.view(-1, ids.shape[-1])[0, 1:] = -1
    given = {"teacher_topk_ids": ids, "teacher_topk_log_probs": log_probs}
    return inputs | dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias")) | given


def support(inputs: Inputs, k: int = 6) -> Inputs:
    """Some tokens that rows were sampled from, the row's own among most of them, fewer in the first row."""
    targets, vocab_size = inputs["target_ids"], len(inputs["weight"])
    scores = torch.rand(*targets.shape, vocab_size, generator=torch.Generator().manual_seed(0))
    ids = scores.scatter(-1, targets[..., None], 0.9).topk(min(k, vocab_size), dim=-1).indices
    ids.view(-1, ids.shape[-1])[0, :-1] = -1
    return inputs | {"support_ids": ids}


def given_topk_and_support(inputs: Inputs) -> Inputs:
    """Both."""
    return support(given_topk(inputs))


def several_teachers(inputs: Inputs) -> Inputs:
    """Three heads, the second one the student's, for each token one."""
    other, ids = inputs["weight"].flip(0), torch.arange(inputs["mask"].numel()) % 3
    heads = {"teacher_weight": [other, None, -other], "teacher_bias": [inputs["bias"].flip(0), None, None]}
    return inputs | heads | {"teacher_head_ids": ids.view(inputs["mask"].shape)}


def per_token(inputs: Inputs) -> Inputs:
    """Routes and advantages for each token."""
    sequences, length = inputs["mask"].shape
    routed = (torch.arange(sequences * length) % 3 == 0).view(sequences, length)
    advantages = inputs["advantages"][:, None] * torch.linspace(-1.0, 1.0, length)
    return inputs | {"sdpo_mask": routed, "advantages": advantages}
