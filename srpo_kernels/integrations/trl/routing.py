"""Who is distilled, and from which prompt: what the trainer does when completions are scored."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from srpo_kernels.integrations.transformers.solutions import Solutions
from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
from srpo_kernels.integrations.trl.forwards import valid_tokens
from srpo_kernels.integrations.trl.images import teacher_token_types
from srpo_kernels.integrations.trl.rewards import correctness_scores, equal_groups, route_completions
from srpo_kernels.integrations.trl.tensor_parallel import SharedRowsTrainer

# Generation batches without a routed completion after which a run says so.
_PATIENCE = 10


class RoutingTrainer(SharedRowsTrainer):
    """The part of `SRPOTrainer` that scores: it adds ``sdpo_mask`` and ``teacher_prompt_ids`` to a batch."""

    args: SRPOTrainerConfig
    _solutions: Solutions
    _deciding_reward: int | None
    _batch_environments: list[Any]

    def _index_of_reward(self, name: str | None) -> int | None:
        if name is not None and self.reward_func_names.count(name) != 1:
            raise ValueError(
                f"success_reward must be the name of one of reward_funcs, {self.reward_func_names}, got {name!r}"
            )
        return None if name is None else self.reward_func_names.index(name)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards_per_func, self._completion_ids = rewards_per_func, completion_ids_list
        # With what an environment has added to them.
        self._prompts = prompts
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards = self._rewards_per_func
        if rewards.isinf().any():
            raise ValueError(f"reward_funcs must return finite rewards or None, got {rewards.tolist()}")
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        equal = equal_groups(rewards, self.reward_weights, group_size, self.multi_objective_aggregation)[own]
        advantages = output["advantages"]
        advantages = advantages.masked_fill(equal.to(rewards.device).view(-1, *[1] * (advantages.ndim - 1)), 0.0)
        output["advantages"] = advantages
        if self.args.method in ("sdpo", "distill"):
            output["advantages"] = torch.zeros_like(advantages)
        output["sdpo_mask"] = torch.zeros(len(inputs), dtype=torch.bool, device=rewards.device)
        # A list, which TRL shuffles and splits with the tensors; an empty one is the student's own prompt.
        output["teacher_prompt_ids"] = [[] for _ in inputs]
        match self.args.method:
            case "srpo" | "sdpo":
                self._route(inputs, output, own, group_size)
            case "distill":
                output["sdpo_mask"] = valid_tokens(output).any(1)
            case "grpo":
                pass
        if self.args.method != "grpo":
            output |= teacher_token_types(output, self.processing_class, output["teacher_prompt_ids"])
        shared: dict[str, Any] = self._shared(output)
        return shared

    def _route(self, inputs: list[dict[str, Any]], output: dict[str, Any], own: slice, group_size: int) -> None:
        """Set who of this process's completions, ``own`` of all, is distilled, and from which prompt."""
        scores = correctness_scores(self._rewards_per_func, self.reward_weights, self._deciding_reward)
        correct = scores >= self.args.success_threshold
        # Nobody scored NaN: neither correct, nor to be distilled.
        distillable = ~scores.isnan() if self.args.method == "sdpo" else scores < self.args.success_threshold

        lengths = torch.tensor(gather_object([len(ids) for ids in self._completion_ids]), device=scores.device)
        longest = lengths.masked_fill(~distillable, 0).unflatten(0, (-1, group_size)).amax(1)
        in_loss = valid_tokens(output).any(1)
        candidates = (correct[own] & in_loss).tolist()
        rooms = longest.repeat_interleave(group_size)[own].tolist()
        shown = gather_object(self._solutions.prompts(self._prompts, self._completion_ids, candidates, rooms))
        showable = torch.tensor([one is not None for one in shown], device=scores.device)
        feedback = self._feedback(inputs)
        has_feedback = torch.tensor(gather_object([text is not None for text in feedback]), device=scores.device)
        # The same draw on every process, and after a resume.
        seed = self.args.seed + self.state.global_step
        sdpo_mask, teacher_index = route_completions(showable, distillable, group_size, seed, has_feedback)
        output["sdpo_mask"] = sdpo_mask[own] & in_loss
        for row in output["sdpo_mask"].nonzero().flatten().tolist():
            sibling = int(teacher_index[own][row])
            solution = None if sibling < 0 else shown[sibling]
            ids = None if solution is None else solution.prompt_ids
            text = feedback[row]
            if text is not None and not (solution is not None and self.args.feedback_only_without_solution):
                said = None if solution is None else solution.text
                ids = self._solutions.with_feedback(self._prompts[row], row, said, text, rooms[row]) or ids
            output["sdpo_mask"][row] = ids is not None
            output["teacher_prompt_ids"][row] = ids or []
        if correct.any():
            fraction = (showable.sum() / correct.sum()).item()
            self._metrics["train" if self.model.training else "eval"]["srpo/shown_fraction"].append(fraction)
        self._warn_of_silence(int(sdpo_mask.sum()), int(correct.sum()), int(showable.sum()))

    def _feedback(self, inputs: list[dict[str, Any]]) -> list[str | None]:
        """What the environment said of each completion: TRL's ``privileged_context``, of the data or a rollout."""
        if not self.args.include_feedback:
            return [None] * len(inputs)
        texts = [example.get("privileged_context") for example in inputs]
        return [text if isinstance(text, str) and text.strip() else None for text in texts]

    def _tokenize_for_teacher(self, prompt: Any, row: int) -> list[int]:
        """A prompt's ids as the student's are made, with the tools of the environment of that row."""
        if self.environment_factories is None:
            return list(self._tokenize_prompts([prompt])[0][0])
        environments = self._batch_environments
        self._batch_environments = [environments[row]]
        try:
            return list(self._tokenize_prompts([prompt])[0][0])
        finally:
            self._batch_environments = environments

    # Generation batches, completions that were routed, correct and showable, so far.
    _seen: tuple[int, int, int, int] = (0, 0, 0, 0)

    def _warn_of_silence(self, routed: int, correct: int, showable: int) -> None:
        counts = zip(self._seen, (1, routed, correct, showable), strict=True)
        batches, routed, correct, showable = (before + now for before, now in counts)
        self._seen = batches, routed, correct, showable
        if batches == _PATIENCE and not routed and self.accelerator.is_main_process:
            warnings.warn(
                f"no completion was distilled in {batches} generation batches: {correct} were correct by "
                f"success_threshold={self.args.success_threshold}, and {showable} of them could be "
                "shown. A group needs a correct completion, which is shown where it is not truncated, and a failed one",
                stacklevel=2,
            )
