"""The trainer's loss of a completion does not depend on the padding of its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.integrations.test_trl_trainer import scored_batch
from tests.tiny_models import tiny_model_of
from tests.tiny_trainer import ScriptedSRPO, tiny_trainer


@pytest.mark.parametrize("name", ["gpt2", "recurrent_gemma", "bart"])
def test_the_trainer_scores_completions_alike_behind_any_padding(name: str, tmp_path: Path) -> None:
    model = tiny_model_of(name, vocab_size=47, pad_token_id=0, eos_token_id=1, is_encoder_decoder=False)
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, model=model)
    # Without dropout, of which another shape of the batch would draw another.
    trainer.model.eval()
    batch = scored_batch(trainer)
    trainer.model.eval()
    teacher = batch["teacher"].hidden
    results = []
    for padding in (0, 3):
        for name in ("prompt_ids", "prompt_mask"):
            batch[name] = nn.functional.pad(batch[name], (padding, 0))
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)

    alone = []
    for row in batch["sdpo_mask"].nonzero().flatten().tolist():
        part = {key: value[row : row + 1] for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        part["teacher_prompt_ids"] = [batch["teacher_prompt_ids"][row]]
        alone.append(trainer._forwards.teacher_rows(trainer.teacher, part, trainer._tokenizer.pad_token_id).hidden)
    torch.testing.assert_close(teacher, torch.cat(alone), rtol=1e-4, atol=1e-5)
