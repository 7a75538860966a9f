"""The logit transform and a log-sum-exp as the kernels take them: in base 2, rounded to fp32."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_kernels.rows.spec import LogitTransform


class Transform(NamedTuple):
    """The logit transform in two numbers: a logit in base 2 is ``slope2 * unit``, with ``unit = tanh(inner * raw)``.

    Without a softcap the unit is the raw logit.
    """

    inner: float
    slope2: float
    softcap: bool

    @classmethod
    def of(cls, transform: LogitTransform) -> Transform:
        """``transform`` in these numbers."""
        softcap, slope2 = transform.softcap, _fp32(transform.nats_per_unit / math.log(2.0))
        return cls(0.0, slope2, False) if softcap is None else cls(transform.logit_scale / softcap, slope2, True)

    @property
    def slope(self) -> float:
        """A logit per unit, in nats."""
        return self.slope2 * math.log(2.0)


def _fp32(x: float) -> float:
    """As a kernel sees it: what is computed on both sides must agree to the last digit."""
    return ctypes.c_float(x).value


class Base2(NamedTuple):
    """Log-sum-exps in base 2, ``[n, models]``: ``high`` is what a kernel takes, ``low`` what that lacks."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, logsumexps: list[Tensor], dtype: torch.dtype) -> Base2:
        """From nats in a wider dtype, ``[n, 1]`` of each model."""
        whole = (logsumexps[0] if len(logsumexps) == 1 else torch.cat(logsumexps, dim=1)) / math.log(2.0)
        high = whole.to(dtype)
        return cls(high, (whole - high).to(dtype))

    @property
    def correction(self) -> Tensor:
        """What turns a kernel's probabilities into the true ones."""
        return torch.exp2(-self.low)
