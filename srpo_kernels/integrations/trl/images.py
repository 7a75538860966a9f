"""The images of some rows of a micro-batch, whose tensors are of images or tiles: a row has any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from srpo_kernels.integrations.trl.teacher import pad_left

# What TRL's batches have of images: how many a row has, and what a forward takes.
_COUNTS = ("num_images", "num_tiles")
_IMAGES = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    "image_position_ids",
)
# And what it takes of tokens, ``[B, P + T]``: which of them are an image's.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def image_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """What the forward of some ``rows`` of a micro-batch takes beside their tokens; nothing without images."""
    picked: dict[str, Any] = {}
    batch = {name: inputs[name] for name in (*_COUNTS, *_IMAGES) if inputs.get(name) is not None}
    for name, values in split_pixel_values_by_grid(batch).items():
        picked[name] = values[rows] if isinstance(values, Tensor) else [values[row] for row in rows.tolist()]
    images = unsplit_pixel_values_by_grid(picked)
    # A vision tower does not take an empty batch.
    taken = {name: images[name] for name in _IMAGES if name in images and len(images.get("pixel_values", ()))}
    return taken | {name: inputs[name][rows] for name in _TOKEN_TYPES if name in inputs}


def with_an_image(rows: Tensor, inputs: dict[str, Any]) -> Tensor:
    """``rows``, ``[B]`` bool, and the first row with an image where none of them has one.

    The vision tower is in every forward of a micro-batch with images: DDP waits for its gradients, FSDP2 for its rank.
    """
    has_image = torch.tensor([count > 0 for count in inputs.get("num_images") or ()], device=rows.device)
    if not has_image.any() or rows[has_image].any():
        return rows
    first = torch.arange(len(rows), device=rows.device) == has_image.int().argmax()
    return rows | first


def teacher_token_types(
    inputs: dict[str, Any], processor: Any, prompts: Sequence[list[int]]
) -> dict[str, list[list[int]]]:
    """The token types of the teacher's ``prompts``, by the names that `teacher_image_inputs` reads.

    An empty prompt is the student's own. Raises ValueError for a processor whose types do not follow from token ids.
    """
    types: dict[str, list[list[int]]] = {}
    for name in _TOKEN_TYPES:
        if name not in inputs:
            continue
        types[f"teacher_{name}"] = []
        rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs[name], prompts, strict=True)
        for ids, mask, given, prompt in rows:
            own = given[: len(mask)][mask].tolist()
            if _types(processor, ids[mask].tolist()) != own:
                raise ValueError(
                    f"processing_class must mark the tokens of images as create_mm_token_type_ids does, for {name} of "
                    f"a teacher's prompt; {type(processor).__name__} marks others"
                )
            types[f"teacher_{name}"].append(_types(processor, prompt) if prompt else own)
    return types


def _types(processor: Any, ids: list[int]) -> list[int]:
    types: list[int] = processor.create_mm_token_type_ids([ids])[0]
    return types


def media_tokens(processor: Any) -> set[str]:
    """What a processor takes for an image, a video or a sound in a text."""
    ids = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
    names = processor.tokenizer.convert_ids_to_tokens([index for index in ids if index is not None])
    return {*processor.all_special_multimodal_tokens, *names}


def teacher_image_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """`image_inputs` of rows whose completions are behind the teacher's prompts, padded on the left."""
    taken = image_inputs(inputs, rows)
    for name in taken.keys() & set(_TOKEN_TYPES):
        prompts = pad_left([inputs[f"teacher_{name}"][row] for row in rows.tolist()], 0, rows.device)[0]
        taken[name] = torch.cat([prompts, taken[name][:, inputs["prompt_ids"].shape[1] :]], 1)
    return taken
