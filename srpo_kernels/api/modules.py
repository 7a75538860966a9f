"""The loss as a module, for trainers that hold their losses as such."""

from __future__ import annotations

from typing import Any

from torch import nn

from srpo_kernels.api.srpo import srpo_loss
from srpo_kernels.api.types import SRPOOutput
from srpo_kernels.api.validation import check_backend, check_config, check_workspace
from srpo_kernels.losses.config import SRPOConfig


class SRPOLoss(nn.Module):
    """``srpo_loss`` with its configuration bound; it has no parameters.

    ``forward`` takes every argument of ``srpo_loss`` but ``config``, ``backend`` and ``workspace_bytes``, and returns
    its ``SRPOOutput``. Source: arXiv 2604.02288, section 3.
    """

    def __init__(
        self, config: SRPOConfig | None = None, *, backend: str = "auto", workspace_bytes: int | None = None
    ) -> None:
        super().__init__()
        config = SRPOConfig() if config is None else config
        check_config(config)
        check_backend(backend)
        check_workspace(workspace_bytes)
        self.config = config
        self.backend = backend
        self.workspace_bytes = workspace_bytes

    def forward(self, *args: Any, **kwargs: Any) -> SRPOOutput:
        """Run ``srpo_loss``."""
        return srpo_loss(
            *args, config=self.config, backend=self.backend, workspace_bytes=self.workspace_bytes, **kwargs
        )

    def extra_repr(self) -> str:
        """The configuration and the backend."""
        return f"{self.config}, backend={self.backend!r}"
