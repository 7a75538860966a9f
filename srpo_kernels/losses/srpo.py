"""The SRPO objective on vectors of rows, in plain torch: the readable heart of the library.

Statistics ``[n]`` of n rows go in and losses ``[n]`` come out; autograd through them gives the coefficients that the
row passes spread over the vocabulary. Source: SRPO (arXiv 2604.02288), sections 3.1 to 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.derived import Derivation
from srpo_kernels.losses.rollout import RolloutWeights, rollout_weights, without_off_policy_rows
from srpo_kernels.losses.rows import DIFFERENTIABLE, POSITION, ObjectiveRows
from srpo_kernels.losses.sequences import Sequences
from srpo_kernels.losses.terms import distillation_weights, policy_terms
from srpo_kernels.rows.contract import RowGradients

METRICS = (
    "policy_loss_sum",
    "policy_tokens",
    "sdpo_loss_sum",
    "sdpo_tokens",
    "active_rows",
    "scored_policy_tokens",
    "clip_low_count",
    "clip_high_count",
    "dual_clip_count",
    "ref_kl_sum",
    "approx_kl_sum",
    "entropy_sum",
    "entropy_tokens",
    "teacher_entropy_sum",
    "dw_weight_sum",
    "dw_weight_sq_sum",
    "divergence_sum",
    "rollout_tokens",
    "rollout_weight_sum",
    "rollout_clipped_count",
    "rollout_dropped_count",
    "nonfinite_rows",
)
# Beyond this spread of -dw_beta * H_t, weights that are normalised only at the end could leave fp32's range.
_MAX_LOG_WEIGHT_SPREAD = 60.0


def log_mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of the exponentials of a non-empty vector."""
    return values.logsumexp(0) - math.log(len(values))


