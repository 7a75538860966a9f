"""The verl plugin beside verl's own losses and aggregation, and verl's discovery of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srpo_kernels.losses.options import LOSS_TYPES
from tests import verl_path

pytestmark = pytest.mark.skipif(not verl_path.INSTALLED, reason="verl is not installed: `make test` does it")

ROOT = Path(__file__).parents[2]
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    # Registered once, by the import.
    with verl_path.importable():
        yield importlib.import_module("srpo_kernels.integrations.verl.plugin")


@pytest.fixture(scope="module")
def core(plugin: ModuleType) -> ModuleType:
    return importlib.import_module("verl.trainer.ppo.core_algos")


def actor_config(**options: Any) -> Any:
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options
    )
    config.global_batch_info.update(dp_size=2, batch_num_tokens=50, global_batch_size=11, loss_scale_factor=7)
    return config


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Off-policy by up to a factor of e, so that every clip bites; the last sequence is masked."""
    draw = torch.Generator().manual_seed(seed)
    old = -3.0 * torch.rand(6, 9, generator=draw)
    mask = torch.rand(6, 9, generator=draw) < 0.7
    mask[-1] = False
    return {
        "old_log_prob": old,
        "log_prob": (old + torch.randn(6, 9, generator=draw)).requires_grad_(),
        "advantages": torch.randn(6, 1, generator=draw).expand(6, 9),
        "response_mask": mask,
    }


