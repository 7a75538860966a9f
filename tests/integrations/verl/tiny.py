"""Tiny models on disk and a batch of rollouts, whole and in verl's form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srpo_kernels as sk

VOCABULARY = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _config(name: str) -> Any:
    import transformers as tf

    match name:
        case "untied" | "tied":
            return tf.Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=name == "tied")
        case "softcap":
            return tf.Gemma2Config(
                **_SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None, sliding_window=512
            )
        case "scaled":
            return tf.CohereConfig(**_SIZES, logit_scale=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        case "bias":
            return tf.PhiConfig(**_SIZES)
    raise ValueError(name)


def save_models(folder: Path) -> None:
    """The student and the teacher of each kind of model, and adapters of LoRA of each, off the head or on it."""
    import transformers as tf
    from peft import LoraConfig, get_peft_model

    for name in ("untied", "tied", "softcap", "scaled", "bias"):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(_config(name)).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
            if name == "bias":
                model.lm_head.bias.normal_()
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape) * (parameter.dim() > 1))
        model.save_pretrained(folder / f"{name}_teacher")
    kinds: list[tuple[str, Any]] = [("adapter", "all-linear"), ("head_adapter", ["q_proj", "down_proj", "lm_head"])]
    for seed, (name, modules) in enumerate((name + suffix, x) for suffix in ("", "_teacher") for name, x in kinds):
        torch.manual_seed(1 + seed)
        model = tf.AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
        adapted = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", bias="none")
        )
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(folder / name)


def head_of(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the LM head, LoRA's product in the former."""
    head = model.get_output_embeddings()
    weight = head.weight
    for name, down in getattr(head, "lora_A", {}).items():
        weight = weight + head.scaling[name] * head.lora_B[name].weight @ down.weight
    return weight, head.bias


class Rollouts(NamedTuple):
    """Eight rollouts of two prompts; lists hold one tensor for each."""

    prompts: list[Tensor]
    responses: list[Tensor]
    masks: list[Tensor]
    old_log_probs: list[Tensor]
    ref_log_probs: list[Tensor]
    is_weights: list[Tensor]
    advantages: Tensor
    sdpo_mask: Tensor
    contexts: list[Tensor]


def rollouts(*, routed: str = "some", empty: Sequence[int] = ()) -> Rollouts:
    """``routed``: ``"some"``, five of the eight, ``"last"``, of the second prompt alone, ``"all"`` or ``"none"``.

    ``empty`` have no token.
    """
    draw = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> Tensor:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(0, VOCABULARY, (length,), generator=draw)

    def numbers(scale: float, mean: float) -> list[Tensor]:
        return [torch.randn(len(x), generator=draw) * scale + mean for x in responses]

    prompts = [x for prompt in (ids(3, 9), ids(3, 9)) for x in [prompt] * 4]
    responses = [ids(2, 12) for _ in range(8)]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    if routed == "last":
        rewards[:4] = 1.0
    groups = torch.arange(8) // 4
    masks = [torch.rand(len(x), generator=draw) < 0.8 for x in responses]
    for row, mask in enumerate(masks):
        mask[-1] = True
        if row in empty:
            mask.zero_()
    routing = sk.route_samples(rewards, groups, generator=torch.Generator().manual_seed(3))
    sdpo_mask = {"all": torch.ones(8).bool(), "none": torch.zeros(8).bool()}.get(routed, routing.sdpo_mask)
    old, ref = numbers(0.1, -4.8), numbers(0.3, -4.8)
    solutions = [responses[int(i)] if i >= 0 else ids(1, 2) for i in routing.teacher_index]
    contexts = [torch.cat([p, torch.tensor([5, 6]), s, torch.tensor([7]), r])
                for p, s, r in zip(prompts, solutions, responses, strict=True)]  # fmt: skip
    advantages = sk.group_advantages(rewards, groups)
    if routed == "last":
        advantages[:4] = torch.tensor([0.5, -0.5, 1.0, -1.0])
    weights = [x.abs() + 0.5 for x in numbers(0.3, 0.0)]
    return Rollouts(prompts, responses, masks, old, ref, weights, advantages, sdpo_mask, contexts)


def nested(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


def in_verls_form(batch: Rollouts, rows: Sequence[int]) -> Any:
    """These rows of a batch, as verl's workers get them from the queue."""
    from tensordict import TensorDict

    def pick(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[row] for row in rows]

    sequences = [torch.cat([batch.prompts[row], batch.responses[row]]) for row in rows]
    masks = [mask.long() for mask in pick(batch.masks)]
    fields = {
        "input_ids": sequences,
        "position_ids": [torch.arange(len(x)) for x in sequences],
        "prompts": pick(batch.prompts),
        "responses": pick(batch.responses),
        "response_mask": masks,
        "loss_mask": masks,
        "old_log_probs": pick(batch.old_log_probs),
        "ref_log_prob": pick(batch.ref_log_probs),
        "rollout_is_weights": pick(batch.is_weights),
        "advantages": [batch.advantages[row].expand(len(batch.responses[row])).clone() for row in rows],
        "teacher_input_ids": pick(batch.contexts),
    }
    data = TensorDict({name: nested(x) for name, x in fields.items()}, batch_size=len(rows))
    data["sdpo_mask"] = batch.sdpo_mask[list(rows)]
    return data
