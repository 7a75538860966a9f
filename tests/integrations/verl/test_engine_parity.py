"""A step of verl's engine on 1, 2 and 4 ranks beside one process: loss, every gradient, log-probs and entropies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.processes import needs_gloo, run_ranks

pytest.importorskip("verl.workers.engine", reason="the engine needs verl with all it wants: `make test-verl` does it")

from tests.integrations.verl import engine_ranks, tiny
from tests.integrations.verl.engine_ranks import Case

pytestmark = [pytest.mark.slow, needs_gloo]

DOCS = Path(__file__).parents[3] / "docs" / "trainers.md"
COLUMNS = {"loss": "loss", "gradient": "worst gradient", "log_probs": "log-probs", "entropy": "entropies"}
TOLERANCE = 2e-6
EVERYTHING = {"kl_coef": 0.1, "kl_type": "k3_bounded", "entropy_coef": 0.01, "dual_clip": 3.0}
ONE = [
    Case("FSDP2"),
    Case("FSDP1, flat parameters", strategy="fsdp"),
    Case("padded", packed=False),
    Case("tied head", model="tied"),
    Case("softcap", model="softcap"),
    Case("logit scale, tied", model="scaled"),
    Case("bias on the head", model="bias"),
    Case("temperature 0.7", temperature=0.7),
    Case("KL, entropy, dual clip", loss=EVERYTHING),
    Case("live teacher", teacher="live"),
    Case("no teacher", teacher=None),
    Case("nobody distilled", routed="none"),
    Case("everybody distilled", routed="all"),
    Case("forward KL, no entropy weights", loss={"divergence": "forward_kl", "dw_beta": 0.0}),
]
TWO = [
    Case("FSDP2"),
    Case("FSDP2, not resharded", reshard=False),
    Case("FSDP2, offloaded", offload=True, offload_states=True),
    Case("FSDP2, kept on the host", offload_policy=True),
    Case("FSDP1, flat parameters", strategy="fsdp"),
    Case("FSDP1, wrapped by size", strategy="fsdp", wrap_size=3000),
    Case("FSDP1, original parameters", strategy="fsdp", original=True),
    Case("FSDP1, not resharded", strategy="fsdp", reshard=False),
    Case("tied head", model="tied"),
    Case("tied head, FSDP1", model="tied", strategy="fsdp"),
    Case("padded", packed=False),
    Case("padded, FSDP1", packed=False, strategy="fsdp"),
    Case("dynamic batches, checkpointing", dynamic=True, checkpointing=True),
    Case("packed to a length", pad_to_length=True),
    Case("gspo", loss={"loss_type": "gspo"}),
    Case("mean over sequences", loss={"reduction": "sequence"}),
    Case("sum by a constant length", loss={"reduction": "constant", "max_length": 12}),
    Case("a rank without a routed row", routed="last"),
    Case("a rank without a row", empty=(0, 1, 2, 3)),
    Case("LoRA", lora="adapter"),
    Case("LoRA, FSDP1", lora="adapter", strategy="fsdp"),
    Case("LoRA, the head too, FSDP1", lora="head_adapter", strategy="fsdp"),
    Case("LoRA, the head too, live teacher, FSDP1", lora="head_adapter", strategy="fsdp", teacher="live"),
    Case("LoRA on a tied head", model="tied", lora="head_adapter"),
    Case("Ulysses 2", sequence_parallel=2),
    Case("Ulysses 2, FSDP1", sequence_parallel=2, strategy="fsdp"),
    Case("Ulysses 2, gspo", sequence_parallel=2, loss={"loss_type": "gspo"}),
    Case("Ulysses 2, dynamic batches", sequence_parallel=2, dynamic=True),
]
FOUR = [
    Case("HSDP 2 x 2", fsdp_size=2),
    Case("HSDP 2 x 2, FSDP1", fsdp_size=2, strategy="fsdp"),
    Case("2 x Ulysses 2, gspo", sequence_parallel=2, loss={"loss_type": "gspo"}),
    Case("2 x Ulysses 2, mean over sequences", sequence_parallel=2, loss={"reduction": "sequence"}),
]
WORLDS = {1: ONE, 2: TWO, 4: FOUR}
ALL = [(world, case) for world, cases in WORLDS.items() for case in cases]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def errors(models: Path) -> Any:
    found: dict[int, list[dict[str, dict[str, float]]]] = {}

    def of(world: int) -> list[dict[str, dict[str, float]]]:
        if world not in found:
            found[world] = run_ranks(engine_ranks.parity, world, models, WORLDS[world], timeout_seconds=900)
        return found[world]

    return of


@pytest.mark.parametrize(("world", "case"), ALL, ids=[f"{world}: {case.name}" for world, case in ALL])
def test_a_step_is_that_of_one_process(errors: Any, world: int, case: Case) -> None:
    for of_rank in errors(world):
        assert max(of_rank[case.name].values()) <= TOLERANCE, of_rank[case.name]


REFERENCES = [
    Case("FSDP2", reference=True),
    Case("FSDP1", strategy="fsdp", reference=True),
    Case("padded", packed=False, reference=True),
    Case("temperature 0.7", temperature=0.7, reference=True),
]


def test_a_reference_infers_what_the_model_says(models: Path) -> None:
    for of_rank in run_ranks(engine_ranks.reference, 2, models, REFERENCES, timeout_seconds=300):
        for case in REFERENCES:
            assert max(of_rank[case.name].values()) <= TOLERANCE, (case.name, of_rank[case.name])


def _refusal(rank: int, folder: Path, case: Case) -> str:
    with pytest.raises(ValueError) as raised:
        engine_ranks.build(case, folder)
    return str(raised.value)


def test_lora_on_the_head_is_refused_with_fsdp2(models: Path) -> None:
    case = Case("LoRA, the head too", lora="head_adapter")
    (message,) = run_ranks(_refusal, 1, models, case, timeout_seconds=300)
    assert message.startswith("model.target_modules must leave out the LM head")


def test_the_table_in_docs_is_of_these_cases(errors: Any) -> None:
    """``WRITE_PARITY_TABLE=1`` writes it."""
    before, table, after = re.split(r"(?<=<!-- parity -->\n)|(?=<!-- /parity -->)", DOCS.read_text())
    if os.environ.get("WRITE_PARITY_TABLE"):
        lines = [f"| ranks | case | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
        for world, case in ALL:
            worst = {key: max(of_rank[case.name][key] for of_rank in errors(world)) for key in COLUMNS}
            lines.append(f"| {world} | {case.name} | {' | '.join(f'{x:.1e}' for x in worst.values())} |")
        table = "\n".join(lines) + "\n"
        DOCS.write_text(before + table + after)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [(int(row[0]), row[1]) for row in rows] == [(world, case.name) for world, case in ALL]
    assert all(float(cell) <= TOLERANCE for row in rows for cell in row[2:])