def run(loss_fn: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    loss, metrics = loss_fn(**inputs, **options)
    return loss, torch.autograd.grad(loss, inputs["log_prob"])[0], metrics


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("ours", "theirs"), [("srpo_grpo", "vanilla"), ("srpo_cispo", "cispo"), ("srpo_reinforce", "gpg")]
)
@pytest.mark.parametrize("corrected", [False, True])
def test_policy_losses_are_verls(core: ModuleType, ours: str, theirs: str, aggregation: str, corrected: bool) -> None:
    inputs = batch()
    options = {
        "config": actor_config(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5),
        "loss_agg_mode": aggregation,
        "rollout_is_weights": torch.rand(6, 9) if corrected else None,
    }
    loss, gradient, metrics = run(core.get_policy_loss_fn(ours), inputs, **options)
    expected, expected_gradient, expected_metrics = run(core.get_policy_loss_fn(theirs), inputs, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum() > 0
    if theirs == "vanilla":
        assert metrics == pytest.approx(expected_metrics)
        assert metrics["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize(("ours", "theirs"), [("srpo_gspo", "gspo"), ("srpo_sapo", "sapo")])
def test_sequence_losses_are_verls(core: ModuleType, ours: str, theirs: str) -> None:
    inputs, config = batch(), actor_config(clip_ratio_high=0.28, tau_pos=0.5, tau_neg=2.0)
    options = {"config": config, "loss_agg_mode": "seq-mean-token-mean"}
    loss, gradient, metrics = run(core.get_policy_loss_fn(ours), inputs, **options)
    expected, expected_gradient, expected_metrics = run(core.get_policy_loss_fn(theirs), inputs, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["actor/ppo_kl"] == pytest.approx(expected_metrics["actor/ppo_kl"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("srpo_grpo", "vanilla"), ("srpo_cispo", "cispo"), ("srpo_gspo", "gspo"), ("srpo_sapo", "sapo")],
)
def test_metrics_are_verls_for_any_ratio(core: ModuleType, ours: str, theirs: str) -> None:
    inputs = batch()
    inputs |= {name: inputs[name].detach().clone() for name in ("log_prob", "advantages")}
    # Beyond verl's clamp of 20 nats, once to either side; and an advantage of 0.
    for sequence, (new, old) in ((0, (0.0, -60.0)), (2, (-45.0, 0.0))):
        inputs["log_prob"][sequence, 0], inputs["old_log_prob"][sequence, 0] = new, old
        inputs["response_mask"][sequence, 0] = True
    inputs["advantages"][1] = 0.0
    config = actor_config(clip_ratio_low=0.2, clip_ratio_high=0.28)
    metrics = core.get_policy_loss_fn(ours)(**inputs, config=config)[1]
    assert metrics == pytest.approx(core.get_policy_loss_fn(theirs)(**inputs, config=config)[1], rel=1e-5)
    assert metrics["actor/ppo_kl"] != 0.0


def test_masked_values_are_never_read(core: ModuleType) -> None:
    inputs = batch()
    loss_fn = core.get_policy_loss_fn("srpo_grpo")
    loss, gradient, metrics = run(loss_fn, inputs, config=actor_config())
    mask = inputs["response_mask"]
    spoilt = inputs | {"old_log_prob": inputs["old_log_prob"].masked_fill(~mask, float("nan"))}
    spoilt["log_prob"] = inputs["log_prob"].detach().masked_fill(~mask, float("inf")).requires_grad_()
    again, gradient_again, metrics_again = run(loss_fn, spoilt, config=actor_config())
    assert torch.equal(again, loss) and torch.equal(gradient_again, gradient) and metrics_again == metrics


def test_what_a_hook_cannot_express_is_refused(core: ModuleType, plugin: ModuleType) -> None:
    for name in plugin.REFUSED:
        with pytest.raises(NotImplementedError, match="needs the hidden states of student and teacher"):
            core.get_policy_loss_fn(name)(**batch(), config=actor_config())
    with pytest.raises(ValueError, match="config must be"):
        core.get_policy_loss_fn("srpo_grpo")(**batch())


def distillation_data(lengths: list[tuple[int, int]]) -> tuple[Any, Tensor, Tensor]:
    """verl's form of a batch without padding: the model's log-probs of all tokens, the teacher's with one more axis."""
    tensordict = importlib.import_module("tensordict")
    total = sum(prompt + response for prompt, response in lengths)
    prompts = [torch.zeros(prompt, dtype=torch.long) for prompt, _ in lengths]
    responses = [torch.zeros(response, dtype=torch.long) for _, response in lengths]
    nested = {"prompts": prompts, "responses": responses}
    nested["response_mask"] = [torch.rand(response) < 0.8 for _, response in lengths]
    nested["old_log_probs"] = [-torch.rand(response) for _, response in lengths]
    data = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in nested.items()}
    student, teacher = -2.0 * torch.rand(total), -2.0 * torch.rand(total, 1)
    data["teacher_logprobs"] = torch.nested.nested_tensor_from_jagged(
        teacher, offsets=torch.tensor([0, *(a + b for a, b in lengths)]).cumsum(0)
    )
    batch = tensordict.TensorDict(data, batch_size=len(lengths))
    for name, value in {"dp_size": 1, "batch_num_tokens": 10, "global_batch_size": 3}.items():
        batch.set_non_tensor(name, value)
    return batch, student.requires_grad_(), teacher


def distillation_config(**options: Any) -> Any:
    defaults: dict[str, Any] = {"loss_mode": "srpo_sampled", "loss_max_clamp": None, "use_policy_gradient": False}
    values = defaults | {"use_task_rewards": False} | options
    return SimpleNamespace(enabled=True, distillation_loss=SimpleNamespace(**values))


def test_the_distillation_loss_goes_through_verls_own_function(plugin: ModuleType) -> None:
    losses = importlib.import_module("verl.trainer.distillation.losses")
    lengths = [(3, 4), (2, 6), (4, 2)]
    data, student, teacher = distillation_data(lengths)
    loss, metrics = losses.distillation_loss(actor_config(), distillation_config(), {"log_probs": student}, data)

    expected, start = torch.zeros(()), 0
    for row, (prompt, response) in enumerate(lengths):
        # A model's output at a token is of the token after it.
        tokens = slice(start + prompt - 1, start + prompt + response - 1)
        start += prompt + response
        p, q = student[tokens], teacher[tokens, 0]
        kappa = (p.detach() - data["old_log_probs"][row]).exp().clamp(max=2.0)
        expected = expected + (kappa * (p.detach() - q) * p)[data["response_mask"][row]].sum()
    torch.testing.assert_close(loss, expected / 10)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected / 10)))
    assert "distillation/reverse_kl" in metrics

    for name, value in (("loss_max_clamp", 10.0), ("use_policy_gradient", True)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            config = distillation_config(**{name: value})
            losses.distillation_loss(actor_config(), config, {"log_probs": student}, data)


def test_verl_finds_the_plugin_by_its_entry_point(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The metadata that an installation writes.
    metadata = tmp_path / "srpo_kernels_test-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: srpo-kernels-test\nVersion: 0\n")
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    lines = ["[verl.plugins]", *(f"{name} = {value}" for name, value in group.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    # Modules of the environment come before the plugins.
    (tmp_path / "my_losses.py").write_text(
        "import srpo_kernels as sk\nsk.register_policy_loss('mine', lambda rows: -rows.advantages * rows.log_probs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path), *verl_path.PATHS]))
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "my_losses")

    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "auto")
    command = [sys.executable, "-m", "srpo_kernels.integrations.verl"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    for name in (*(f"srpo_{name}" for name in LOSS_TYPES), "srpo_sampled", "srpo_mine"):
        assert name in found.stdout

    # Every question is a process that imports verl: whether the trainer is there has been asked.
    self_check = importlib.import_module(f"{command[-1]}.__main__")
    monkeypatch.setattr(self_check, "_report_trainer", lambda: True)
    monkeypatch.setattr(sys, "argv", command[-1:])
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert self_check.main() == 1
    assert "has not loaded the plugin" in capsys.readouterr().out
