"""What an objective sees of a row, made of the statistics that the passes over its logits compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.checks import refuse_name
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.divergence import over_support, sampled_divergence, support_divergence
from srpo_kernels.losses.options import DistillationMode
from srpo_kernels.rows.mixture import Divergence

_FULL = "full_"
# Inputs that are rows' own numbers of the divergence, in place of the config's.
OWN = ("divergence_alpha", "divergence_clip")
# Those of the policy over the tokens that a row was sampled from.
_OF_SUPPORT = {
    "log_probs": ("log_probs", "sampled_log_probs"),
    "entropy": ("log_probs", "sampled_log_probs"),
    "logsumexp": ("logsumexp", "log_probs", "sampled_log_probs"),
}


class Derivation(NamedTuple):
    """How the statistics of a call are made.

    ``mode`` and what follows say what its divergence compares: with ``has_tail`` the rest of the vocabulary is one more
    token, without it ``renormalize`` says whether both models are taken over the others alone; ``given``, the teacher
    is its likeliest tokens alone. With ``has_support``, log-prob, entropy and log-sum-exp are those over the tokens
    that a row was sampled from.
    """

    mode: DistillationMode
    divergence: Divergence
    alpha: float
    clip: float | None
    has_tail: bool
    renormalize: bool
    given: bool
    has_support: bool

    @classmethod
    def of(cls, config: SRPOConfig, given_topk: int | None, vocab_size: int, *, has_support: bool) -> Derivation:
        """For a teacher of which ``given_topk`` tokens are known, None for one whose logits are."""
        topk = config.topk if given_topk is None else given_topk
        return cls(
            config.distillation_mode,
            config.divergence,
            config.alpha,
            config.divergence_clip,
            config.add_tail and topk < vocab_size,
            not config.add_tail,
            given_topk is not None,
            has_support,
        )

    def sources(self, name: str) -> frozenset[str]:
        """The statistics of the passes that one is made of."""
        if self.has_support and name in _OF_SUPPORT:
            return frozenset(_OF_SUPPORT[name])
        return self._compared() if name == "divergence" else frozenset({name.removeprefix(_FULL)})

    def by_columns(self, names: Iterable[str]) -> bool:
        """Whether these depend on a few tokens alone, those of the row's support and of a teacher that is given."""
        few = {*_OF_SUPPORT} if self.has_support else set()
        if self.given:
            few |= {"teacher_entropy"} if self.has_tail or not self.renormalize else {"teacher_entropy", "divergence"}
        return set(names) <= few

    def derive(
        self,
        names: Iterable[str],
        statistics: Mapping[str, Tensor],
        num_taught: int,
        position: Tensor | None,
        own: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The statistics ``names`` of rows of which the first ``num_taught`` have a teacher.

        ``position`` ``[n]`` is where in the support a row's own token is, negative where it is not. ``own`` has those
        of ``OWN`` that are given.
        """
        names = frozenset(names)
        derived = {
            name: statistics[name.removeprefix(_FULL)]
            for name in names
            if name != "divergence" and name.removeprefix(_FULL) in statistics
        }
        if self.has_support and position is not None and names & _OF_SUPPORT.keys():
            log_probs, entropy, mass = over_support(statistics["log_probs"], statistics["sampled_log_probs"], position)
            derived |= {"log_probs": log_probs, "entropy": entropy}
            if "logsumexp" in names:
                derived["logsumexp"] = statistics["logsumexp"] + mass
        if "divergence" in names and num_taught:
            taught = {name: statistics[name][:num_taught] for name in self._compared()}
            of_taught = {name: x[:num_taught] for name, x in own.items() if name in OWN}
            divergence = self.compared(taught, of_taught)
            rest = len(statistics["log_probs"]) - num_taught
            derived["divergence"] = torch.cat([divergence, divergence.new_zeros(rest)]) if rest else divergence
        return {name: x for name, x in derived.items() if name in names}

    def compared(self, statistics: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        """The divergence of rows that have a teacher, ``[n]``; of the mode ``"sampled"`` what has its gradient."""
        match self.mode:
            case "full":
                return statistics["divergence"]
            case "sampled":
                return sampled_divergence(statistics["log_probs"], statistics["teacher_log_probs"])
            case "topk":
                return support_divergence(
                    statistics["support_log_probs"],
                    statistics["teacher_support_log_probs"],
                    statistics["log_tail"] if self.has_tail else None,
                    statistics["teacher_log_tail"] if self.has_tail else None,
                    self.divergence,
                    own.get("divergence_alpha", self.alpha),
                    own.get("divergence_clip", self.clip),
                    renormalize=self.renormalize,
                )
            case unknown:
                refuse_name("distillation_mode", unknown)

    def _compared(self) -> frozenset[str]:
        match self.mode:
            case "full":
                return frozenset({"divergence"})
            case "sampled":
                return frozenset({"log_probs", "teacher_log_probs"})
            case "topk":
                tails = {"log_tail", "teacher_log_tail"} if self.has_tail else set()
                return frozenset({"support_log_probs", "teacher_support_log_probs", *tails})
            case unknown:
                refuse_name("distillation_mode", unknown)
