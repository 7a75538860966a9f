"""One run of reinforcement learning: a method, a seed, a fixed number of steps."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import srpo_kernels as sk
from examples.rollouts import Rollouts, reprompted_hidden, response_hidden
from studies.learning.base import accuracy, held_out_problems, make_tokenizer
from studies.learning.options import Method, Recipe
from studies.learning.sampling import sample
from studies.learning.tasks import Family, Problem, draw, max_reply, with_solution

# Of GRPO's loss in the mixing of advantages; the rest is SDPO's.
MIXING = 0.9
MEANINGS: dict[Method, str] = {
    "grpo": "the clipped-ratio loss on every rollout",
    "sdpo": "distillation of every rollout that has a correct sibling",
    "srpo": "distillation of the failed ones of these, the clipped-ratio loss on all others",
    "srpo-unweighted": "srpo without entropy-aware weights (`dw_beta=0`)",
    "mixing": f"no routing: {MIXING:g} × grpo + {1 - MIXING:.1g} × sdpo on every rollout",
}


@dataclass(frozen=True)
class Batch:
    """The rollouts of a step with their routing: arguments of ``srpo_loss``, ``[B, ...]`` each."""

    rollouts: Rollouts
    rewards: Tensor
    advantages: Tensor
    sdpo_mask: Tensor
    teacher_index: Tensor
    """The correct sibling whose reply the teacher sees, -1 for none."""
    teacher_hidden: Tensor


def run(
    base: Any,
    method: Method,
    seed: int,
    families: tuple[Family, ...],
    recipe: Recipe,
    watch: Callable[[int, Any, Any], None] = lambda step, model, teacher: None,
) -> Iterator[dict[str, float]]:
    """Train a copy of ``base``; after every ``evaluate_every`` steps, and before the first, what was seen.

    ``watch`` gets the step and both models at the same times, but for the first.

    A row has ``step``, ``train_seconds`` (of the processor, since the start and without evaluations), ``accuracy``
    (avg@k on held-out problems, also of each family), and means over the steps since the last row.
    """
    model, teacher = copy.deepcopy(base).eval(), copy.deepcopy(base).eval()
    tokenizer, source = make_tokenizer(), random.Random(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    problems = held_out_problems(families, recipe.evaluation_problems)
    seconds, seen = 0.0, []
    yield {"step": 0, "train_seconds": 0.0, **_evaluate(model, tokenizer, problems, families, recipe, seed)}
    for step in range(1, recipe.steps + 1):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / 10)
        seen.append(_step(model, teacher, tokenizer, optimizer, method, source, families, recipe))
        seconds += time.process_time() - start
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            evaluation = _evaluate(model, tokenizer, problems, families, recipe, seed + step)
            watch(step, model, teacher)
            yield {"step": step, "train_seconds": seconds, **evaluation, **_means(seen)}
            seen = []


def _evaluate(
    model: Any, tokenizer: Any, problems: list[Problem], families: tuple[Family, ...], recipe: Recipe, seed: int
) -> dict[str, float]:
    """Without a trace in the run's own random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shares = accuracy(model, tokenizer, problems, recipe.evaluation_replies)
    result = {"accuracy": sum(shares) / len(shares)}
    for family in families:
        own = [share for share, problem in zip(shares, problems, strict=True) if problem.family == family]
        result[f"accuracy_{family}"] = sum(own) / len(own)
    return result


def _step(
    model: Any,
    teacher: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    method: Method,
    source: random.Random,
    families: tuple[Family, ...],
    recipe: Recipe,
) -> dict[str, float]:
    problems = [draw(families[i % len(families)], source, held_out=False) for i in range(recipe.prompts)]
    batch = collect(model, teacher, tokenizer, method, problems, recipe.group_size)
    return {
        "reward": batch.rewards.mean().item(),
        "reply_length": batch.rollouts.mask.sum(1).float().mean().item(),
        "sdpo_rollouts": batch.sdpo_mask.float().mean().item(),
        "mixed_groups": (batch.rewards.view(recipe.prompts, -1).std(1) > 0).float().mean().item(),
        **_update(model, teacher, optimizer, method, batch, recipe),
    }


