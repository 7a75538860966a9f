"""What the ranks of a gloo group do with an `SRPOEngine`, and one process with a plain model of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

import srpo_kernels as sk
import tests.integrations.verl.cpu_platform  # noqa: F401
from srpo_kernels.integrations.transformers import config_for
from srpo_kernels.integrations.transformers.shards import release
from srpo_kernels.integrations.verl.engine import MODEL_TYPE, SRPOEngine
from srpo_kernels.integrations.verl.options import EngineOptions
from tests.integrations.verl import packed_attention, tiny

logging.disable(logging.WARNING)
# A step of SGD this long leaves nothing of the parameter but its gradient.
STEP = 2.0**20


@dataclass(frozen=True)
class Case:
    """One way to run the same mini-batch."""

    name: str
    strategy: str = "fsdp2"
    model: str = "untied"
    packed: bool = True
    sequence_parallel: int = 1
    fsdp_size: int = -1
    dynamic: bool = False
    checkpointing: bool = False
    reshard: bool = True
    original: bool = False
    offload: bool = False
    bf16: bool = False
    pad_to_length: bool = False
    lora: str | None = None
    wrap_size: int = 0
    offload_policy: bool = False
    reference: bool = False
    teacher: Any = "ema"
    offload_states: bool = False
    temperature: float = 1.0
    routed: str = "some"
    empty: tuple[int, ...] = ()
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return 0.0 if self.teacher == "frozen" else 0.05

    @property
    def config(self) -> sk.SRPOConfig:
        return sk.SRPOConfig(**self.loss)


def build(case: Case, folder: Path, suffix: str = "", **optimizer: Any) -> SRPOEngine:
    lora = {"lora_rank": 4, "lora_adapter_path": str(folder / f"{case.lora}{suffix}")} if case.lora else {}
    attention = packed_attention.NAME if case.sequence_parallel > 1 else "sdpa"
    model = HFModelConfig(
        path=str(folder / (case.model + ("" if case.lora else suffix))),
        load_tokenizer=False,
        use_remove_padding=case.packed,
        override_config={"attn_implementation": attention},
        enable_gradient_checkpointing=case.checkpointing,
        model_type=MODEL_TYPE,
        **lora,
    )
    engine_config = FSDPEngineConfig(
        strategy=case.strategy,
        use_torch_compile=False,
        model_dtype="bf16" if case.bf16 else "fp32",
        mixed_precision={
            "param_dtype": "bf16" if case.bf16 else "fp32",
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
        ulysses_sequence_parallel_size=case.sequence_parallel,
        use_orig_params=case.original,
        fsdp_size=case.fsdp_size,
        reshard_after_forward=case.reshard,
        param_offload=case.offload,
        optimizer_offload=case.offload,
        offload_policy=case.offload_policy,
        forward_only=case.reference,
        wrap_policy={"min_num_params": case.wrap_size},
        pad_to_length=case.pad_to_length,
        pad_to_length_bucket=64,
    )
    optimizer = {"optimizer": "SGD", "lr": STEP, "weight_decay": 0.0, **optimizer}
    engine = EngineRegistry.new(
        MODEL_TYPE,
        case.strategy,
        model_config=model,
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(total_training_steps=10, clip_grad=1e9, **optimizer),
        checkpoint_config=CheckpointConfig(),
    )
    engine.configure(
        EngineOptions(
            loss=case.config,
            teacher=case.teacher,
            teacher_update_rate=case.rate,
            teacher_tokens=60 // case.sequence_parallel,
            offload_teacher_states=case.offload_states,
        )
    )
    engine.initialize()
    return engine


def build_with_teacher(case: Case, folder: Path, **optimizer: Any) -> SRPOEngine:
    """An engine whose average is another model's, where it has one."""
    engine = build(case, folder, **optimizer)
    if engine.average is not None:
        other = build(case, folder, "_teacher")
        for name, average in other.average.averages.items():
            engine.average.averages[name].copy_(average)
    return engine


def mini_batch(case: Case, batch: tiny.Rollouts) -> Any:
    """This rank's share, with what verl's worker tells the engine."""
    ranks = dist.get_world_size() // case.sequence_parallel
    size, place = 8 // ranks, dist.get_rank() // case.sequence_parallel
    data = tiny.in_verls_form(batch, range(place * size, place * size + size))
    tu.assign_non_tensor(
        data,
        use_dynamic_bsz=case.dynamic,
        micro_batch_size_per_gpu=2,
        max_token_len_per_gpu=40 // case.sequence_parallel,
        temperature=case.temperature,
        global_batch_size=8,
        use_remove_padding=case.packed,
    )
    return data


@torch.no_grad()
def whole_parameters(engine: SRPOEngine) -> dict[str, Tensor]:
    """Every trained parameter, whole, by its name in the model of PEFT or transformers."""
    release(engine.module)
    if isinstance(engine.module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(engine.module, writeback=False):
            named = [(name, p.clone()) for name, p in engine.module.named_parameters()]
    else:
        named = [
            (name, (p.full_tensor() if isinstance(p, DTensor) else p).clone())
            for name, p in engine.module.named_parameters()
        ]
    return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in named}


