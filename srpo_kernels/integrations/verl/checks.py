"""What an `SRPOEngine` checks of its options and of its model."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import FSDPEngineWithLMHead

from srpo_kernels.integrations.transformers import causal_model


def refuse_options(model_config: Any, engine_config: Any) -> None:
    """Raise ValueError for an option of model or engine that needs the logits, by its name."""
    for name, enabled, reason in (
        ("model.use_fused_kernels", model_config.use_fused_kernels, "it replaces the forward where the loss is"),
        ("model.mtp.enable", model_config.mtp.enable, "the loss of more predicted tokens is not computed"),
        ("fsdp_config.qat.enable", engine_config.qat.enable, "the LM head must be a plain linear layer"),
    ):
        if enabled:
            raise ValueError(f"{name} must be false with SRPOEngine, got {enabled!r}: {reason}")
    size = engine_config.ulysses_sequence_parallel_size
    if size > 1 and hasattr(model_config.hf_config, "vision_config"):
        raise ValueError(
            f"fsdp_config.ulysses_sequence_parallel_size must be 1 with {type(model_config.hf_config).__name__}, which "
            f"verl cuts after the embedding of images, got {size}"
        )


def temperature_of(value: Any) -> float:
    """The one temperature of a batch, which divides every logit. Raises ValueError for one per sequence."""
    if isinstance(value, Tensor):
        if value.numel() == 0 or (value != value.flatten()[0]).any():
            raise ValueError(f"temperature must be one number for all sequences, got {value.tolist()}")
        value = value.flatten()[0]
    return float(value)


def check_head(module: torch.nn.Module, strategy: str) -> None:
    """Raise ValueError for LoRA on an LM head that verl makes a unit of FSDP2 of its own."""
    base = causal_model(module)
    head = base.get_output_embeddings()
    # FSDP2 gives a unit another class, which Python does not allow of an abstract one.
    if strategy == "fsdp2" and isinstance(head, ABC) and not base.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "model.target_modules must leave out the LM head, as all-linear does, or strategy must be 'fsdp', got "
            f"{strategy!r} and a head that is a {type(head).__module__}.{type(head).__name__}, which verl's FSDP2 "
            "cannot make a unit of"
        )


def check_log_probs(engine: Any) -> None:
    """Raise ValueError unless log-probs from hidden states and head are those of the model's own logits.

    Runs a sequence of 32 tokens on every rank both ways, in the model's precision.
    """
    vocab_size = engine.model_config.hf_config.get_text_config().vocab_size
    ids = torch.arange(1, 33).remainder(vocab_size)
    fields = {"input_ids": ids, "position_ids": torch.arange(32), "responses": ids[2:]}
    nested = {name: torch.nested.as_nested_tensor([x], layout=torch.jagged) for name, x in fields.items()}
    batch = TensorDict(nested, batch_size=1)
    tu.assign_non_tensor(batch, temperature=1.0, use_remove_padding=engine.use_remove_padding, calculate_entropy=False)
    batch = batch.to(get_device_id())
    with engine.eval_mode(), torch.no_grad():
        values = []
        for forward_step in (FSDPEngineWithLMHead.forward_step, type(engine).forward_step):
            _, output = forward_step(engine, batch.copy(), loss_function=None, forward_only=True)
            values.append(output["model_output"]["log_probs"].values()[1:31].float())
    logits, hidden = values
    narrow = engine._autocast_dtype != torch.float32
    tolerance = 4.0 * torch.finfo(engine._autocast_dtype).eps * float(logits.abs().max()) if narrow else 1e-4
    error = float((logits - hidden).abs().max())
    if not error <= max(tolerance, 1e-4):
        raise ValueError(
            "model must compute its logits from the last hidden states and the LM head, up to the scale and the "
            f"softcap of its config; log-probs of {type(engine.base).__name__} differ by {error:.3g} from those of its "
            "own logits"
        )
