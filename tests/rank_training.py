"""Two steps of training a model of transformers with a moving average, by one process or by the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import srpo_kernels as sk
from srpo_kernels.integrations.transformers import (
    AverageTeacher,
    config_for,
    response_loss,
    response_normalizers,
    teacher_rows,
)
from tests.tiny_models import tiny_model_of

IDS = torch.randint(10, 90, (4, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1] * 6 + [0] * 2, [0] + [1] * 7])
RESPONSES = (MASK == 1) & (torch.arange(8) > 3)
ADVANTAGES, ROUTED = torch.tensor([0.5, -0.3, 0.8, -1.0]), torch.tensor([False, True, False, False])


def model_of(tied: bool = True) -> Any:
    return tiny_model_of("gemma2", final_logit_softcapping=5.0, tie_word_embeddings=tied)


def train(
    model: nn.Module,
    wrapped: nn.Module,
    rows: slice,
    backend: str = "auto",
    step_of: Callable[[Tensor], None] | None = None,
) -> dict[str, Any]:
    """Two steps on ``rows`` of the batch, of which the second one has a teacher that has moved.

    ``step_of`` makes an optimizer step of a loss; None: PyTorch's own.
    """
    teacher, config = AverageTeacher(wrapped, 0.5), config_for(model, entropy_coef=0.01)
    gradients: dict[str, Tensor] = {}
    # Before a forward, after which FSDP2 may have other parameters.
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)

    def step_of_torch(loss: Tensor) -> None:
        loss.backward()
        gradients.update({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()

    step_of = step_of or step_of_torch
    ids, mask, responses, routed = IDS[rows], MASK[rows], RESPONSES[rows], ROUTED[rows]
    losses, rows_taught = [], None
    for step in range(2):
        # A rank with nothing to distill runs a row too, of which nothing is in the loss.
        shown = routed if routed.any() else torch.arange(len(routed)) == 0
        taught = teacher_rows(
            teacher, ids[shown], mask[shown], response_mask=(responses & routed[:, None])[shown], config=config,
            backend=backend,
        )  # fmt: skip
        norms = response_normalizers(responses, routed, taught, config=config).all_reduce()
        # The second step leaves it to the call to run the teacher, on the same rows.
        out = response_loss(
            wrapped, ids, mask, response_mask=responses, advantages=ADVANTAGES[rows], sdpo_mask=routed,
            teacher=taught if step == 0 else teacher, normalizers=norms, config=config, backend=backend,
        )  # fmt: skip
        losses.append(out.loss.detach())
        step_of(sk.scale_for_gradient_mean(out.loss))
        teacher.update()
        rows_taught = out.log_probs
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "averages": teacher.state_dict(),
        "parameters": {name: whole(p.detach()) for name, p in model.named_parameters()},
        "log_probs": rows_taught,
    }


def assert_train_as(model: Any, ranks: list[dict[str, Any]]) -> None:
    """What `train` returned on two ranks is what it returns of one process, with ``model`` and all rows."""
    expected = train(model, model, slice(0, 4), "torch")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ranks[0]["losses"] + ranks[1]["losses"], expected["losses"], **close)
    torch.testing.assert_close(torch.cat([rank["log_probs"] for rank in ranks]), expected["log_probs"], **close)
    for rank in ranks:
        for key in ("averages", "parameters"):
            assert rank[key].keys() == expected[key].keys(), key
            torch.testing.assert_close(rank[key], expected[key], msg=lambda text, key=key: f"{key}: {text}", **close)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def shard(model: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)
