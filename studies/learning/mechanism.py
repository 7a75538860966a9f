"""Where a failed reply of a chain goes wrong: what teacher and student hold there, and where each gradient acts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import srpo_kernels as sk
from examples.rollouts import response_hidden
from studies.learning.base import make_tokenizer
from studies.learning.policy_optimization import Batch, collect, forwarded
from studies.learning.sampling import sample
from studies.learning.tasks import Family, Problem, draw, with_solution

STEPS = (0, 24, 72, 120)
PROBED_SEEDS = 5
_PROBLEMS, _GROUP_SIZE = 12, 8
# Every fourth character of a chain's reply is a running total; two before it is the digit that it adds.
_PERIOD, _ADDED = 4, 2


class Probe:
    """What ``run`` calls with both models; ``rows`` has a line per step, place in the failed replies and kind of token.

    Places: ``before`` the first wrong token, ``at`` it and ``after`` it, and ``reply`` for what is one number for all.
    Kinds: the digits of the question, ``copied``, and the running ``total``. A chain has one correct reply, so the
    shown sibling's token is the right one of the question; the consistent total adds the digit before it, as the
    student has written it, to the student's last total.
    """

    def __init__(self, family: Family, seed: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._family, self._seed = family, seed

    def __call__(self, step: int, model: Any, teacher: Any) -> None:
        if step not in STEPS:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            self.rows += [{"step": step} | row for row in _probe(self._family, self._seed, model, teacher)]


def _probe(family: Family, seed: int, model: Any, teacher: Any) -> list[dict[str, Any]]:
    source, tokenizer = random.Random(f"probe {seed}"), make_tokenizer()
    problems = [draw(family, source, held_out=False) for _ in range(_PROBLEMS)]
    batch = collect(model, teacher, tokenizer, "srpo", problems, _GROUP_SIZE)
    whole = {
        "place": "reply",
        "student_accuracy": batch.rewards.mean().item(),
        "teacher_accuracy": _shown_accuracy(teacher, tokenizer, problems),
        "distilled": batch.sdpo_mask.float().mean().item(),
    }
    if not batch.sdpo_mask.any():
        return [whole]
    places = first_error(batch, problems, tokenizer)
    rows = _tokens(batch, places, model, teacher)
    return [*rows, whole | _cosines(batch, places, problems, tokenizer, model, teacher)]


def _shown_accuracy(teacher: Any, tokenizer: Any, problems: list[Problem]) -> float:
    source = random.Random(0)
    questions = [with_solution(problem.question, problem.solve(source)) for problem in problems]
    longest = len(problems[0].solve(source)) + 1
    replies = sample(teacher, tokenizer, questions, _GROUP_SIZE, longest).replies
    correct = [problems[index // _GROUP_SIZE].correct(reply) for index, reply in enumerate(replies)]
    return sum(correct) / len(correct)


def first_error(batch: Batch, problems: list[Problem], tokenizer: Any) -> dict[str, Tensor]:
    """Masks ``[B, T]`` of the distilled tokens before the first wrong one of each reply, at it and after it."""
    right = right_ids(problems, tokenizer, batch.rollouts.response_ids.shape[1])
    wrong = batch.rollouts.response_ids != right
    distilled = batch.rollouts.mask & batch.sdpo_mask[:, None]
    passed = (wrong & batch.rollouts.mask).cumsum(1).clamp(max=1)
    first = passed.diff(dim=1, prepend=torch.zeros_like(passed[:, :1])) == 1
    return {
        "before": distilled & (passed == 0),
        "at": distilled & first,
        "after": distilled & (passed == 1) & ~first,
    }


def right_ids(problems: list[Problem], tokenizer: Any, width: int) -> Tensor:
    """The correct reply of every rollout's problem, ``[B, T]``, its end included and repeated."""
    source = random.Random(0)
    ids = [tokenizer(problem.solve(source)).input_ids for problem in problems]
    padded = torch.full((len(problems), max(width, len(ids[0]) + 1)), tokenizer.eos_token_id)
    padded[:, : len(ids[0])] = torch.tensor(ids)
    return padded[:, :width].repeat_interleave(_GROUP_SIZE, 0)


def consistent_ids(response_ids: Tensor, tokenizer: Any) -> Tensor:
    """For each running total the one that follows from the total before it and the digit as written, else -1."""
    digits = torch.full((len(tokenizer),), -1)
    digits[torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))] = torch.arange(10)
    written = digits[response_ids]
    result = torch.full_like(response_ids, -1)
    totals = torch.arange(_PERIOD, response_ids.shape[1], _PERIOD)
    before, added = written[:, totals - _PERIOD], written[:, totals - _ADDED]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    result[:, totals] = torch.where((before >= 0) & (added >= 0), ids[(before + added) % 10], -1)
    return result


