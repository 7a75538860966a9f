"""The cost sheet: the bounds that hold for this library's steps, and that the meters count what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("tyro")

import pandas as pd

from benchmarks.costs import CASES, CaseName, ProviderName
from benchmarks.costs.measure import KernelCost, PerRow, StepCost, measure
from benchmarks.costs.sheet import Sheet
from benchmarks.costs.steps import bf16_products, make_batch, prepare
from benchmarks.costs.tiles import measure_tiles
from reference.distillation import divergence
from srpo_kernels import SRPOConfig, srpo_loss
from srpo_kernels.verify.providers import naive
from tests.comparison import assert_same, run_loss
from tests.inputs import cast, loss_inputs, workspace_floor
from tests.meters import ProductMeter
from tools.documents import replace_marked
from tools.meters import OperatorMeter

pytestmark = pytest.mark.interpreter

ROOT = Path(__file__).parents[2]
DIVERGENCES = tuple(case for case in CASES if case != "policy")
# Coefficients, ids, which are read twice, sums of a row and the like.
EXTRA_BYTES = 136

measured = cache(measure)


def kernels(provider: ProviderName, case: CaseName) -> dict[str, KernelCost]:
    """By their names without modules."""
    return {name.rpartition(".")[2]: kernel for name, kernel in measured(provider, case).kernels.items()}


def total(cost: StepCost) -> PerRow:
    return cost.loaded + cost.stored


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["srpo_kernels", "srpo_kernels-bf16"])
def test_products_and_memory_of_a_step(provider: ProviderName, case: CaseName) -> None:
    cost = measured(provider, case)
    models = 1 if case == "policy" else 2
    copy = 2 if provider == "srpo_kernels-bf16" else 0
    assert cost.products == (3 if case == "policy" else 4)
    assert cost.workspace == 4 * models + copy
    # Nothing but products and kernels touches logits.
    assert cost.operators == cost.dots == 0
    assert cost.launches == (3 if case == "jsd" else 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["srpo_kernels", "srpo_kernels-bf16"])
def test_every_pass_reads_each_logit_once(provider: ProviderName, case: CaseName) -> None:
    found = kernels(provider, case)
    assert set(found) == {"row_stats_kernel", "row_grad_kernel"} | ({"row_mixture_kernel"} if case == "jsd" else set())
    for name, kernel in found.items():
        assert kernel.launches == 1
        assert kernel.loaded.per_element == (4 if case == "policy" else 8)
        dlogits = 2 if provider == "srpo_kernels-bf16" else 4
        assert kernel.stored.per_element == (dlogits if name == "row_grad_kernel" else 0)
        assert 0 <= kernel.loaded.constant + kernel.stored.constant <= EXTRA_BYTES


@pytest.mark.parametrize(
    ("provider", "case", "most"),
    [
        ("srpo_kernels-bf16", "policy", 10),
        ("srpo_kernels", "policy", 12),
        ("srpo_kernels-bf16", "jsd", 26),
        ("srpo_kernels", "jsd", 28),
        ("srpo_kernels-bf16", "forward_kl", 18),
        ("srpo_kernels-bf16", "reverse_kl", 18),
    ],
)
def test_bytes_of_a_row_stay_within_bounds(provider: ProviderName, case: CaseName, most: float) -> None:
    amount = total(measured(provider, case))
    assert amount.per_element <= most
    assert amount.constant <= EXTRA_BYTES


@pytest.mark.parametrize("models", [1, 2])
def test_tile_stats_reads_weights_once_per_group_of_rows_and_wastes_no_products(models: int) -> None:
    cost = measure_tiles(models)
    assert (cost.rows_per_weight_read, cost.columns_per_hidden_read) == (128, 128)
    assert cost.dots == models
    # Five numbers of a model alone, eleven of two.
    assert cost.sums_stored == {1: 20, 2: 44}[models] >= cost.sums_loaded


@pytest.mark.parametrize("case", CASES)
def test_the_step_with_bf16_products_is_the_step_in_fp32_but_for_rounding(case: CaseName) -> None:
    results = []
    for provider in ("srpo_kernels", "srpo_kernels-bf16"):
        with prepare(provider, case, 3, 507) as (step, _):
            results.append([x.float() for x in step()[:3]])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dw_beta", [0.0, 1.0])
def test_bf16_rows_of_both_branches_share_logits_and_go_apart(dw_beta: float) -> None:
    """Their dlogits are no part of one buffer: the gradients are those of chunks that share nothing."""
    inputs = cast(loss_inputs(0, (6, 7), teacher_size=5), torch.bfloat16)
    results, products = [], []
    # Two rows of both models, with a copy of one of them.
    for workspace_bytes in (None, 3 * workspace_floor(33, 4, 2)):
        with bf16_products(), ProductMeter() as meter:
            results.append(
                run_loss(srpo_loss, inputs, config=SRPOConfig(dw_beta=dw_beta), workspace_bytes=workspace_bytes)
            )
        products.append(meter.multiply_adds)
    assert products[0] == products[1]
    assert_same(*results, tolerance=2**-7)


def test_liger_computes_what_the_sheet_says_it_does() -> None:
    pytest.importorskip("liger_kernel")
    with prepare("liger", "policy", 3, 507) as (step, batch):
        torch.testing.assert_close(step()[:3], naive.prepare(batch)()[:3], atol=1e-6, rtol=1e-4)
    with prepare("liger", "jsd", 3, 507) as (step, batch):
        log_p, log_q = ((x @ batch.weight.T).log_softmax(-1) for x in (batch.hidden, batch.teacher_hidden))
        torch.testing.assert_close(
            step().loss, divergence(log_p, log_q, batch.config.divergence, batch.config.alpha).mean().detach()
        )


def test_peers_are_metered() -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("trl")
    policy, jsd = measured("trl", "policy"), measured("trl", "jsd")
    assert (policy.products, jsd.products) == (4, 10)
    assert (policy.workspace, jsd.workspace) == (4, 8)
    assert total(policy).per_element == pytest.approx(12, abs=0.05)
    assert measured("liger", "policy").products == 3
    # The projections' logits, their quotients by the temperature, three softmaxes, the kernel's loss per element.
    assert measured("liger", "jsd").workspace == 4 * 8
    assert measured("naive", "policy").operators == 4 * 8


def test_a_provider_that_is_not_there_has_its_reason_in_the_sheet() -> None:
    kernel = KernelCost(2, PerRow(8, 20), PerRow(4, 1_200), 0)
    cost = StepCost(products=3, operators=16, workspace=4, kernels={"package.some_kernel": kernel})
    sheet = Sheet({("policy", "naive"): cost, ("jsd", "naive"): cost, ("forward_kl", "naive"): "no"}, [])
    steps, _ = sheet.tables()["steps"]
    assert steps["products"].tolist() == ["3", "3", "-"]
    assert steps["all bytes"].tolist() == ["28 V + 1,220", "28 V + 1,220", "-"]
    assert steps["remark"].tolist()[-1] == "no"
    # Launches of a kernel share what it moves, cases that cost the same a line.
    found, _ = sheet.tables()["kernels"]
    assert found.to_dict("records") == [
        {
            "provider": "naive",
            "kernel": "some",
            "rows": "policy, jsd",
            "loaded": "4",
            "stored": "2",
            "extra per row": "610",
        }
    ]


def test_operators_read_their_operands_and_write_their_results() -> None:
    x, ids = torch.randn(10, 100), torch.zeros(10, 1, dtype=torch.int64)
    size = x.nbytes

    def moved(operator: object) -> int:
        with OperatorMeter() as meter:
            operator()
        return meter.bytes_moved

    assert moved(lambda: x + x) == 3 * size
    assert moved(lambda: x + x[:, :1].expand_as(x)) == 2 * size + 10 * 4
    assert moved(lambda: x.clone()) == 2 * size
    assert moved(lambda: x.mul_(2.0)) == 2 * size
    assert moved(lambda: x.copy_(torch.empty_like(x))) == 2 * size
    assert moved(lambda: x.zero_()) == size
    # Views, buffers without content and products, which have a meter of their own.
    assert moved(lambda: (x.T, x[2:], x.detach(), torch.empty_like(x), x @ x.T)) == 0
    assert moved(lambda: x.gather(1, ids)) == ids.nbytes + 2 * 10 * 4


def test_batches_are_of_one_kind() -> None:
    assert make_batch("policy", 5, 20).active_policy_rows.sum() == 5
    assert make_batch("jsd", 5, 20).sdpo_rows.sum() == 5


def test_only_what_lies_between_the_markers_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "text.md"
    document.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    for content in ("new", "newer"):
        replace_marked(document, {"a": content})
        assert document.read_text() == f"before\n<!-- a -->\n{content}\n<!-- /a -->\nafter\n"
    with pytest.raises(SystemExit, match="no <!-- b -->"):
        replace_marked(document, {"b": "new"})


def test_the_command_interprets_kernels_by_itself(tmp_path: Path) -> None:
    csv, document = tmp_path / "costs" / "cost.csv", tmp_path / "kernels.md"
    document.write_text("<!-- cost:traffic -->\n<!-- /cost:traffic -->\n")
    command = [sys.executable, "-m", "benchmarks", "cost", "--cases", "policy", "--providers", "srpo_kernels", "naive"]
    command += ["--csv", str(csv), "--docs", str(document)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "12 V + 80" in done.stdout
    lines = pd.read_csv(csv).fillna("")
    ours = lines[(lines["provider"] == "srpo_kernels") & (lines["metric"] == "products")]
    assert ours["value"].tolist() == [3]
    assert document.read_text().count("| row_grad |") == 1


def test_other_commands_leave_triton_alone() -> None:
    code = "import sys, benchmarks.costs.command, benchmarks.speed; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
