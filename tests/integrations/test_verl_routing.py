"""Who is distilled in verl's batches, and from what: keys, groups, scores, feedback, lengths."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests import verl_path

pytest.importorskip("transformers", reason="solutions need transformers")
pytestmark = pytest.mark.skipif(not verl_path.INSTALLED, reason="verl is not installed: `make test` does it")

END = 99


@pytest.fixture(scope="module")
def routing() -> Iterator[ModuleType]:
    with verl_path.importable():
        yield importlib.import_module("srpo_kernels.integrations.verl.routing")


class Tokenizer:
    """A token is a number, and its text the number's."""

    all_special_tokens = ("99",)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(str(x) for x in row if x != END or not skip_special_tokens) for row in rows]

    def decode(self, row: Any) -> str:
        return self.batch_decode([row])[0]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(x) for x in text.split()]}


def tokenize(messages: Any) -> list[int]:
    return [int(x) for x in messages[-1]["content"].split()]


def router(routing: ModuleType, max_length: int | None = None, **options: Any) -> Any:
    templates = {
        "teacher_template": "{prompt}{feedback}{solution}",
        "solution_template": " 7 {solution} 8",
        "feedback_template": " 5 {feedback}",
    }
    own = routing.SRPOOptions(**{**templates, **options})
    return routing.Router(Tokenizer(), tokenize, ends={END}, max_length=max_length, options=own)


def outputs(routing: ModuleType, scores: list[float], **changes: Any) -> Any:
    """One group; reply i is ``[10 + i, END]``."""
    count = len(scores)
    fields = {
        "group_ids": torch.zeros(count, dtype=torch.long),
        "final": torch.ones(count, dtype=torch.bool),
        "scores": torch.tensor(scores),
        "prompts": [[{"role": "user", "content": "1 2"}]] * count,
        "responses": [torch.tensor([10 + row, END]) for row in range(count)],
        "in_loss": torch.ones(count, dtype=torch.bool),
        "feedback": [None] * count,
    }
    return routing.Outputs(**{**fields, **changes})


def contexts(routed: Any) -> list[list[int]]:
    return [x.tolist() for x in routed.contexts]


def test_failed_rollouts_read_a_correct_siblings_reply(routing: ModuleType) -> None:
    routed = router(routing).route(outputs(routing, [0.0, 1.0, 0.0]), 0)
    assert routed.sdpo_mask.tolist() == [True, False, True]
    assert contexts(routed) == [[1, 2, 7, 11, 8, 10, END], [11], [1, 2, 7, 11, 8, 12, END]]
    assert routed.metrics == {"srpo/correct_fraction": 1 / 3, "srpo/routed_fraction": 2 / 3, "srpo/shown_fraction": 1.0}


def test_sdpo_distills_every_rollout_that_has_a_sibling(routing: ModuleType) -> None:
    routed = router(routing, method="sdpo").route(outputs(routing, [1.0, 1.0, 0.0]), 0)
    assert routed.sdpo_mask.tolist() == [True, True, True]
    # A rollout does not read its own reply.
    assert contexts(routed)[0][3] == 11 and contexts(routed)[1][3] == 10
    assert router(routing, method="sdpo").route(outputs(routing, [1.0, 0.0]), 0).sdpo_mask.tolist() == [False, True]


def test_groups_threshold_and_nan(routing: ModuleType) -> None:
    batch = outputs(routing, [0.0, 0.7, 0.0, 0.6, float("nan")], group_ids=torch.tensor([0, 0, 1, 1, 0]))
    assert router(routing).route(batch, 0).sdpo_mask.tolist() == [True, False, True, False, False]
    strict = router(routing, success_threshold=0.65).route(batch, 0)
    assert strict.sdpo_mask.tolist() == [True, False, False, False, False]


def test_the_draw_of_a_sibling_is_the_steps(routing: ModuleType) -> None:
    batch = outputs(routing, [1.0, 1.0, 1.0, 1.0, 0.0])
    drawn = [contexts(router(routing).route(batch, step))[4][3] for step in range(20)]
    assert set(drawn) == {10, 11, 12, 13}
    assert drawn == [contexts(router(routing).route(batch, step))[4][3] for step in range(20)]


@pytest.mark.parametrize(
    "changes",
    [
        {"responses": [torch.tensor([10, END]), torch.tensor([11])]},
        {"responses": [torch.tensor([10, END]), torch.tensor([END])]},
        {"in_loss": torch.tensor([True, False])},
        {"in_loss": torch.tensor([False, True])},
        {"final": torch.tensor([True, False])},
        {"final": torch.tensor([False, True])},
    ],
    ids=["truncated", "empty", "teacher out of the loss", "student out of the loss", "earlier output", "padding"],
)
def test_what_cannot_teach_or_be_taught(routing: ModuleType, changes: dict[str, Any]) -> None:
    assert not router(routing).route(outputs(routing, [0.0, 1.0], **changes), 0).sdpo_mask.any()


def test_lengths(routing: ModuleType) -> None:
    """The prompt with a reply of n tokens has n + 4, the failed reply 2."""
    batch = outputs(routing, [0.0, 1.0], responses=[torch.tensor([10, END]), torch.tensor([11, 12, 13, END])])
    assert router(routing, 9).route(batch, 0).sdpo_mask[0]
    assert not router(routing, 8).route(batch, 0).sdpo_mask.any()
    assert contexts(router(routing, 8, shorten_solution=True).route(batch, 0))[0] == [1, 2, 7, 12, 13, 8, 10, END]
    assert not router(routing, 9, max_teacher_length=8).route(batch, 0).sdpo_mask.any()
    with pytest.raises(ValueError, match=r"srpo\.max_teacher_length must be at most the model's 9 positions, got 10"):
        router(routing, 9, max_teacher_length=10)


