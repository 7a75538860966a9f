"""Numbers of a divergence that rows have of their own."""

from __future__ import annotations

import math

import torch

from srpo_kernels import SRPOConfig
from srpo_kernels.rows.mixture import has_mixture
from tests.fuzz.case import Draw
from tests.fuzz.models import Inputs

CLIPS = (1e-3, 0.05, 1.0)
_ALPHAS = torch.tensor([0.5, 0.1, 0.9, 1e-3, 0.999, 0.0, 1.0], dtype=torch.float64)


def own_numbers(draw: Draw, config: SRPOConfig, rows: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """An alpha and a bound of each row, or of each sequence, where the config's divergence reads them."""
    inputs: Inputs = {}
    if config.distillation_mode == "sampled":
        return inputs
    if has_mixture(config.divergence):
        shape = draw.one_of("divergence_alpha", None, None, rows, rows[:1])
        if shape is not None:
            # The ends are a jsd's alone.
            known = _ALPHAS if config.divergence == "jsd" else _ALPHAS[:-2]
            inputs["divergence_alpha"] = known[draw.ids(len(known), *shape)].to(dtype)
    if draw.one_of("row_clip", False, False, False, True):
        clips = torch.tensor([*CLIPS, math.inf], dtype=dtype)
        inputs["divergence_clip"] = clips[draw.ids(len(clips), *rows)]
    return inputs
