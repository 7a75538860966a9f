"""The loss of an engine beside verl's own `ppo_loss`, by the name that verl's option has: value and gradient."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from tests import verl_path

pytest.importorskip("transformers", reason="the options need transformers")
pytestmark = pytest.mark.skipif(not verl_path.INSTALLED, reason="verl is not installed: `make test` does it")

# Every loss that verl registers, with options under which its clips bite.
LOSSES: dict[str, dict[str, Any]] = {
    "vanilla": {"clip_ratio_c": 1.5},
    "dppo_tv": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.02, "clip_ratio_c": 1.5},
    "dppo_kl": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01, "clip_ratio_c": 1.5},
    "gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1},
    "sapo": {"tau_pos": 0.7, "tau_neg": 1.9, "loss_agg_mode": "seq-mean-token-mean"},
    "gpg": {},
    # So many that all of the band are taken, of which verl draws.
    "clip_cov": {"policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.0}},
    "kl_cov": {"policy_loss": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}},
    "geo_mean": {"loss_agg_mode": "seq-mean-token-mean"},
    "dro": {"policy_loss": {"dro_beta": 0.3}},
    "cispo": {},
}
REFUSED = {"bypass_mode", "srpo", "sdpo"}
AGGREGATIONS = {
    "token-mean": {},
    "token-sum": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-sum-norm": {"loss_scale_factor": 11},
}
KL_TYPES = ["kl", "k1", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "mse+", "k2+", "low_var_kl+", "k3+"]
# verl adds 1e-8 to counts and to probabilities.
TOLERANCE = 1e-7
SEQUENCES, LENGTH, HIDDEN, VOCABULARY = 6, 9, 8, 24


@pytest.fixture(scope="module")
def verl() -> Iterator[ModuleType]:
    with verl_path.importable():
        yield importlib.import_module("verl.workers.utils.losses")


def actor(loss_mode: str, **options: Any) -> Any:
    module = importlib.import_module("verl.workers.config")
    policy = module.PolicyLossConfig(loss_mode=loss_mode, **options.pop("policy_loss", {}))
    return module.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **options
    )


def batch(per_sequence_weights: bool = False) -> dict[str, Tensor]:
    """Rows of six sequences that each have a token, in fp64; ratios of up to e."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mask = torch.rand(SEQUENCES, LENGTH, generator=draw) < 0.7
    mask[:, 0] = True
    hidden, weight = normal(SEQUENCES * LENGTH, HIDDEN), normal(VOCABULARY, HIDDEN) / 2
    ids = torch.randint(VOCABULARY, (SEQUENCES * LENGTH,), generator=draw)
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0].view(SEQUENCES, LENGTH)
    weights = normal(SEQUENCES, 1 if per_sequence_weights else LENGTH).abs().expand(SEQUENCES, LENGTH)
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "response_mask": mask,
        "old_log_probs": log_probs + normal(SEQUENCES, LENGTH) / 3,
        "ref_log_prob": log_probs + normal(SEQUENCES, LENGTH) / 2,
        "advantages": normal(SEQUENCES, 1).expand(SEQUENCES, LENGTH).contiguous(),
        "rollout_is_weights": weights.contiguous(),
    }