def test_feedback_teaches_with_a_sibling_and_without(routing: ModuleType) -> None:
    alone = router(routing).route(outputs(routing, [0.0, 0.0], feedback=["3", None]), 0)
    assert alone.sdpo_mask.tolist() == [True, False]
    assert contexts(alone)[0] == [1, 2, 5, 3, 10, END]
    both = outputs(routing, [0.0, 1.0], feedback=["3", "4"])
    assert contexts(router(routing).route(both, 0))[0] == [1, 2, 5, 3, 7, 11, 8, 10, END]
    # No room for both: the solution alone.
    assert contexts(router(routing, 8).route(both, 0))[0] == [1, 2, 7, 11, 8, 10, END]
    assert not router(routing, 5).route(outputs(routing, [0.0], feedback=["3"]), 0).sdpo_mask.any()


def test_the_last_output_of_a_session_and_no_padding(routing: ModuleType) -> None:
    keys = ["a_0_0", "a_0_1", "a_1_0", "b_10_10", "b_10_9", "pad_0_0"]
    tags: list[dict[str, Any]] = [{}, {}, {}, {}, {}, {"is_padding": True}]
    final = routing.final_outputs(keys, tags)
    assert final.tolist() == [False, True, True, True, False, False]
    groups = routing.group_numbers(["a", "a", "a", "b", "b", "pad"], final).tolist()
    assert groups[1] == groups[2] and len(set(groups)) == 5


def test_groups_of_equal_scores(routing: ModuleType) -> None:
    scores, uids, every = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0]), ["a", "b", "a", "b", "c"], torch.ones(5).bool()
    assert routing.equal_groups(scores, uids, every).tolist() == [True, False, True, False, True]
    # An earlier output of a session has no part in it, but its advantage.
    last = torch.tensor([True, False, True, True, True])
    assert routing.equal_groups(scores, uids, last).all()


def actor(**changes: Any) -> Any:
    own = {"loss_mode": changes.pop("loss_mode", "vanilla"), "dro_beta": 0.3, "clip_cov_ratio": 0.1,
           "clip_cov_lb": 2.0, "clip_cov_ub": 6.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}  # fmt: skip
    fields = {
        "clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 4.0, "tau_pos": 1.5,
        "tau_neg": 2.5, "loss_agg_mode": "token-mean", "loss_scale_factor": None, "entropy_coeff": 0.0,
        "use_kl_loss": False, "kl_loss_coef": 0.01, "kl_loss_type": "low_var_kl", "ppo_max_token_len_per_gpu": 64,
    }  # fmt: skip
    return Section({**fields, **changes, "policy_loss": SimpleNamespace(**own)})


class Section(SimpleNamespace):
    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(**fields)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def engine_loss(changes: dict[str, Any], **options: Any) -> Any:
    module = importlib.import_module("srpo_kernels.integrations.verl.options")
    return module.engine_options(module.SRPOOptions(**options), actor(**changes)).loss


@pytest.mark.usefixtures("routing")
class TestLossOptions:
    @pytest.mark.parametrize(
        ("mode", "loss_type", "own"),
        [
            ("vanilla", "grpo", {"dual_clip": 4.0}),
            ("srpo_grpo", "grpo", {"dual_clip": 4.0}),
            ("gspo", "gspo_token", {"dual_clip": None}),
            ("srpo_gspo", "gspo", {"dual_clip": None}),
            ("srpo_gmpo", "gmpo", {}),
            ("gpg", "reinforce", {}),
            ("cispo", "cispo", {}),
            ("srpo_sapo", "sapo", {"loss_options": (("tau_negative", 2.5), ("tau_positive", 1.5))}),
            ("dro", "dro", {"loss_options": (("beta", 0.3),)}),
            ("kl_cov", "kl_cov", {"loss_options": (("coefficient", 0.7), ("share", 0.2))}),
        ],
    )
    def test_verls_losses(self, mode: str, loss_type: str, own: dict[str, Any]) -> None:
        loss = engine_loss({"loss_mode": mode})
        assert (loss.loss_type, loss.epsilon_low, loss.epsilon_high) == (loss_type, 0.1, 0.3)
        assert all(getattr(loss, name) == value for name, value in own.items())

    @pytest.mark.parametrize(
        ("mode", "reduction"),
        [
            ("token-mean", "token"), ("token-sum", "token_sum"), ("seq-mean-token-mean", "sequence"),
            ("seq-mean-token-sum", "sequence_sum"),
        ],
    )  # fmt: skip
    def test_aggregations(self, mode: str, reduction: str) -> None:
        assert engine_loss({"loss_agg_mode": mode}).reduction == reduction

    def test_a_constant_length(self) -> None:
        mode = "seq-mean-token-sum-norm"
        loss = engine_loss({"loss_agg_mode": mode, "loss_scale_factor": 5})
        assert (loss.reduction, loss.max_length) == ("constant", 5)

    def test_kl_and_entropy(self) -> None:
        loss = engine_loss({"use_kl_loss": True, "entropy_coeff": 0.02})
        assert (loss.kl_coef, loss.kl_type, loss.entropy_coef) == (0.01, "k3_bounded", 0.02)
        assert engine_loss({"use_kl_loss": False}).kl_coef == 0.0
