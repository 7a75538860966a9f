"""What products of bf16 dlogits round beyond a few roundings of fp32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from srpo_kernels.engine import gemm
from srpo_kernels_reference.logits import project_wide

# Half a unit in the last place of bf16, whose numbers have 8 bits.
_BF16_ROUNDING = 2.0**-8


class GradientTerms:
    """The oracle's ``project``, which remembers the sizes of the terms that its gradients sum.

    With dlogits ``d [n, V]``: ``|d| @ |weight|`` for hidden states, ``|d|.T @ |hidden|`` for the weight, and
    ``|d|.sum(0)`` for the bias. A product of dlogits that were rounded to bf16 is off by 2^-8 of them at the most,
    however much of a sum cancels.
    """

    def __init__(self) -> None:
        # Of the hidden states the largest, of the head all that is added up.
        self._hidden = 0.0
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = project_wide(hidden, weight, bias)
        if logits.requires_grad:
            logits.register_hook(partial(self._add, hidden.detach().float(), weight.detach().float()))
        return logits

    def _add(self, hidden: Tensor, weight: Tensor, dlogits: Tensor) -> None:
        sizes = dlogits.abs().float()
        if not len(sizes):
            return
        self._hidden = max(self._hidden, float((sizes @ weight.abs()).max()))
        of_weight, of_bias = sizes.T @ hidden.abs(), sizes.sum(0)
        self._weight = of_weight if self._weight is None else self._weight + of_weight
        self._bias = of_bias if self._bias is None else self._bias + of_bias

    def largest(self) -> dict[str, float]:
        """The largest size of each gradient's terms, by the gradient's name."""
        head = {"grad weight": self._weight, "grad bias": self._bias}
        return {"grad hidden": self._hidden} | {k: 0.0 if x is None else float(x.max()) for k, x in head.items()}

    def rounding(self, weight: Tensor) -> dict[str, float]:
        """How far each gradient may be off for its dlogits being rounded, with this LM head on this device."""
        rounds = gemm.dlogits_dtype(weight, torch.float32) == torch.bfloat16
        return {name: _BF16_ROUNDING * rounds * size for name, size in self.largest().items()}
