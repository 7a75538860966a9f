"""The programs of examples/distributed: started alone, and with padding on either side."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

pytest.importorskip("transformers", reason="the examples' models need transformers")

from examples.distributed.rollouts import last_hidden_states, make_policy, make_rollouts


@pytest.mark.parametrize("program", ["ddp", "fsdp2", "sequence_parallel"])
def test_a_program_without_torchrun_says_what_to_run(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    module = importlib.import_module(f"examples.distributed.{program}")
    command = f"torchrun --standalone --nproc-per-node 2 -m examples.distributed.{program}"
    assert command in module.__doc__
    with pytest.raises(SystemExit, match=re.escape(command)):
        module.main()


def test_hidden_states_do_not_depend_on_padding() -> None:
    policy, rollouts = make_policy(), make_rollouts(4)
    mask = rollouts.attention_mask
    assert torch.equal(mask[:, 1:].bool() & (torch.arange(8) >= 2), rollouts.mask)
    with torch.no_grad():
        hidden = last_hidden_states(policy, rollouts.ids, mask)
        for row in range(4):
            length = int(mask[row].sum())
            before = rollouts.ids.new_zeros(1, 3)
            padded = torch.cat([before, rollouts.ids[row : row + 1, :length]], 1)
            shifted = last_hidden_states(policy, padded, torch.cat([before, mask[row : row + 1, :length]], 1))
            torch.testing.assert_close(shifted[0, 3:], hidden[row, :length], rtol=0.0, atol=1e-5)
