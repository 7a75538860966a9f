"""Models of transformers' tensor parallelism: two ranks with shards of every matrix train as one with all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5.23", reason="others have other plans, or shards that are no DTensors")
pytest.importorskip("peft", reason="LoRA is one of the cases")

from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from srpo_kernels import token_stats
from srpo_kernels.integrations.transformers import (
    AverageTeacher,
    call_with_hidden,
    check_model,
    config_for,
    head_operands,
    response_loss,
    response_normalizers,
    response_stats,
    teacher_rows,
)
from tests.processes import needs_gloo, run_ranks
from tests.tiny_models import tiny_model_of

VOCAB = 97
IDS = torch.randint(10, 90, (4, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1] * 6 + [0] * 2, [0] + [1] * 7])
RESPONSES = (MASK == 1) & (torch.arange(8) > 3)
ADVANTAGES, ROUTED = torch.tensor([0.5, -0.3, 0.8, -1.0]), torch.tensor([False, True, False, True])

Load = Callable[..., Any]


def by_name(folder: Path, name: str, plan: Mapping[str, str] | None) -> Any:
    """A saved model: on two ranks in shards, unless ``plan`` is None."""
    shards = {} if plan is None else {"distributed_config": DistributedConfig(tp_size=2, tp_plan=dict(plan) or None)}
    return AutoModelForCausalLM.from_pretrained(folder / name, **shards)


def of_torch(folder: Path, name: str, plan: Mapping[str, str] | None) -> Any:
    """torch's own, whose hidden states are in shards of the sequence."""
    model = by_name(folder, name, None)
    if plan is not None:
        to_shards = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
        )
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"model.norm": to_shards, "lm_head": head})
    return model


def with_fsdp(folder: Path, name: str, plan: Mapping[str, str] | None) -> Any:
    """In FSDP2's units, over a dimension that has one rank."""
    model = by_name(folder, name, plan)
    if plan is not None:
        mesh = model._mesh_manager.get_mesh("fsdp")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def with_lora(folder: Path, name: str, plan: Mapping[str, str] | None) -> Any:
    """The same one on the ranks and on one."""
    model = get_peft_model(by_name(folder, name, plan), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                first = len(values) // 2 * torch.distributed.get_rank() if own.shape != values.shape else 0
                own.copy_(values[first : first + len(own)])
    return model


class Case(NamedTuple):
    """A student, and a teacher: "live", "average", or the name of another model, whole or in shards."""

    name: str = "llama"
    teacher: str = "average"
    plan: Mapping[str, str] = MappingProxyType({})
    load: Load = by_name
    autocast: bool = False
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "average": Case(),
    "tied": Case("tied"),
    "live, padding-free": Case("tied", "live", options={"padding_free": True}),
    "a bias": Case("phi"),
    "whole head": Case(plan={"lm_head": "replicate"}),
    "another in shards": Case("tied", "narrow in shards"),
    "another": Case(teacher="narrow"),
    "another with a bias": Case("phi", "phi"),
    "another in shards, whole head": Case(plan={"lm_head": "replicate"}, teacher="narrow in shards"),
    "autocast": Case(autocast=True),
    "in the head's dtype": Case(autocast=True, options={"in_head_dtype": True}),
    "LoRA": Case(load=with_lora),
    "torch's": Case(load=of_torch),
    "FSDP2": Case(load=with_fsdp),
}


