"""The lines of docs/recipes.md run on batches laid out as each framework has them, and give its loss."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the recipes are for models of transformers")

from srpo_kernels.integrations.transformers import config_for
from tests.tiny_models import VOCAB, tiny_model_of

DOCUMENT = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
PROMPT, LENGTH = 4, 5
RESPONSES = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
# Two ranks, and as many tokens in the other one's micro-batch.
TOKENS = 2.0 * RESPONSES.sum()


class Case:
    """Three rows with left padding, tools' tokens and old log-probs, and the loss of the model's own logits."""

    def __init__(self) -> None:
        self.model = tiny_model_of("granite", logits_scaling=0.5)
        self.config = config_for(self.model, temperature=0.8)
        self.ids = torch.randint(3, VOCAB, (3, PROMPT + LENGTH))
        prompts = torch.arange(PROMPT) >= torch.tensor([0, 2, 1])[:, None]
        self.attended = torch.cat([prompts, RESPONSES], 1).long()
        self.mask = RESPONSES.clone()
        self.mask[2, 2] = 0
        self.advantages = torch.randn(3, LENGTH)
        self.old = self.log_probs().detach() + 0.3 * torch.randn(3, LENGTH)

    def log_probs(self) -> Tensor:
        """``[3, LENGTH]``, each row without its padding."""
        rows = []
        for ids, attended in zip(self.ids, self.attended, strict=True):
            first = int(attended.argmax())
            logits = self.model(ids[None, first:]).logits[0, -LENGTH - 1 : -1] / self.config.temperature
            rows.append(logits.log_softmax(-1).gather(1, ids[-LENGTH:, None])[:, 0])
        return torch.stack(rows)

    def token_losses(self) -> Tensor:
        ratio = (self.log_probs() - self.old).exp()
        clipped = ratio.clamp(1 - self.config.epsilon_low, 1 + self.config.epsilon_high)
        return -torch.minimum(ratio * self.advantages, clipped * self.advantages) * self.mask


def openrlhf(case: Case, run: Any) -> tuple[Tensor, Tensor]:
    worker = SimpleNamespace(actor=SimpleNamespace(model=case.model), config=case.config)
    experience = SimpleNamespace(
        sequences=case.ids,
        attention_mask=case.attended,
        action_mask=case.mask,
        advantages=case.advantages,
        action_log_probs=case.old,
    )
    return run(worker, experience, {"batch_num_tokens": TOKENS, "dp_size": 2}), case.token_losses().sum() / TOKENS * 2


def skyrl(case: Case, run: Any) -> tuple[Tensor, Tensor]:
    worker = SimpleNamespace(model=SimpleNamespace(model=case.model), config=case.config)
    worker.mesh_rank = SimpleNamespace(dp_size=2)
    experience = SimpleNamespace(
        sequences=case.ids,
        attention_mask=case.attended,
        loss_mask=case.mask.float(),
        advantages=case.advantages,
        action_log_probs=case.old,
    )
    return run(worker, experience), case.token_losses().sum() * 2


def ms_swift(case: Case, run: Any) -> tuple[Tensor, Tensor]:
    batch = SimpleNamespace(completion_mask=case.mask.bool(), advantages=case.advantages, old_per_token_logps=case.old)
    inputs = {"input_ids": case.ids, "attention_mask": case.attended, "labels": case.ids, "logits_to_keep": LENGTH}
    trainer = SimpleNamespace(config=case.config)
    return run(trainer, case.model, inputs, batch), case.token_losses().sum() / case.mask.sum()


def nemo_rl(case: Case, run: Any) -> tuple[Tensor, Tensor]:
    # Its rows have no padding before them, and the last one is not in the loss.
    ids, attended = torch.zeros_like(case.ids), torch.zeros_like(case.ids)
    lengths = case.attended.sum(1)
    whole = {name: torch.zeros(3, PROMPT + LENGTH) for name in ("token_mask", "advantages", "prev_logprobs")}
    given = {"token_mask": case.mask, "advantages": case.advantages, "prev_logprobs": case.old}
    for row, length in enumerate(lengths.tolist()):
        kept = case.attended[row].bool()
        ids[row, :length], attended[row, :length] = case.ids[row, kept], 1
        for name, values in whole.items():
            values[row, :length] = torch.nn.functional.pad(given[name][row].float(), (PROMPT, 0))[kept]
    data = {"input_ids": ids, "input_lengths": lengths, "sample_mask": torch.tensor([1.0, 1.0, 0.0]), **whole}
    loss = run(SimpleNamespace(config=case.config), case.model, data, TOKENS)
    return loss, case.token_losses()[:2].sum() / TOKENS


def slime(case: Case, run: Any) -> tuple[Tensor, Tensor]:
    lengths = RESPONSES.sum(1).tolist()

    def parts(values: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(values, lengths, strict=True)]

    batch = {"advantages": parts(case.advantages), "log_probs": parts(case.old), "loss_masks": parts(case.mask)}
    loss = run(parts(case.log_probs()), batch, lambda values: values.sum() / TOKENS, case.config)
    return loss, case.token_losses().sum() / TOKENS


@pytest.mark.parametrize("framework", [openrlhf, skyrl, ms_swift, nemo_rl, slime])
def test_a_recipe_is_the_loss_of_the_models_own_logits(framework: Any) -> None:
    first, *blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if f"def {framework.__name__}(" in block)
    names: dict[str, Any] = {}
    exec(first + block, names)
    case = Case()
    loss, expected = framework(case, names[framework.__name__])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(case.model.parameters())
    ours = torch.autograd.grad(loss, parameters)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