def collect(
    model: Any, teacher: Any, tokenizer: Any, method: Method, problems: list[Problem], group_size: int
) -> Batch:
    """``group_size`` replies to each problem, with the method's routing and the teacher's hidden states."""
    longest = max(max_reply(problem.family) for problem in problems)
    rollouts = sample(model, tokenizer, [problem.question for problem in problems], group_size, longest)
    group_ids = torch.arange(len(problems)).repeat_interleave(group_size)
    asked = [problems[group] for group in group_ids.tolist()]
    rewards = torch.tensor(
        [float(problem.correct(reply)) for problem, reply in zip(asked, rollouts.replies, strict=True)]
    )
    routing = sk.route_samples(rewards, group_ids)
    distilled = {"grpo": torch.zeros_like(routing.sdpo_mask), "sdpo": routing.teacher_index >= 0}
    distilled["mixing"] = distilled["sdpo"]
    sdpo_mask = distilled.get(method, routing.sdpo_mask)
    advantages = sk.group_advantages(rewards, group_ids)
    shown = {
        row: with_solution(asked[row].question, rollouts.replies[routing.teacher_index[row]])
        for row in sdpo_mask.nonzero().squeeze(1).tolist()
    }
    return Batch(
        rollouts,
        rewards,
        torch.zeros_like(advantages) if method == "sdpo" else advantages,
        sdpo_mask,
        routing.teacher_index,
        reprompted_hidden(teacher, tokenizer, shown, forwarded(rollouts)),
    )


def forwarded(rollouts: Rollouts) -> Rollouts:
    """The rollouts with all tokens attended: none attends to those behind it, and without padding no mask is needed."""
    return rollouts._replace(mask=torch.ones_like(rollouts.mask))


def _update(
    model: Any,
    teacher: Any,
    optimizer: torch.optim.Optimizer,
    method: Method,
    batch: Batch,
    recipe: Recipe,
) -> dict[str, float]:
    config = sk.SRPOConfig(dw_beta=0.0 if method == "srpo-unweighted" else 1.0)
    # Groups that are all right or all wrong cannot move a weight and get no forward, but count as tokens.
    moving = batch.sdpo_mask | (batch.advantages != 0)
    if not moving.any():
        return {}
    rollouts, rows = batch.rollouts, moving.nonzero().squeeze(1)
    entropy = sk.teacher_stats(
        batch.teacher_hidden, teacher.lm_head.weight, mask=rollouts.mask & batch.sdpo_mask[:, None], config=config
    ).entropy
    normalizers = sk.Normalizers.from_batch(rollouts.mask, batch.sdpo_mask, entropy, config=config)
    hidden = response_hidden(model, *(tensor[rows] for tensor in forwarded(rollouts)[:4]))

    def loss(advantages: Tensor, *, distills: bool = True) -> sk.SRPOOutput:
        return sk.srpo_loss(
            hidden,
            model.lm_head.weight,
            rollouts.response_ids[rows],
            advantages=advantages[rows],
            mask=rollouts.mask[rows],
            sdpo_mask=batch.sdpo_mask[rows] if distills else None,
            teacher_hidden=batch.teacher_hidden[rows] if distills else None,
            teacher_weight=teacher.lm_head.weight if distills else None,
            normalizers=normalizers,
            config=config,
        )

    if method == "mixing":
        out = loss(torch.zeros_like(batch.advantages))
        total = MIXING * loss(batch.advantages, distills=False).loss + (1 - MIXING) * out.loss
    else:
        out = loss(batch.advantages)
        total = out.loss
    optimizer.zero_grad()
    total.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, recipe.ema_rate)
    summary = sk.summarize_metrics(out.metrics)
    result = {"grad_norm": grad_norm.item()}
    if batch.sdpo_mask.any():
        names = ("teacher_entropy", "divergence", "dw_weight_std")
        result |= {name: summary[f"srpo/{name}"] for name in names}
    return result


def _means(seen: list[dict[str, float]]) -> dict[str, float]:
    """Of every quantity, over the steps that have it."""
    names = dict.fromkeys(name for row in seen for name in row)
    values = {name: [row[name] for row in seen if name in row] for name in names}
    return {name: sum(own) / len(own) for name, own in values.items()}
