"""The loss of a micro-batch, and what the micro-batches of an optimizer step agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import response_normalizers
from srpo_kernels.integrations.transformers.teacher import is_sharded
from srpo_kernels.integrations.trl.forwards import Forwards, valid_tokens
from srpo_kernels.integrations.trl.metrics import micro_batch_metrics, step_means
from srpo_kernels.integrations.trl.routing import RoutingTrainer
from srpo_kernels.integrations.trl.teacher import Teacher

# What the first micro-batch of a step gives to all of them.
_OF_A_STEP = ("teacher", "normalizers")


class SteppingTrainer(RoutingTrainer):
    """The part of `SRPOTrainer` that prepares optimizer steps and computes their losses."""

    teacher: Teacher
    loss_config: sk.SRPOConfig
    _forwards: Forwards
    # Whether the policy loss is TRL's own, on log-probs of this library.
    _from_log_probs: bool
    _metric_sums: dict[str, Tensor]
    # The place in its optimizer step of the micro-batch that comes next. The last step of an epoch may have fewer.
    _place = 0

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with log-probs and entropies from the operands and in the dtype of the loss.

        With those of another operator the ratio of a policy to itself is not 1.
        """
        return super()._get_per_token_logps_and_entropies(self._forwards.scorer(model), *args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        parts, accumulation = [inputs], 1
        if self.model.training:
            accumulation, generated = self.current_gradient_accumulation_steps, self.args.steps_per_generation
            place, first = self._place, self._step % generated
            self._place = 0 if self.accelerator.sync_gradients else place + 1
            if place and first:
                return inputs
            # What of this optimizer step lies in this generation batch.
            parts = self._buffered_inputs[first : first + min(generated - first, accumulation - place)]
        if not self._from_log_probs and (not self.model.training or self._buffered_inputs is not before):
            # The model that generated them is the one that runs now.
            for part in parts:
                part.pop("old_per_token_logps", None)
        self._prepare_step(parts, accumulation)
        return inputs

    def _prepare_step(self, parts: list[dict[str, Any]], accumulation: int = 1) -> None:
        """Give ``parts``, all or some of the ``accumulation`` of a step, the teacher's rows and the normalizers."""
        normalizers = []
        for part in parts:
            part["teacher"] = None
            if self.args.method != "grpo":
                part["teacher"] = self._forwards.teacher_rows(self.teacher, part, self._tokenizer.pad_token_id)
            mask = valid_tokens(part)
            counts = response_normalizers(mask, part["sdpo_mask"], part["teacher"], config=self.loss_config)
            # TRL's mean over completions is over masked ones too.
            normalizers.append(counts._replace(sequence_count=torch.tensor(len(mask), device=mask.device)))
        step = normalizers[0].merge(*normalizers[1:]).all_reduce()
        assert step.sequence_count is not None
        if len(parts) < accumulation:
            # The rest of the step, which other generation batches have, is taken to be like this part of it.
            whole = accumulation / len(parts)
            step = step._replace(token_count=step.token_count * whole, sequence_count=step.sequence_count * whole)
        for part in parts:
            part["normalizers"] = step._replace(token_count=self._token_count(part, step.token_count, accumulation))

    def _token_count(self, part: dict[str, Any], step: Tensor, accumulation: int) -> Tensor:
        """What a loss per token is divided by, over all processes."""
        if self.args.loss_type == "bnpo":
            own: Tensor = valid_tokens(part).sum() * (accumulation * self.accelerator.num_processes)
            return own
        if self.args.token_denominator == "generation_batch":
            generated = self.args.steps_per_generation if self.model.training else 1
            count: Tensor = part["num_items_in_batch"] * (accumulation / generated)
            return count
        return step

    def _generation_file(self, folder: Path) -> Path:
        return folder / f"srpo_generation_batch_{self.accelerator.process_index}.pt"

    def _save_generation_batch(self, folder: Path) -> None:
        """Write what is left of a generation batch, which TRL generates anew after a resume."""
        place = self._step % (self.args.steps_per_generation * self.num_iterations)
        if place and self._buffered_inputs is not None:
            kept = [{name: x for name, x in part.items() if name not in _OF_A_STEP} for part in self._buffered_inputs]
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"place": place, "parts": kept}, self._generation_file(folder))

    def _load_generation_batch(self, folder: Path) -> None:
        path = self._generation_file(folder)
        if path.exists():
            saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = saved["place"], saved["parts"]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self._from_log_probs:
            return self._loss_from_log_probs(model, inputs)
        moving, in_loss = self._forwards.moving(inputs), valid_tokens(inputs).any(1)
        if self.aux_loss_enabled:
            moving = torch.ones_like(moving)
        elif self.args.log_entropy and is_sharded(self.model):
            # Every process makes as many forwards.
            moving = moving | in_loss
        out, aux_loss = self._forwards.loss(
            model, inputs, moving.nonzero().flatten(), has_aux_loss=self.aux_loss_enabled
        )
        entropy = None
        if self.args.log_entropy:
            entropy = out.metrics["entropy_sum"], out.metrics["entropy_tokens"]
            silent = (in_loss & ~moving).nonzero().flatten()
            if len(silent):
                stats = self._forwards.stats(self.accelerator.unwrap_model(model), inputs, silent)
                out.log_probs[silent] = stats.log_probs
                entropy = entropy[0] + stats.entropy.sum(), entropy[1] + valid_tokens(inputs)[silent].sum()
        logged = self._metrics["train" if self.model.training else "eval"]
        means = micro_batch_metrics(inputs, out, valid_tokens(inputs), self.args, self.accelerator, entropy)
        for name, value in means.items():
            logged[name].append(value)
        self._log_step(inputs, out)
        if self.model.training and self.num_iterations > 1:
            # Not there in the first pass, whose model is the one that generated them.
            inputs.setdefault("old_per_token_logps", out.log_probs)
        # DDP takes the mean over processes; the normalizers are already those of all of them.
        loss: Tensor = out.loss * self.accelerator.num_processes
        if aux_loss is not None:
            loss = loss + self._scaled_aux_loss(aux_loss)
        return loss

    def _scaled_aux_loss(self, aux_loss: Tensor) -> Tensor:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss.detach()).mean().item())
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        scaled: Tensor = self.router_aux_loss_coef * aux_loss / accumulation
        return scaled

    def _loss_from_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's own loss of the policy branch, and the divergence of the completions that are distilled."""
        distilled, mask = inputs["sdpo_mask"], valid_tokens(inputs)
        training = self.model.training
        # TRL's denominator is this times the accumulation over the steps of a generation batch.
        steps = self.args.steps_per_generation / self.current_gradient_accumulation_steps if training else 1.0
        policy = inputs | {
            "tool_mask": (mask & ~distilled[:, None]).long(),
            "num_items_in_batch": inputs["normalizers"].token_count * steps,
        }
        loss: Tensor = super()._compute_loss(model, policy)
        if self.args.method == "grpo":
            return loss
        idle = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
        out, _ = self._forwards.loss(model, idle, self._forwards.moving(idle).nonzero().flatten())
        self._log_step(inputs, out)
        both: Tensor = loss + out.loss * self.accelerator.num_processes
        return both

    def _log_step(self, inputs: dict[str, Any], out: sk.SRPOOutput) -> None:
        """At the end of an optimizer step, log the means over it."""
        sums = out.metrics | {"valid_tokens": valid_tokens(inputs).sum()}
        self._metric_sums = {name: value + self._metric_sums.get(name, 0) for name, value in sums.items()}
        training = self.model.training
        if training and not self.accelerator.sync_gradients:
            return
        names = list(self._metric_sums)
        reduced = self.accelerator.reduce(torch.stack([self._metric_sums[name].float() for name in names]), "sum")
        totals = dict(zip(names, reduced.unbind(), strict=True))
        self._metric_sums = {}
        logged = self._metrics["train" if training else "eval"]
        for name, value in step_means(totals, self.args, has_policy=not self._from_log_probs).items():
            logged[name].append(value)
        if training and self.args.entropy_coef != 0.0 and not self._from_log_probs:
            logged["entropy_coef"].append(self.args.entropy_coef)