def saved(folder: Path) -> None:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    models = {
        "llama": tiny_model_of("llama", **sizes),
        "tied": tiny_model_of("gemma2", tie_word_embeddings=True, final_logit_softcapping=5.0, **layers, **sizes),
        "phi": tiny_model_of("phi", **sizes),
        "narrow": tiny_model_of("llama", hidden_size=16, **sizes),
    }
    nn.init.normal_(models["phi"].get_output_embeddings().bias)
    for name, model in models.items():
        model.save_pretrained(folder / name)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def train(folder: Path, case: Case, *, in_shards: bool) -> dict[str, Any]:
    """Two steps on the batch, of which the second one has an average that has moved."""
    model = case.load(folder, case.name, case.plan if in_shards else None)
    other, _, sharded = case.teacher.partition(" ")
    teacher: Any = model
    if case.teacher == "average":
        teacher = AverageTeacher(model, 0.5)
    elif case.teacher != "live":
        teacher = by_name(folder, other, {} if in_shards and sharded else None)
    config, options = config_for(model, entropy_coef=0.01), case.options
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], {}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast), gathered() as shapes:
            taught = teacher_rows(
                teacher, IDS[ROUTED], MASK[ROUTED], response_mask=RESPONSES[ROUTED], config=config, **options
            )
            norms = response_normalizers(RESPONSES, ROUTED, taught, config=config)
            out = response_loss(
                model, IDS, MASK, response_mask=RESPONSES, advantages=ADVANTAGES, sdpo_mask=ROUTED,
                teacher=taught if losses else teacher, normalizers=norms, config=config, **options,
            )  # fmt: skip
        stays = in_shards and other in ("average", "live")
        assert not stays or not [shape for shape in shapes if len(shape) == 2 and shape[0] == VOCAB], shapes
        out.loss.backward()
        losses.append(out.loss.detach())
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if case.teacher == "average":
            teacher.update()
            teacher.load_state_dict(teacher.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        stats = response_stats(model, IDS, MASK, response_mask=RESPONSES, config=config, **options)
    averages = teacher.state_dict() if case.teacher == "average" else {}
    return {
        "losses": torch.stack(losses),
        "log-probs": out.log_probs.detach(),
        "stats": torch.stack([stats.log_probs, stats.entropy]),
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
        **{f"average of {name}": average for name, average in averages.items()},
        **{name: whole(parameter.detach()) for name, parameter in model.named_parameters()},
    }


@contextlib.contextmanager
def gathered() -> Iterator[list[torch.Size]]:
    """The shapes of the DTensors that are gathered."""
    shapes: list[torch.Size] = []
    own = DTensor.full_tensor

    def full_tensor(tensor: DTensor, **options: Any) -> Tensor:
        shapes.append(tensor.shape)
        return own(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", full_tensor)
        yield shapes


def train_a_rank(rank: int, folder: Path) -> dict[str, Any]:
    results = {name: train(folder, case, in_shards=True) for name, case in CASES.items()}
    refuses_other_heads(folder)
    takes_operands(by_name(folder, "phi", {}))
    return results


def refuses_other_heads(folder: Path) -> None:
    model = by_name(folder, "llama", {"lm_head": "rowwise_split_input"})
    with pytest.raises(ValueError, match=r"in shards of its rows.*got S\(1\).*'colwise_gather_output'"):
        check_model(model)
    model = get_peft_model(by_name(folder, "llama", {}), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="LM head without adapters where tensor parallelism has it in shards, got a L"):
        check_model(model)


def takes_operands(model: Any) -> None:
    """A loss of one's own says itself what group has the shards, and is refused without."""

    def log_probs(hidden: Tensor, head: nn.Module) -> Tensor:
        hidden, weight, bias = head_operands(hidden[:, :-1], head)
        with pytest.raises(ValueError, match="weight must be a whole tensor, got a DTensor"):
            token_stats(hidden, weight, IDS[:, 1:], bias=bias)
        group = weight.device_mesh.get_group()
        return token_stats(
            hidden, weight.to_local(), IDS[:, 1:], bias=bias.to_local(), vocab_parallel_group=group
        ).log_probs

    ours = call_with_hidden(model, log_probs, input_ids=IDS)
    theirs = model(IDS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("models")
    saved(folder)
    return folder, run_ranks(train_a_rank, 2, folder, timeout_seconds=300)


@needs_gloo
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name: str, results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = results
    expected = train(folder, CASES[name], in_shards=False)
    tolerance = 3e-2 if CASES[name].autocast else 1e-5
    for rank in ranks:
        assert rank[name].keys() == expected.keys()
        errors = {key: float((rank[name][key] - value).norm() / value.norm()) for key, value in expected.items()}
        assert {key: error for key, error in errors.items() if not error <= tolerance} == {}
