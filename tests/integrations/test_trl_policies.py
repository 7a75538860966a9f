"""Log-probs of the old and the reference policy in SRPOTrainer are those of the loss, in every dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from tests.tiny_trainer import (
    ScriptedGRPO,
    ScriptedSRPO,
    curve,
    one_correct,
    prompts,
    saved_model,
    tiny_model,
    tiny_trainer,
    train,
)

# The model's dtype, and options that change the dtype of its products.
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {}),
    "bf16": ("bfloat16", {}),
    "autocast": ("float32", {"bf16": True}),
    "autocast of bf16": ("bfloat16", {"bf16": True}),
    "fp32 head": ("bfloat16", {"cast_lm_head_to_fp32": True}),
}


def precision(name: str, folder: Path) -> dict[str, Any]:
    """Options of a trainer whose model has a precision; TRL loads its reference likewise."""
    dtype, options = PRECISIONS[name]
    path = saved_model(folder / "model", getattr(torch, dtype))
    return {"model": path, "model_init_kwargs": {"dtype": dtype}} | options


def lora(kind: str) -> Any:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if kind == "new adapter":
        return {"peft_config": config}
    model = peft.get_peft_model(tiny_model().bfloat16(), config)
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    return {"model": model}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("method", ["grpo", "srpo"])
def test_the_first_pass_is_on_policy(name: str, method: str, tmp_path: Path) -> None:
    options = {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "reward": one_correct}
    trainer = train(ScriptedSRPO, tmp_path, method=method, **precision(name, tmp_path), **options)
    for metric in ("srpo/approx_kl", "kl"):
        # Forwards of other rows round their hidden states otherwise: the KL is of the second order in that.
        assert abs(curve(trainer, metric)[0]) < 1e-12
        assert curve(trainer, metric)[1] > 0.0


@pytest.mark.parametrize("name", PRECISIONS)
def test_given_log_probs_are_those_of_the_loss(name: str, tmp_path: Path) -> None:
    # Twice the micro-batches of a step: the later ones need log-probs of the model that generated them.
    options = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.0, "method": "grpo", "reward": one_correct}
    trainer = train(ScriptedSRPO, tmp_path, steps_per_generation=2, beta=0.1, **precision(name, tmp_path), **options)
    assert max(map(abs, curve(trainer, "srpo/approx_kl"))) < 1e-12
    assert max(map(abs, curve(trainer, "kl"))) < 1e-12


@pytest.mark.parametrize("kind", ["new adapter", "trained adapter"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_of_an_adapter_is_the_policy_at_first(kind: str, autocast: bool, tmp_path: Path) -> None:
    options = {"beta": 0.1, "bf16": autocast, "gradient_checkpointing": True, "learning_rate": 0.1} | lora(kind)
    trainer = train(ScriptedSRPO, tmp_path, **options)
    assert abs(curve(trainer, "kl")[0]) < 1e-12
    assert curve(trainer, "kl")[1] > 0.0


def test_a_narrow_clip_in_bf16_holds_no_token_of_the_first_pass(tmp_path: Path) -> None:
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 4}
    options |= {"epsilon": 3e-4, "epsilon_high": 4e-4, "scale_rewards": "none", "learning_rate": 1e-3}
    options |= precision("bf16", tmp_path)
    ours = train(ScriptedSRPO, tmp_path / "ours", method="grpo", **options)
    theirs = train(ScriptedGRPO, tmp_path / "theirs", **options)
    assert curve(ours, "clip_ratio/region_mean")[::2] == [0.0, 0.0]
    assert curve(ours, "clip_ratio/region_mean")[1] > 0.5
    # A first step of the same weights: its gradients differ by the rounding of TRL's logits.
    assert curve(ours, "grad_norm")[0] == pytest.approx(curve(theirs, "grad_norm")[0], rel=0.02)


class Sampled(ScriptedSRPO):
    """With the log-probs of a sampler that has the model's hidden states and multiplies them in fp32, as vLLM's do."""

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        completions = self._script(len(prompt_ids))
        log_probs = []
        for prompt, completion in zip(prompt_ids, completions, strict=True):
            with torch.no_grad():
                hidden = self.model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
            logits = hidden.float() @ self.model.lm_head.weight.float().T
            tokens = torch.tensor(completion)[:, None]
            log_probs.append(logits.log_softmax(1)[len(prompt) - 1 : -1].gather(1, tokens).flatten().tolist())
        return completions, log_probs


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_importance_weights_of_an_exact_sampler_are_1(mode: str, tmp_path: Path) -> None:
    options = {"model": tiny_model().bfloat16(), "vllm_importance_sampling_mode": mode}
    # Prompts of one length: the sampler sees no padding.
    trainer = tiny_trainer(Sampled, tmp_path, dataset=prompts().select([0] * 4), **options)
    # The sampler itself, a server, is not started.
    trainer.use_vllm = True
    trainer.train()
    for name in ("min", "mean", "max"):
        assert curve(trainer, f"sampling/importance_sampling_ratio/{name}") == pytest.approx([1.0, 1.0], abs=1e-5)
    assert curve(trainer, "srpo/approx_kl") == [0.0, 0.0]


def test_the_log_probs_that_trl_asks_for(tmp_path: Path) -> None:
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, temperature=0.7)
    ids, mask = torch.randint(3, 47, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    # A short completion, and one that is masked as a whole.
    mask[1, 7:] = mask[2, 5:] = 0
    log_probs, entropy, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, 4, batch_size=2, compute_entropy=True
    )
    expected = (trainer.model(ids, attention_mask=mask).logits[:, 4:-1] / 0.7).log_softmax(2)
    valid = mask[:, 5:]
    torch.testing.assert_close(log_probs, expected.gather(2, ids[:, 5:, None])[..., 0] * valid)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(2) * valid)
    assert aux_loss is None and log_probs.requires_grad
    all_masked = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.zeros_like(mask), 4)
    assert torch.equal(all_masked[0], torch.zeros(5, 4)) and all_masked[1] is None