def _tokens(batch: Batch, places: dict[str, Tensor], model: Any, teacher: Any) -> list[dict[str, Any]]:
    tokenizer, rollouts = make_tokenizer(), batch.rollouts
    with torch.no_grad():
        student_logits = model.lm_head(response_hidden(model, *forwarded(rollouts)[:4]))
        teacher_logits = teacher.lm_head(batch.teacher_hidden)
    shown = rollouts.response_ids[batch.teacher_index.clamp(min=0)]
    consistent = consistent_ids(rollouts.response_ids, tokenizer)
    column = torch.arange(rollouts.response_ids.shape[1]) % _PERIOD
    kinds = {"copied": (column == _ADDED).expand_as(consistent), "total": consistent >= 0}
    stats = sk.token_stats(
        student_logits,
        torch.eye(student_logits.shape[-1]),
        rollouts.response_ids,
        mask=rollouts.mask & batch.sdpo_mask[:, None],
        teacher_hidden=teacher_logits,
        config=sk.SRPOConfig(),
    )
    student, teach = student_logits.softmax(-1), teacher_logits.softmax(-1)
    distillation = _logit_gradient(student_logits, batch, teacher_logits)
    policy = _logit_gradient(student_logits, batch, None)
    assert stats.divergence is not None and stats.teacher_entropy is not None
    columns = {
        "student_shown": _at(student, shown),
        "teacher_shown": _at(teach, shown),
        "student_consistent": _at(student, consistent),
        "teacher_consistent": _at(teach, consistent),
        "divergence": stats.divergence,
        "student_entropy": stats.entropy,
        "teacher_entropy": stats.teacher_entropy,
        "gradient_srpo": distillation,
        "gradient_grpo": policy,
    }
    rows = []
    for place, mask in places.items():
        for kind, of_kind in kinds.items():
            chosen = mask & of_kind
            if chosen.any():
                means = {name: values[chosen].mean().item() for name, values in columns.items()}
                rows.append({"place": place, "kind": kind, "tokens": int(chosen.sum()), **means})
    return rows


def _at(probabilities: Tensor, ids: Tensor) -> Tensor:
    """The probability of each row's id, of some id where it is -1."""
    return probabilities.gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1)


def _logit_gradient(logits: Tensor, batch: Batch, teacher_logits: Tensor | None) -> Tensor:
    """Norm of the loss's gradient at each token's logits, times the tokens of the batch: distilled, or GRPO's."""
    hidden, head = logits.clone().requires_grad_(), torch.eye(logits.shape[-1])
    _loss(hidden, head, batch, teacher_logits, head, batch.rollouts.mask).backward()
    assert hidden.grad is not None
    norm: Tensor = hidden.grad.norm(dim=-1)
    return norm * batch.rollouts.mask.sum()


def _loss(
    hidden: Tensor, head: Tensor, batch: Batch, teacher_hidden: Tensor | None, teacher_head: Tensor, mask: Tensor
) -> Tensor:
    """SRPO's distillation of the masked tokens, or GRPO's loss of them without a teacher."""
    rollouts, config = batch.rollouts, sk.SRPOConfig()
    distilled = None if teacher_hidden is None else batch.sdpo_mask
    entropy = None
    if teacher_hidden is not None:
        valid = rollouts.mask & batch.sdpo_mask[:, None]
        entropy = sk.teacher_stats(teacher_hidden, teacher_head, mask=valid, config=config).entropy
    normalizers = sk.Normalizers.from_batch(rollouts.mask, distilled, entropy, config=config)
    return sk.srpo_loss(
        hidden,
        head,
        rollouts.response_ids,
        advantages=batch.advantages if teacher_hidden is None else torch.zeros_like(batch.advantages),
        mask=mask,
        sdpo_mask=distilled,
        teacher_hidden=teacher_hidden,
        teacher_weight=None if teacher_hidden is None else teacher_head,
        normalizers=normalizers,
        config=config,
    ).loss


def _cosines(
    batch: Batch, places: dict[str, Tensor], problems: list[Problem], tokenizer: Any, model: Any, teacher: Any
) -> dict[str, float]:
    """Of the gradients of all weights: distillation of the failed replies, whole and by place, and GRPO's of all,
    with the gradient of the supervised loss on the right replies to the same questions."""
    rollouts = batch.rollouts
    longest = len(problems[0].solve(random.Random(0))) + 1
    right = right_ids(problems, tokenizer, longest)[batch.sdpo_mask]

    def supervised() -> Tensor:
        prompt_ids, prompt_mask = rollouts.prompt_ids[batch.sdpo_mask], rollouts.prompt_mask[batch.sdpo_mask]
        hidden = response_hidden(model, prompt_ids, prompt_mask, right, torch.ones_like(right, dtype=torch.bool))
        logits = model.lm_head(hidden)
        return cross_entropy(logits.flatten(0, 1), right.flatten())

    def loss(mask: Tensor, *, distils: bool) -> Tensor:
        hidden = response_hidden(model, *forwarded(rollouts)[:4])
        shown = batch.teacher_hidden if distils else None
        return _loss(hidden, model.lm_head.weight, batch, shown, teacher.lm_head.weight, mask)

    target = _gradient(model, supervised)
    parts = {"distillation": _gradient(model, lambda: loss(rollouts.mask, distils=True))}
    for place, mask in places.items():
        parts[f"distillation_{place}"] = _gradient(model, lambda mask=mask: loss(mask, distils=True))  # type: ignore[misc]
    parts["grpo"] = _gradient(model, lambda: loss(rollouts.mask, distils=False))
    cosines = {f"cosine_{name}": torch.cosine_similarity(part, target, 0).item() for name, part in parts.items()}
    return cosines | {f"norm_{name}": part.norm().item() for name, part in parts.items()}


def _gradient(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])
