"""The loop of `train_smollm2`, to copy from: SRPO (arXiv 2604.02288) for a small instruct model on a CPU.

Each step samples a group of replies per problem and scores them. Failed replies that have a correct sibling are
distilled from the model itself, shown that sibling; all others get GRPO's policy gradient. Student and teacher hand
hidden states to `srpo_loss`; nobody computes logits but the sampler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import srpo_kernels as sk
from examples.report import RunLog
from examples.rollouts import reprompted_hidden, response_hidden, sample_rollouts
from examples.tasks import Problem

if TYPE_CHECKING:
    from examples.train_smollm2 import Options


def teacher_question(question: str, solution: str) -> str:
    """The question with a sibling's correct reply, after SDPO's template."""
    return f"{question}\n\nCorrect solution:\n\n{solution}\n\nCorrectly solve the original question."


@torch.no_grad()
def update_average(teacher: PreTrainedModel, model: PreTrainedModel, rate: float) -> None:
    """Move the teacher's weights towards the student's."""
    for average, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, rate)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterator[Problem],
    options: Options,
    log: RunLog,
) -> dict[str, Any]:
    """The loop. Returns the last batch, with the final weights, as arguments of `srpo_loss`."""
    teacher = model if options.teacher == "live" else copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    config = sk.SRPOConfig(temperature=options.temperature)
    group_ids = torch.arange(options.prompts).repeat_interleave(options.group_size)
    last_batch: dict[str, Any] = {}
    for _ in range(options.steps):
        with log.phase("rollout"):
            drawn = list(islice(problems, options.prompts))
            rollouts = sample_rollouts(
                model,
                tokenizer,
                [problem.question for problem in drawn],
                group_size=options.group_size,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
            )
            asked = [drawn[group] for group in group_ids.tolist()]
            rewards = torch.tensor([p.reward(reply) for p, reply in zip(asked, rollouts.replies, strict=True)])

        routing = sk.route_samples(rewards, group_ids)
        advantages = sk.group_advantages(rewards, group_ids)
        sdpo_mask = routing.sdpo_mask
        if options.method == "grpo":
            sdpo_mask = torch.zeros_like(sdpo_mask)
        elif options.method == "sdpo":
            sdpo_mask = routing.teacher_index >= 0
            advantages = torch.zeros_like(advantages)

        with log.phase("teacher"):
            shown = {
                row: teacher_question(asked[row].question, rollouts.replies[routing.teacher_index[row]])
                for row in sdpo_mask.nonzero().squeeze(1).tolist()
            }
            guided = reprompted_hidden(teacher, tokenizer, shown, rollouts)
            # The batch's token count and mean weight: with them, the losses of its parts add up to its own.
            stats = sk.teacher_stats(
                guided,
                teacher.lm_head.weight,
                mask=rollouts.mask & sdpo_mask[:, None],
                config=config,
            )
            normalizers = sk.Normalizers.from_batch(rollouts.mask, sdpo_mask, stats.entropy, config=config)

        batch = {
            "target_ids": rollouts.response_ids,
            "advantages": advantages,
            "mask": rollouts.mask,
            "sdpo_mask": sdpo_mask,
            "teacher_hidden": guided,
        }
        shared = {
            "weight": model.lm_head.weight,
            "teacher_weight": teacher.lm_head.weight,
            "normalizers": normalizers,
            "config": config,
        }
        # Groups that are all wrong or all right cannot move a weight, and get no forward. A step that has no other
        # runs one reply, for a loss of 0.
        moving = sdpo_mask | (advantages != 0)
        moving[0] |= ~moving.any()
        hidden_parts: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for rows in moving.nonzero().squeeze(1).split(options.micro_batch):
            with log.phase("student"):
                hidden = response_hidden(model, *(tensor[rows] for tensor in rollouts[:4]))
            with log.phase("loss"):
                out = sk.srpo_loss(hidden, **{name: value[rows] for name, value in batch.items()}, **shared)
            with log.phase("backward"):
                out.loss.backward()
            hidden_parts.append(hidden.detach())
            metrics = {name: value + metrics.get(name, 0) for name, value in out.metrics.items()}

        with log.phase("backward"):
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if teacher is not model:
                update_average(teacher, model, options.ema_rate)

        # Replies without a forward are in the policy branch too.
        metrics["policy_tokens"] = normalizers.token_count - metrics["sdpo_tokens"]
        log.step(
            {
                "reward": rewards.mean().item(),
                "length": rollouts.mask.sum(1).float().mean().item(),
                "grad_norm": grad_norm.item(),
                **sk.summarize_metrics(metrics),
            }
        )
        last_batch = {
            "hidden": torch.cat(hidden_parts),
            **{name: value[moving] for name, value in batch.items()},
            **shared,
        }
    return last_batch
