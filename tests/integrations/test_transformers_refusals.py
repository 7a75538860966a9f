"""What ``response_loss`` refuses, by name and before it computes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

from transformers import LlamaModel, T5Config, T5ForConditionalGeneration

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import response_loss, teacher_rows
from tests.integrations.test_transformers_loss import ADVANTAGES, IDS, MASK, RESPONSES, ROUTED, wide
from tests.tiny_models import tiny_model_of


def changed(**changes: Any) -> Callable[[], Any]:
    options = {"response_mask": RESPONSES, "advantages": ADVANTAGES.double()} | changes

    def call() -> Any:
        arguments = dict(options)
        model = arguments.pop("model", None)
        ids, mask = arguments.pop("input_ids", IDS), arguments.pop("attention_mask", MASK)
        return response_loss(wide() if model is None else model(), ids, mask, **arguments)

    return call


def with_embedding_alone() -> nn.Module:
    model = wide()
    return LlamaModel(model.config)


def other_responses() -> Any:
    return teacher_rows(wide(), IDS[ROUTED].flip(0), MASK[ROUTED].flip(0), response_mask=RESPONSES[ROUTED].flip(0))


FIRST = RESPONSES.clone()
FIRST[0, 2] = True
PADDED = RESPONSES.clone()
PADDED[2, 6] = True
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no responses": (changed(response_mask=None), ValueError, "response_mask or labels is required, got none"),
    "both": (changed(labels=IDS), ValueError, "response_mask or labels is required, got both"),
    "a float mask": (changed(response_mask=RESPONSES.float()), TypeError, "response_mask must be integers or bools"),
    "ids of a row": (changed(input_ids=IDS[0]), ValueError, r"input_ids must have shape \[B, S\], got \[9\]"),
    "a short mask": (
        changed(attention_mask=MASK[:, 1:]),
        ValueError,
        "attention_mask must have the shape of input_ids",
    ),
    "padding": (changed(response_mask=PADDED), ValueError, r"False at \[2, 6\], which is padding in attention_mask"),
    "no context": (changed(response_mask=FIRST), ValueError, r"False at \[0, 2\], which has no token before it"),
    "labels without context": (
        changed(response_mask=None, labels=torch.where(FIRST, IDS, -100)),
        ValueError,
        r"labels must be -100 at \[0, 2\]",
    ),
    "advantages": (changed(advantages=torch.ones(3)), ValueError, r"advantages must have shape \[B\], .* got \[3\]"),
    "old": (changed(old_log_probs=torch.ones(4, 3)), ValueError, "old_log_probs must have shape"),
    "old numbers": (changed(old_log_probs=1.0), TypeError, "old_log_probs must be a torch.Tensor, got float"),
    "a teacher of none": (changed(teacher=wide()), ValueError, "teacher needs sdpo_mask"),
    "routes of tokens": (changed(sdpo_mask=RESPONSES), ValueError, r"sdpo_mask must have shape \[B\], \[4\], got"),
    "routes of ints": (
        changed(sdpo_mask=ROUTED.long()),
        TypeError,
        "sdpo_mask must be a bool tensor or None, got torch",
    ),
    "vocabulary": (
        changed(sdpo_mask=ROUTED, teacher=wide(vocab_size=97)),
        ValueError,
        "must have the tokenizer of model, whose vocabulary has 96 tokens, got one with 97",
    ),
    "the teacher's transform": (
        changed(
            sdpo_mask=ROUTED,
            teacher=wide("gemma2"),
            config=sk.SRPOConfig(teacher_transform=sk.LogitTransform(0.7, softcap=4.0)),
        ),
        ValueError,
        r"config.teacher_transform must have .* of teacher, .*softcap=3.0 of Gemma2ForCausalLM, got .*softcap=4.0",
    ),
    "the model's transform": (
        changed(model=lambda: wide("granite"), config=sk.SRPOConfig(temperature=0.7)),
        ValueError,
        r"config must have the logit transform of model, .*GraniteForCausalLM, .*config_for\(model, ...\) makes one",
    ),
    "a config": (changed(config={}), TypeError, "config must be an SRPOConfig or None, got dict"),
    "other responses": (
        changed(sdpo_mask=ROUTED, teacher=other_responses()),
        ValueError,
        "got 6 tokens for 6, or others",
    ),
    "no head": (changed(model=with_embedding_alone), ValueError, "model must have an LM head, LlamaModel has none"),
    "no model": (changed(model=lambda: nn.Linear(2, 2)), TypeError, r"transformers\.PreTrainedModel, bare or wrapped"),
    "no module": (changed(model=lambda: "llama"), TypeError, "model of transformers, bare or wrapped, got str"),
    "an encoder": (
        changed(
            model=lambda: T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=8, d_kv=4, d_ff=8, num_layers=1))
        ),
        ValueError,
        "model must be a decoder alone, T5ForConditionalGeneration is an encoder and a decoder",
    ),
    "another head": (
        changed(model=lambda: tiny_model_of("bert").double()),
        ValueError,
        "model must compute its logits",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