def verls(module: ModuleType, rows: dict[str, Tensor], config: Any, weighted: bool) -> tuple[Tensor, ...]:
    """Loss and gradients by verl's function, from log-probs and entropies of the logits."""
    nested = {name: values(rows[name]) for name in ("old_log_probs", "ref_log_prob", "advantages")}
    nested["response_mask"] = values(rows["response_mask"])
    if weighted:
        nested["rollout_is_weights"] = values(rows["rollout_is_weights"])
    # One token of prompt before each response, whose last token predicts nothing.
    prompts = torch.nested.as_nested_tensor([torch.zeros(1, dtype=torch.long)] * SEQUENCES, layout=torch.jagged)
    TensorDict = importlib.import_module("tensordict").TensorDict
    data = TensorDict({**nested, "prompts": prompts, "responses": nested["response_mask"].long()}, SEQUENCES)
    tu = importlib.import_module("verl.utils.tensordict_utils")
    tu.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=int(rows["response_mask"].sum()), global_batch_size=SEQUENCES
    )
    leaves = [rows[name].clone().requires_grad_() for name in ("hidden", "weight")]
    logs = (leaves[0] @ leaves[1].T).log_softmax(-1)
    log_probs = logs.gather(1, rows["ids"][:, None])[:, 0].view(SEQUENCES, LENGTH)
    entropy = -(logs.exp() * logs).sum(-1).view(SEQUENCES, LENGTH)
    output = {"log_probs": predictions(log_probs)}
    if config.entropy_coeff:
        output["entropy"] = predictions(entropy)
    loss, _ = module.ppo_loss(config, output, data)
    return loss, *torch.autograd.grad(loss, leaves)


def values(rows: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def predictions(rows: Tensor) -> Tensor:
    """What verl's forward returns: of the token after each one of prompt and response."""
    return values(torch.cat([rows, torch.zeros(SEQUENCES, 1, dtype=rows.dtype)], 1))


def ours(rows: dict[str, Tensor], config: Any, weighted: bool) -> tuple[Tensor, ...]:
    options = importlib.import_module("srpo_kernels.integrations.verl.options")
    loss_config = options.engine_options(options.SRPOOptions(method="grpo"), config).loss
    leaves = [rows[name].clone().requires_grad_() for name in ("hidden", "weight")]
    sequences = torch.arange(SEQUENCES).repeat_interleave(LENGTH)
    flat = {name: rows[name].flatten() for name in ("advantages", "response_mask", "old_log_probs", "ref_log_prob")}
    loss = sk.srpo_loss(
        leaves[0],
        leaves[1],
        rows["ids"],
        advantages=flat["advantages"],
        mask=flat["response_mask"],
        old_log_probs=flat["old_log_probs"],
        ref_log_probs=flat["ref_log_prob"] if loss_config.kl_coef else None,
        is_weights=rows["rollout_is_weights"].flatten() if weighted else None,
        sequence_ids=sequences,
        config=loss_config,
    ).loss
    return loss, *torch.autograd.grad(loss, leaves)


def compare(module: ModuleType, rows: dict[str, Tensor], loss_mode: str, weighted: bool, **options: Any) -> None:
    got = ours(rows, actor(loss_mode, **options), weighted)
    expected = verls(module, rows, actor(loss_mode, **options), weighted)
    for name, x, y in zip(("loss", "hidden", "weight"), got, expected, strict=True):
        assert float((x - y).detach().norm() / y.detach().norm()) < TOLERANCE, name


def test_every_loss_of_verl_is_here(verl: ModuleType) -> None:
    registry = importlib.import_module("verl.trainer.ppo.core_algos").POLICY_LOSS_REGISTRY
    assert {name for name in registry if not name.startswith("srpo_")} - REFUSED == LOSSES.keys()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("loss_mode", LOSSES)
def test_losses_are_verls(verl: ModuleType, loss_mode: str, weighted: bool) -> None:
    rows = batch(per_sequence_weights=loss_mode == "geo_mean")
    compare(verl, rows, loss_mode, weighted, **LOSSES[loss_mode])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo"])
def test_aggregations_are_verls_with_kl_and_entropy(verl: ModuleType, loss_mode: str, aggregation: str) -> None:
    compare(
        verl, batch(), loss_mode, True, loss_agg_mode=aggregation, entropy_coeff=0.05, use_kl_loss=True,
        kl_loss_coef=0.3, **AGGREGATIONS[aggregation],
    )  # fmt: skip


@pytest.mark.parametrize("kind", KL_TYPES)
def test_kl_estimators_are_verls(verl: ModuleType, kind: str) -> None:
    compare(verl, batch(), "vanilla", False, use_kl_loss=True, kl_loss_coef=2.0, kl_loss_type=kind)
