"""The operators that a compiler sees keep the rules of ``torch.library``; eager calls do without them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from srpo_kernels import SRPOConfig, srpo_loss, teacher_stats, token_stats
from srpo_kernels.api.teacher import heads_of
from srpo_kernels.engine.arguments import LossArguments, LossOptions, StatsArguments, StatsOptions
from srpo_kernels.engine.batch import Needs
from srpo_kernels.engine.stats_op import Statistics
from srpo_kernels.rows.spec import DIVERGENCES
from tests.comparison import assert_same, run_loss, run_stats, with_leaves
from tests.inputs import LEAVES, Inputs, cast, head_inputs, loss_inputs

OPERATORS = torch.ops.srpo_kernels
INPUTS = ("advantages", "old_log_probs", "ref_log_probs", "is_weights")


def strided(inputs: Inputs) -> Inputs:
    turned = {name: inputs[name].t().contiguous().t() for name in ("weight", "hidden")}
    return inputs | turned


# Few rows: of each kind there is one, and a compiler's checks run an operator many times.
LOSS_CASES: dict[str, tuple[Inputs, SRPOConfig, tuple[str, ...]]] = {
    "everything": (loss_inputs(6, (2, 3), teacher_size=5), SRPOConfig(kl_coef=0.1, entropy_coef=0.1), LEAVES),
    "a shared head": (loss_inputs(6, (2, 3)), SRPOConfig(), LEAVES),
    "no teacher": (
        loss_inputs(6, (2, 3)) | dict.fromkeys(("sdpo_mask", "teacher_hidden")),
        SRPOConfig(reduction="sequence"),
        LEAVES,
    ),
    "no bias": (loss_inputs(6, (2, 3)) | {"bias": None}, SRPOConfig(distillation_mode="topk", topk=3), LEAVES),
    "a frozen head": (loss_inputs(6, (2, 3)), SRPOConfig(distillation_mode="sampled"), ("hidden",)),
    "hidden states without gradient": (loss_inputs(6, (2, 3)), SRPOConfig(), ("weight",)),
    "no gradient": (loss_inputs(6, (2, 3)), SRPOConfig(divergence="reverse_kl"), ()),
    "nothing valid": (loss_inputs(6, (2, 3)) | {"mask": torch.zeros(2, 3) > 0}, SRPOConfig(), LEAVES),
    "packed gspo": (loss_inputs(0, (6,)), SRPOConfig(loss_type="gspo", reduction="sequence"), LEAVES),
    "permuted strides": (strided(loss_inputs(0, (6,)) | {"bias": None}), SRPOConfig(), LEAVES),
    "bf16": (cast(loss_inputs(6, (2, 3)), torch.bfloat16), SRPOConfig(divergence="forward_kl"), LEAVES),
    "several teachers": (
        loss_inputs(6, (2, 3)) | {"teacher_weight": [torch.ones(33, 8), torch.rand(33, 8)]}
        | {"teacher_bias": [torch.ones(33), torch.rand(33)], "teacher_head_ids": torch.arange(2)},
        SRPOConfig(),
        LEAVES,
    ),
}  # fmt: skip


def needs_of(call: LossArguments | StatsArguments) -> Needs:
    return Needs(*(x is not None and x.requires_grad for x in call[:3]))


def loss_call(inputs: Inputs, leaves: tuple[str, ...]) -> LossArguments:
    inputs = with_leaves(inputs, leaves)
    named = {name: inputs.get(name) for name in LossArguments._fields}
    own = [inputs[name] for name in INPUTS if inputs.get(name) is not None]
    weights, biases = heads_of(inputs["teacher_weight"], inputs["teacher_bias"], inputs["weight"], inputs["bias"])
    heads = {"teacher_weights": weights, "teacher_biases": biases}
    return LossArguments(**named | {"teacher_mask": inputs.get("sdpo_mask"), "inputs": own} | heads)


def loss_options(inputs: Inputs, config: SRPOConfig) -> LossOptions:
    names = [name for name in INPUTS if inputs.get(name) is not None]
    return LossOptions("srpo", names, config.encode(), False, "auto", None)


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES)
def test_opcheck_of_the_loss(case: tuple[Inputs, SRPOConfig, tuple[str, ...]]) -> None:
    inputs, config, leaves = case
    call = loss_call(inputs, leaves)
    options = loss_options(inputs, config)
    torch.library.opcheck(OPERATORS.fused_loss, (*call, *options, *needs_of(call)))


STATS_CASES: dict[str, tuple[Inputs, tuple[str, ...]]] = {
    "everything": (head_inputs(6, (2, 3), 8, 33, teacher_size=5), LEAVES),
    "no teacher": (head_inputs(6, (2, 3), 8, 33) | {"teacher_hidden": None}, LEAVES),
    "no bias": (head_inputs(0, (6,), 8, 33) | {"bias": None, "mask": None}, LEAVES),
    "a frozen head": (head_inputs(6, (2, 3), 8, 33), ("hidden",)),
    "no gradient": (head_inputs(6, (2, 3), 8, 33), ()),
    "nothing valid": (head_inputs(6, (2, 3), 8, 33) | {"mask": torch.zeros(2, 3) > 0}, LEAVES),
    "permuted strides": (strided(head_inputs(0, (6,), 8, 33)), LEAVES),
    "bf16": (cast(head_inputs(6, (2, 1, 3), 8, 33), torch.bfloat16), LEAVES),
    "no targets": (head_inputs(6, (2, 3), 8, 33) | {"target_ids": None, "teacher_hidden": None}, ()),
}


@pytest.mark.parametrize(
    ("divergence", "case"),
    [*(("jsd", case) for case in STATS_CASES), *((name, "everything") for name in DIVERGENCES if name != "jsd")],
)
def test_opcheck_of_the_statistics(divergence: str, case: str) -> None:
    inputs, leaves = STATS_CASES[case]
    inputs = with_leaves(inputs, leaves)
    call = StatsArguments(**{name: inputs.get(name) for name in StatsArguments._fields})
    arguments = (*call, *StatsOptions(divergence), *needs_of(call))
    torch.library.opcheck(OPERATORS.token_stats, arguments)
    with torch.no_grad():
        statistics = OPERATORS.token_stats(*arguments)
    upstream = [torch.randn_like(x) for x in statistics[:4]]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(OPERATORS.token_stats_backward, (*upstream, *detached))


def test_the_schemas_have_the_fields_in_their_order() -> None:
    def names(operator: Any) -> tuple[str, ...]:
        return tuple(argument.name for argument in operator.default._schema.arguments)

    needs = tuple(f"needs_{name}" for name in Needs._fields)
    assert names(OPERATORS.fused_loss) == LossArguments._fields + LossOptions._fields + needs
    stats_call = StatsArguments._fields + StatsOptions._fields + needs
    assert names(OPERATORS.token_stats) == stats_call
    backward = names(OPERATORS.token_stats_backward)
    assert backward[4:] == stats_call
    assert backward[:4] == tuple(f"grad_{name}" for name in Statistics._fields[:4])
    # Inductor binds arguments by name.
    assert len(set(backward)) == len(backward)


def test_the_loss_cannot_be_differentiated_twice() -> None:
    inputs, _, leaves = LOSS_CASES["everything"]
    call, options = loss_call(inputs, leaves), loss_options(inputs, SRPOConfig())
    eager = inputs | {name: getattr(call, name) for name in LEAVES}
    for function in (lambda: OPERATORS.fused_loss(*call, *options, *needs_of(call))[0], lambda: srpo_loss(**eager)[0]):
        (grad,) = torch.autograd.grad(function().square(), call.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()


def test_shapes_are_known_without_data() -> None:
    inputs = loss_inputs(0, (4, 6))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: None if x is None else mode.from_tensor(x) for name, x in inputs.items()}
        results = run_loss(srpo_loss, fake)
        teacher = teacher_stats(fake["teacher_hidden"], fake["weight"])
    for name, value in run_loss(srpo_loss, inputs).items():
        assert (results[name].shape, results[name].dtype) == (value.shape, value.dtype), name
    assert teacher.entropy.shape == (4, 6)


EAGER_STEP = """
import sys, torch, srpo_kernels as sk
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
target_ids = torch.zeros(5, dtype=torch.int64)
sk.srpo_loss(hidden, weight, target_ids, advantages=torch.ones(5)).loss.backward()
sk.token_stats(hidden, weight, target_ids).log_probs.sum().backward()
sys.exit("torch._dynamo" in sys.modules)
"""


def test_an_eager_step_does_not_import_the_compiler() -> None:
    subprocess.run([sys.executable, "-c", EAGER_STEP], check=True)


def test_the_gradients_are_freed_by_the_backward() -> None:
    loss = srpo_loss(**with_leaves(loss_inputs(0, (4, 6)))).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        # Behind the copy that a caller gets.
        _ = loss.grad_fn.next_functions[0][0].saved_tensors


def test_tensors_of_inference_mode_are_taken_where_no_gradient_goes() -> None:
    inputs = loss_inputs(0, (4, 6), teacher_size=5)
    with torch.inference_mode():
        rollout = {k: x if x is None or k in LEAVES else x.clone() for k, x in inputs.items()}
    assert_same(run_loss(srpo_loss, rollout), run_loss(srpo_loss, inputs), 0.0)
    names = ("target_ids", "mask", "teacher_hidden", "teacher_weight", "teacher_bias", *LEAVES)
    rollout, inputs = ({k: call[k] for k in names} for call in (rollout, inputs))
    upstream = torch.ones(3)
    assert_same(run_stats(token_stats, rollout, upstream), run_stats(token_stats, inputs, upstream), 0.0)
