"""Vision-language models and processors small enough to train in a test, of three layouts of image tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.tiny_trainer import tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}IMAGE {% else %}{{ block['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


class PictureProcessor(Qwen2VLProcessor):
    """Qwen's without videos, whose own class needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    """A `tiny_tokenizer` with these special tokens, from 47 on."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def llava() -> tuple[Any, ProcessorMixin]:
    """One row of pixels per image, which is four tokens."""
    tokenizer = with_tokens("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**SIZES, **IDS, vocab_size=48),
        image_token_index=47,
        vision_feature_layer=-1,
        **IDS,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return config, processor


def qwen2_vl() -> tuple[Any, ProcessorMixin]:
    """As many rows of pixels and tokens as an image is large, and ``mm_token_type_ids``."""
    tokenizer = with_tokens("<start>", "<image>", "<end>", "<video>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config={**SIZES, **IDS, "vocab_size": 51, "num_key_value_heads": 1, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        vision_start_token_id=47,
        image_token_id=48,
        vision_end_token_id=49,
        video_token_id=50,
        **IDS,
    )
    processor = PictureProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            min_pixels=8 * 8, max_pixels=32 * 32, patch_size=4, merge_size=2, temporal_patch_size=1
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", "<start><image><end>"),
    )
    return config, processor


def gemma3() -> tuple[Any, ProcessorMixin]:
    """``token_type_ids``, by which the tokens of an image see each other."""
    tokenizer: Any = with_tokens("<soft>", "<image>", "<end>")
    tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token = "<soft>", "<image>", "<end>"
    tokenizer.image_token_id, tokenizer.boi_token_id = 47, 48
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES, **IDS, vocab_size=50, num_key_value_heads=1, head_dim=8),
        vision_config=SiglipVisionConfig(**SIZES, image_size=16, patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=47,
        boi_token_index=48,
        eoi_token_index=49,
        **IDS,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return config, processor


KINDS = {"llava": llava, "qwen2_vl": qwen2_vl, "gemma3": gemma3}


def saved_pictures(kind: str, folder: Path) -> dict[str, Any]:
    """The ``model``, a path, and ``processing_class`` of a `tiny_trainer`, and a ``dataset`` of pictures."""
    config, processor = KINDS[kind]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.save_pretrained(folder)
    return {"model": str(folder), "processing_class": processor, "dataset": pictures()}


def pictures() -> Dataset:
    """Prompts with one picture, another, two, and one: TRL takes none without."""
    texts = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
    sizes = [[("red", 16, 16)], [("grey", 16, 16)], [("green", 24, 16), ("white", 16, 32)], [("blue", 32, 16)]]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "images": [[Image.new("RGB", (width, height), colour) for colour, width, height in row] for row in sizes],
        }
    )


def hidden_alone(model: Any, processor: Any, prompt: Any, completion: list[int]) -> Tensor:
    """The states ``[T, H]`` that predict a completion, of a row alone, as the processor makes it of a prompt."""
    inputs = processor.apply_chat_template(
        [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    added = {"input_ids": torch.tensor([completion]), "attention_mask": torch.ones(1, len(completion))}
    for name, values in added.items():
        inputs[name] = torch.cat([inputs[name], values.to(inputs[name])], 1)
    for name in inputs.keys() & {"token_type_ids", "mm_token_type_ids"}:
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    hidden: Tensor = model.model(**inputs).last_hidden_state
    return hidden[0, length - 1 : -1]
