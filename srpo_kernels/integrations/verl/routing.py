"""Who of a batch is distilled, and what the teacher reads: from rewards, keys and token ids alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.integrations.transformers.solutions import Shown, Solutions
from srpo_kernels.integrations.verl.options import SRPOOptions


class Outputs(NamedTuple):
    """The B outputs of a batch of agent loops, padding among them.

    ``group_ids``: ``[B]``, int64, of prompts; ``final``: ``[B]`` bool, the last output of a session, and no padding;
    ``scores``: ``[B]``, what decides; ``prompts``: conversations; ``responses``: token ids; ``in_loss``: ``[B]`` bool,
    responses that have a token in the loss; ``feedback``: texts or None.
    """

    group_ids: Tensor
    final: Tensor
    scores: Tensor
    prompts: Sequence[Any]
    responses: Sequence[Tensor]
    in_loss: Tensor
    feedback: Sequence[str | None]


class RoutedBatch(NamedTuple):
    """Who is distilled, and from what.

    ``sdpo_mask``: ``[B]`` bool; ``contexts``: what the teacher reads of a distilled output, up to the end of its
    response, and one token elsewhere; ``metrics``: shares, for a log.
    """

    sdpo_mask: Tensor
    contexts: list[Tensor]
    metrics: dict[str, float]


class Router:
    """Routes outputs and makes the teacher's contexts.

    Args:
        tokenizer: decodes responses.
        tokenize: the token ids of a conversation, with the prompt of the answer.
        ends: the ids that end a response; one without is truncated, and not shown.
        max_length: the model's positions, which bound a context. None: no bound.
        options: the `srpo` section.

    Raises:
        ValueError: ``srpo.max_teacher_length`` beyond the positions.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Any], list[int]],
        *,
        ends: set[int],
        max_length: int | None,
        options: SRPOOptions,
    ) -> None:
        own = options.max_teacher_length
        if own is not None and max_length is not None and own > max_length:
            raise ValueError(f"srpo.max_teacher_length must be at most the model's {max_length} positions, got {own}")
        self._options = options
        self._solutions = Solutions(
            tokenizer,
            lambda prompt, row: tokenize(prompt),
            ends=ends,
            max_length=max_length if own is None else own,
            args=options,
        )

    def route(self, outputs: Outputs, step: int) -> RoutedBatch:
        """The route of every output, by SRPO's rule or SDPO's; ``step`` seeds the draw of the siblings that teach."""
        options, (group_ids, final, scores, *_) = self._options, outputs
        correct = final & (scores >= options.success_threshold)
        distillable = final & outputs.in_loss & ~scores.isnan()
        if options.method == "srpo":
            distillable &= scores < options.success_threshold
        lengths = torch.tensor([len(x) for x in outputs.responses])
        longest = torch.zeros(int(group_ids.max()) + 1, dtype=torch.long)
        longest.scatter_reduce_(0, group_ids, lengths.masked_fill(~distillable, 0), "amax")
        shown = self._solutions.prompts(
            outputs.prompts,
            [x.tolist() for x in outputs.responses],
            (correct & outputs.in_loss).tolist(),
            longest[group_ids].tolist(),
        )
        showable = torch.tensor([ids is not None for ids in shown])
        generator = torch.Generator().manual_seed(options.seed + step)
        # To the router a correct output that cannot be shown is a failed one: it must not teach.
        teachers = sk.route_samples(showable.float(), group_ids, generator=generator).teacher_index.tolist()

        sdpo_mask = torch.zeros(len(final), dtype=torch.bool)
        contexts = [response[:1] for response in outputs.responses]
        for row in distillable.nonzero().flatten().tolist():
            prompt = self._prompt(outputs, row, teachers[row], shown)
            if prompt is not None:
                sdpo_mask[row] = True
                contexts[row] = torch.cat([torch.tensor(prompt, dtype=torch.long), outputs.responses[row]])
        count = max(int(final.sum()), 1)
        metrics = {
            "srpo/correct_fraction": float(correct.sum()) / count,
            "srpo/routed_fraction": float(sdpo_mask.sum()) / count,
        }
        if correct.any():
            metrics["srpo/shown_fraction"] = float(showable.sum()) / float(correct.sum())
        return RoutedBatch(sdpo_mask, contexts, metrics)

    def _prompt(self, outputs: Outputs, row: int, teacher: int, shown: list[Shown | None]) -> list[int] | None:
        """What the teacher reads before the response of ``row``: a sibling's solution, feedback, both, or None.

        Where both do not fit, it is the solution.
        """
        solved = shown[teacher] if teacher >= 0 else None
        feedback, ids = outputs.feedback[row], None if solved is None else solved.prompt_ids
        if feedback is None:
            return ids
        text, length = None if solved is None else solved.text, len(outputs.responses[row])
        return self._solutions.with_feedback(outputs.prompts[row], row, text, feedback, length) or ids


def final_outputs(keys: Sequence[str], tags: Sequence[Any]) -> Tensor:
    """``[B]`` bool: the last output of each session, by verl's keys ``{uid}_{session}_{index}``, and no padding."""
    last: dict[str, int] = {}
    real = [not tag.get("is_padding", False) for tag in tags]
    sessions = [(session, int(index)) for session, index in (key.rsplit("_", 1) for key in keys)]
    for (session, index), is_real in zip(sessions, real, strict=True):
        if is_real:
            last[session] = max(index, last.get(session, -1))
    return torch.tensor([r and last[session] == index for (session, index), r in zip(sessions, real, strict=True)])


def group_numbers(uids: Sequence[Any], final: Tensor) -> Tensor:
    """``[B]`` int64: outputs of one prompt share a number; one that is not ``final`` has a number of its own."""
    numbers: dict[str, int] = {}
    shared = [numbers.setdefault(str(uid), len(numbers)) for uid in uids]
    own = torch.arange(len(shared)) + len(numbers)
    return torch.where(final, torch.tensor(shared), own)


def equal_groups(scores: Tensor, uids: Sequence[Any], compared: Tensor) -> Tensor:
    """``[B]`` bool: outputs of prompts whose ``compared`` outputs have one score, where there is nothing to compare.

    Their advantages are 0; those of a mean over the group are its rounding, which Adam scales up to whole steps.
    """
    group = group_numbers(uids, torch.ones_like(compared))
    size = int(group.max()) + 1
    most = scores.new_full((size,), -torch.inf)
    most.scatter_reduce_(0, group, scores.masked_fill(~compared, -torch.inf), "amax")
    least = scores.new_full((size,), torch.inf)
    least.scatter_reduce_(0, group, scores.masked_fill(~compared, torch.inf), "amin")
    equal: Tensor = (most == least)[group]
    return equal
