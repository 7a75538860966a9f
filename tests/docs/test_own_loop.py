"""README's loop and docs/own_loop.md run with models that have a softcap, a scale and a bias, and are right."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "5", reason="the integration needs transformers >= 5")

import reference
import srpo_kernels as sk
from srpo_kernels.integrations.transformers import response_loss, teacher_rows
from tests.tiny_models import tiny_model_of

ROOT = Path(__file__).parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
}
IDS = torch.randint(10, 90, (4, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 0, 1, 1, 1, 0, 0], [0] + [1] * 7])
RESPONSES = (MASK == 1) & (torch.arange(8) > 3)
REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
ROUTED = torch.tensor([False, True, True, False])
# The distilled rows behind two more tokens.
SHOWN = (
    torch.cat([torch.full((2, 2), 7), IDS[ROUTED]], 1),
    torch.nn.functional.pad(MASK[ROUTED], (2, 0), value=1),
    torch.nn.functional.pad(RESPONSES[ROUTED], (2, 0)),
)


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def model_of(name: str) -> Any:
    model = tiny_model_of(name, **MODELS[name])
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def log_probs(model: Any, ids: Tensor, mask: Tensor, responses: Tensor) -> Tensor:
    """``[N, V]`` in fp64, from the model's own logits of each row without its padding."""
    parts = []
    for row, valid, response in zip(ids, mask.bool(), responses, strict=True):
        logits = model(input_ids=row[None, valid]).logits[0, :-1].double()
        parts.append(logits.log_softmax(-1)[response[valid][1:]])
    return torch.cat(parts)


@torch.no_grad()
def expected_loss(model: Any, sdpo_mask: Tensor | None, **options: Any) -> float:
    rows, eye = RESPONSES.nonzero()[:, 0], torch.eye(96, dtype=torch.float64)
    taught: dict[str, Any] = {}
    if sdpo_mask is not None:
        taught = {"sdpo_mask": sdpo_mask[rows], "teacher_hidden": log_probs(model, *SHOWN), "teacher_weight": eye}
    return reference.srpo_loss(
        log_probs(model, IDS, MASK, RESPONSES),
        eye,
        IDS[RESPONSES],
        advantages=sk.group_advantages(REWARDS, GROUPS)[rows].double(),
        config=sk.SRPOConfig(**options),
        **taught,
    ).loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_the_loop_of_readme_trains_on_the_models_own_log_probs(name: str) -> None:
    (lines,) = (block for block in blocks("README.md") if "response_loss(" in block)
    assert sum(bool(line.strip()) and "import" not in line for line in lines.splitlines()) == 12
    model = model_of(name)
    start, expected = copy.deepcopy(model.state_dict()), expected_loss(model, ROUTED)
    names: dict[str, Any] = {
        "model": model,
        "rollouts": [(IDS, MASK, RESPONSES, REWARDS, GROUPS)],
        "show_solutions": lambda ids, routing: SHOWN,
    }
    exec(lines, names)
    assert names["out"].loss.item() == pytest.approx(expected, rel=1e-5)
    for key, average in names["teacher"].state_dict().items():
        torch.testing.assert_close(average, start[key].lerp(model.state_dict()[key], 0.05))
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, start[key])]
    assert {"gemma2": "model.embed_tokens.weight", "granite": "lm_head.weight", "phi": "lm_head.bias"}[name] in moved


@pytest.mark.parametrize("name", MODELS)
def test_the_page_runs_and_says_the_loss(name: str) -> None:
    model = model_of(name)
    parts = [tuple(x[:1] for x in SHOWN), tuple(x[1:] for x in SHOWN)]
    names: dict[str, Any] = {
        "model": model,
        "input_ids": IDS,
        "attention_mask": MASK,
        "response_mask": RESPONSES,
        "advantages": sk.group_advantages(REWARDS, GROUPS),
        "teacher_ids": SHOWN[0],
        "teacher_attention_mask": SHOWN[1],
        "teacher_response_mask": SHOWN[2],
        "sdpo_mask": ROUTED,
        "half": 2,
        "teacher_micro_batches": parts,
    }
    step, old, teachers, micro_batches, own = blocks("docs/own_loop.md")
    policy, both = expected_loss(model, None), expected_loss(model, ROUTED)
    exec(step, names)
    assert names["out"].loss.item() == pytest.approx(policy, rel=1e-5)
    exec(old, names)
    assert names["out"].loss.item() == pytest.approx(policy, rel=1e-5)
    exec(teachers, names)
    assert names["out"].loss.item() == pytest.approx(both, rel=1e-5)
    model.zero_grad()
    exec(micro_batches, names)
    head = model.get_output_embeddings().weight
    whole = response_loss(
        model,
        IDS,
        MASK,
        response_mask=RESPONSES,
        advantages=names["advantages"],
        sdpo_mask=ROUTED,
        teacher=teacher_rows(names["teacher"], *SHOWN[:2], response_mask=SHOWN[2]),
    )
    torch.testing.assert_close(head.grad, *torch.autograd.grad(whole.loss, [head]), rtol=1e-4, atol=1e-6)
    exec(own, names)
    assert names["entropy"].requires_grad