def plain_model(case: Case, folder: Path, suffix: str = "") -> Any:
    """The model of transformers or PEFT, in one process."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = folder / (case.model + ("" if case.lora else suffix))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if case.lora:
        model = PeftModel.from_pretrained(model, folder / f"{case.lora}{suffix}", is_trainable=True)
    return model.eval()


def plain_loss(case: Case, batch: tiny.Rollouts, student: Any, teacher: Any) -> Tensor:
    """The loss of the whole batch at once, from hidden states one sequence at a time."""
    base = student.get_base_model() if case.lora else student
    other = teacher.get_base_model() if case.lora else teacher

    def states(model: Any, ids: Tensor, response: Tensor) -> Tensor:
        return model.model(ids[None]).last_hidden_state[0, len(ids) - len(response) - 1 : -1]

    hidden = torch.cat([
        states(base, torch.cat([p, r]), r) for p, r in zip(batch.prompts, batch.responses, strict=True)
    ])  # fmt: skip
    routed = batch.sdpo_mask.nonzero().flatten().tolist() if case.teacher is not None else []
    with torch.no_grad():
        shown = [states(other, batch.contexts[row], batch.responses[row]) for row in routed]
    sequences = torch.repeat_interleave(torch.arange(8), torch.tensor([len(r) for r in batch.responses]))
    sdpo = torch.isin(sequences, torch.tensor(routed, dtype=torch.long))
    config = replace(
        case.config,
        temperature=case.temperature,
        logit_scale=(transform := config_for(base)).logit_scale,
        softcap=transform.softcap,
    )
    (weight, bias), (teacher_weight, teacher_bias) = tiny.head_of(base), tiny.head_of(other)
    return sk.srpo_loss(
        hidden,
        weight,
        torch.cat(batch.responses),
        bias=bias,
        advantages=batch.advantages[sequences],
        mask=torch.cat(batch.masks),
        sdpo_mask=sdpo,
        teacher_hidden=torch.cat(shown) if shown else None,
        teacher_weight=teacher_weight if shown else None,
        teacher_bias=teacher_bias if shown else None,
        old_log_probs=torch.cat(batch.old_log_probs),
        ref_log_probs=torch.cat(batch.ref_log_probs) if config.kl_coef else None,
        is_weights=torch.cat(batch.is_weights),
        sequence_ids=sequences,
        config=config,
    ).loss


def parity(rank: int, folder: Path, cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """By case: relative errors of loss, gradient norm and worst gradient, of log-probs and of entropies."""
    results = {}
    for case in cases:
        batch = tiny.rollouts(routed=case.routed, empty=case.empty)
        engine = build_with_teacher(case, folder)
        data = mini_batch(case, batch)
        inferred = data.copy()
        tu.assign_non_tensor(inferred, calculate_entropy=True)
        with engine.eval_mode():
            statistics = engine.infer_batch(inferred, loss_function=None)["model_output"]
        before = whole_parameters(engine)
        with engine.train_mode():
            out = engine.train_batch(data, loss_function=None)
        after = whole_parameters(engine)
        loss = torch.tensor(sum(out["loss"]))
        dist.all_reduce(loss)
        student = plain_model(case, folder)
        teacher = student if case.teacher == "live" else plain_model(case, folder, "_teacher")
        expected = plain_loss(case, batch, student, teacher)
        expected.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
        assert gradients.keys() <= after.keys(), sorted(gradients.keys() - after.keys())
        errors = {
            name: float((before[name] - after[name] - STEP * gradient).norm() / (STEP * gradient).norm())
            for name, gradient in gradients.items()
        }
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        results[case.name] = {
            "loss": abs(float(loss / dist.get_world_size() - expected) / float(expected)),
            "norm": abs(out["metrics"].get("grad_norm", norm) / norm - 1.0),
            "gradient": max(errors.values()),
            **_statistics_errors(case, batch, student, statistics, data),
        }
    return results


def reference(rank: int, folder: Path, cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """By case: relative errors of what an engine without an optimizer, and so without a teacher, infers."""
    results = {}
    for case in cases:
        batch = tiny.rollouts()
        engine = build(case, folder)
        assert engine.average is None
        data = mini_batch(case, batch)
        tu.assign_non_tensor(data, calculate_entropy=True)
        with engine.eval_mode():
            statistics = engine.infer_batch(data, loss_function=None)["model_output"]
        results[case.name] = _statistics_errors(case, batch, plain_model(case, folder), statistics, data)
    return results


def _statistics_errors(
    case: Case, batch: tiny.Rollouts, student: Any, statistics: dict[str, Tensor], data: Any
) -> dict[str, float]:
    """Log-probs and entropies beside those of the model's own logits."""
    ranks = dist.get_world_size() // case.sequence_parallel
    first = dist.get_rank() // case.sequence_parallel * (8 // ranks)
    got: dict[str, list[Tensor]] = {"log_probs": [], "entropy": []}
    wanted: dict[str, list[Tensor]] = {"log_probs": [], "entropy": []}
    lengths = [len(batch.responses[first + row]) for row in range(len(data))]
    for row, length in enumerate(lengths):
        ids = torch.cat([batch.prompts[first + row], batch.responses[first + row]])
        with torch.no_grad():
            logits = student(ids[None]).logits[0].double() / case.temperature
        logs = logits.log_softmax(-1)[-length - 1 : -1]
        wanted["log_probs"].append(logs.gather(1, ids[-length:, None])[:, 0])
        wanted["entropy"].append(-(logs.exp() * logs).sum(-1))
        for name in got:
            got[name].append(statistics[name].unbind()[row][-length - 1 : -1])
    return {
        name: float((torch.cat(got[name]) - torch.cat(wanted[name])).norm() / torch.cat(wanted[name]).norm())
        for name in got
    }