class SRPOObjective:
    """The loss of one call, which sees all rows with a teacher before any without, and sums up its metrics.

    The gradient is linear in one over the mean of the entropy weights. Until the last rows with a teacher have shown
    that mean, weights are relative to the middle of the range that they can have; with those rows comes the factor
    that brings all before them to scale.

    Args:
        config: the options.
        log_mean: the log-mean of the entropy weights, None where it is that of this call's rows.
        num_taught: the rows with a teacher of the whole call.
        num_policy: the valid rows without one, those that are left out among them.
        vocab_size: bounds an entropy.
        derivation: what the divergence compares, and whether the policy is the one over the tokens that a row was
            sampled from.
    """

    name = "srpo_loss"

    def __init__(
        self,
        config: SRPOConfig,
        log_mean: Tensor | None,
        num_taught: int,
        num_policy: int,
        vocab_size: int,
        derivation: Derivation,
    ) -> None:
        self.config, self.log_mean, self._num_taught = config, log_mean, num_taught
        spread = config.dw_beta * math.log(vocab_size)
        self.teacher_first = bool(num_taught) and log_mean is None and spread > _MAX_LOG_WEIGHT_SPREAD
        self.whole_sequences, self.derivation = config.whole_sequences, derivation
        # Of rows without a teacher: what is computed, and what carries gradient.
        has_bonus = config.entropy_coef != 0.0
        self._policy_names = ("log_probs", "entropy") if has_bonus or config.count_entropy else ("log_probs",)
        self._moving_names = self._policy_names if has_bonus else ("log_probs",)
        self._reference: Tensor | float = -0.5 * spread
        self._entropies: list[Tensor] = []
        self._counts = {"policy_tokens": num_policy, "sdpo_tokens": num_taught}
        # Of rows, which are summed at the end: a sum of each chunk would be two small kernels for each number.
        self._summands: dict[str, list[Tensor]] = {}

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """Those of ``METRICS`` that are its own."""
        sums = {name: _joined(values).sum() for name, values in self._summands.items()}
        return dict.fromkeys(METRICS, 0.0) | self._counts | sums

    def reads(self, taught: bool) -> tuple[frozenset[str], frozenset[str]]:
        """The statistics that rows with a teacher, or without one, need, and those that carry gradient."""
        if not taught:
            names, moving = (
                frozenset[str]().union(*map(self.derivation.sources, of))
                for of in (self._policy_names, self._moving_names)
            )
            return names, moving
        compared = self.derivation.sources("divergence")
        return compared | {"log_probs", "teacher_entropy"}, compared & frozenset(DIFFERENTIABLE)

    def by_columns(self, taught: bool) -> bool:
        """A distilled row's own log-prob is that of the whole vocabulary."""
        return not taught and self.derivation.by_columns(self._policy_names)

    def judge(self, rows: ObjectiveRows, losses: Tensor, gradients: RowGradients) -> None:
        """The engine counts the rows that are not finite."""

    def widen(self, name: str) -> None:
        """It reads what it says, always."""
        raise RuntimeError(f"the SRPO objective has not said that it reads {name}")

    def expect(self, names: frozenset[str]) -> None:
        """And no other gradient."""
        raise RuntimeError(f"the SRPO objective has not said that it has gradients of {sorted(names)}")

    def begin(self, teacher_entropy: Tensor) -> None:
        """Take the entropies of all rows with a teacher ahead of the rows, where ``teacher_first`` asks for it."""
        self.log_mean = log_mean_exp(-self.config.dw_beta * teacher_entropy)

    def evaluate(self, rows: ObjectiveRows) -> tuple[Tensor, Tensor | None]:
        """Each row's share of the loss ``[n]``, and what multiplies all gradients of earlier calls, None for 1."""
        taught = rows.num_taught
        if not taught:
            return self._policy(rows, 0), None
        losses, rescale = self._distillation(rows, taught)
        if len(rows) > taught:
            losses = torch.cat([losses, self._policy(rows, taught)])
        return losses, rescale

    def _policy(self, rows: ObjectiveRows, start: int) -> Tensor:
        config, inputs = self.config, rows.select_inputs(slice(start, None))
        statistics = {name: getattr(rows, name)[start:] for name in self.reads(taught=False)[0]}
        seen = self.derivation.derive(self._policy_names, statistics, 0, inputs.get(POSITION), {})
        log_probs, entropy = seen["log_probs"], seen.get("entropy")
        sequences = rows.whole_sequences.select(slice(start, None)) if self.whole_sequences else None
        terms = policy_terms(
            log_probs,
            inputs["advantages"],
            config,
            old_log_probs=inputs.get("old_log_probs"),
            ref_log_probs=inputs.get("ref_log_probs"),
            is_weights=self._is_weights(log_probs, inputs, sequences),
            entropy=entropy if config.entropy_coef != 0.0 else None,
            sequences=sequences,
        )
        self._count("scored_policy_tokens", len(log_probs))
        self._add("clip_low_count", terms.clip_low)
        self._add("clip_high_count", terms.clip_high)
        self._add("dual_clip_count", terms.dual_clip)
        self._add("approx_kl_sum", terms.approx_kl)
        self._add("ref_kl_sum", terms.ref_kl)
        if entropy is not None:
            self._add("entropy_sum", entropy)
            self._count("entropy_tokens", len(entropy))
        if rows.active:
            self._count("active_rows", len(log_probs))
            self._add("policy_loss_sum", terms.loss)
        return inputs["factors"] * terms.loss

    def _distillation(self, rows: ObjectiveRows, taught: int) -> tuple[Tensor, Tensor | None]:
        config, inputs = self.config, rows.select_inputs(slice(taught))
        log_probs, entropy = rows.log_probs[:taught], rows.teacher_entropy[:taught]
        token_loss, divergence = self._divergence(rows, taught, inputs)
        rescale = self._normalize(entropy)
        weights = torch.exp(-config.dw_beta * entropy - (self._reference if self.log_mean is None else self.log_mean))
        is_weights = self._is_weights(log_probs, inputs)
        correction = distillation_weights(log_probs, inputs.get("old_log_probs"), is_weights, config)
        loss = weights * correction * token_loss
        self._count("active_rows", taught)
        self._add("sdpo_loss_sum", loss)
        self._add("teacher_entropy_sum", entropy)
        self._add("dw_weight_sum", weights)
        self._add("dw_weight_sq_sum", weights.square())
        self._add("divergence_sum", divergence)
        return inputs["factors"] * loss, rescale

    def _is_weights(
        self,
        log_probs: Tensor,
        inputs: dict[str, Tensor],
        policy_sequences: Sequences | None = None,
    ) -> Tensor | None:
        """The caller's times those of the rollout correction."""
        given, correction = inputs.get("is_weights"), self.config.rollout_correction
        if correction is None:
            return given
        log_ratio = log_probs.detach() - inputs["rollout_log_probs"]
        if "rollout_weights" in inputs:
            rollout = RolloutWeights(inputs["rollout_weights"], inputs["rollout_clipped"])
        else:
            rollout = rollout_weights(log_ratio, None, correction)
        if policy_sequences is not None:
            rollout = without_off_policy_rows(rollout, log_ratio, inputs["advantages"], policy_sequences, correction)
        weights, clipped = rollout
        self._count("rollout_tokens", len(weights))
        self._add("rollout_weight_sum", weights)
        self._add("rollout_clipped_count", clipped)
        self._add("rollout_dropped_count", weights == 0)
        return weights if given is None else weights * given

    def _divergence(self, rows: ObjectiveRows, taught: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The token loss of distillation before any weight, and what a log should show of it."""
        statistics = {name: getattr(rows, name)[:taught] for name in self.derivation.sources("divergence")}
        loss = self.derivation.compared(statistics, inputs)
        if self.config.distillation_mode == "sampled":
            return loss, statistics["log_probs"] - statistics["teacher_log_probs"]
        return loss, loss

    def _normalize(self, entropy: Tensor) -> Tensor | None:
        """Once the last rows with a teacher are here: the log-mean of all weights, and what brings others to scale."""
        if self.log_mean is not None:
            return None
        self._entropies.append(entropy)
        if sum(map(len, self._entropies)) < self._num_taught:
            return None
        self.log_mean = log_mean_exp(-self.config.dw_beta * torch.cat(self._entropies))
        if len(self._entropies) == 1:
            return None
        rescale = torch.exp(self._reference - self.log_mean)
        for name, factor in (("sdpo_loss_sum", rescale), ("dw_weight_sum", rescale), ("dw_weight_sq_sum", rescale**2)):
            self._summands[name] = [_joined(self._summands[name]) * factor]
        return rescale

    def _add(self, name: str, values: Tensor) -> None:
        self._summands.setdefault(name, []).append(values.detach())

    def _count(self, name: str, rows: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + rows


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)
