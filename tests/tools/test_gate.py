"""The compile gate: planted defects, and every kernel of the library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("tyro")

import pandas as pd
import triton
import triton.language as tl

from srpo_kernels.kernels.variants import Variant
from tools.gate import command, rules
from tools.gate.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
NAMES = tuple(TARGETS)
LANES, VECTOR = 256, 4


@triton.jit
def sum_of_powers(x_ptr, out_ptr, stride_row, size, WHOLE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sum of exp2 over the whole blocks of a row, or over the row behind a mask that no vector load can have."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    total = tl.zeros([LANES, VECTOR], tl.float32)
    for start in range(0, size // (LANES * VECTOR) * (LANES * VECTOR) if WHOLE else size, LANES * VECTOR):
        if WHOLE:
            x = tl.load(x_ptr + row * stride_row + start + columns)
        else:
            x = tl.load(x_ptr + row * stride_row + start + columns, mask=start + columns < size, other=0.0)
        total += tl.exp2(x)
    tl.store(out_ptr + row, tl.sum(total))


@triton.jit
def keep_everything(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Hold a whole block in one warp's registers, across a reduction."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x * tl.sum(x))


@triton.jit
def matrix_product(x_ptr, y_ptr, out_ptr, size, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, size, K):
        x = tl.load(x_ptr + m[:, None] * size + start + k[None, :])
        y = tl.load(y_ptr + n[None, :] * size + start + k[:, None])
        total = tl.dot(x, y, total, input_precision="ieee")
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def logarithm_without_a_wait(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.inline_asm_elementwise("v_log_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + offsets, y * 2.0 + x)


def planted() -> Iterator[str]:
    """Compile the kernels above for every target: lines as JSON. Runs where Triton is no interpreter."""

    def line(
        target: Target,
        label: str,
        function: Any,
        pointers: str,
        scalars: dict[str, str],
        constexprs: dict[str, object],
        num_warps: int,
        elements: int = 0,
        size: int = 0,
    ) -> str:
        types = {"x_ptr": pointers, "y_ptr": pointers, "out_ptr": "*fp32"} | scalars
        signature = {name: types.get(name, "constexpr") for name in function.arg_names}
        known = tuple(name for name in signature if name.endswith(("_ptr", "stride_row")))
        variant = Variant(label, label, function, signature, constexprs, known, num_warps, 2, elements, size)
        return json.dumps(asdict(rules.measure(variant, target)))

    row = {"stride_row": "i64", "size": "i32"}
    tile = {"M": 128, "N": 64, "K": 64}
    small = {"M": 16, "N": 16, "K": 16}
    for target in TARGETS.values():
        if rules.what_is_missing(target) is not None:
            continue
        for label, whole, size in (("whole", True, 4), ("masked", False, 4), ("miscounted", True, 3)):
            block = {"WHOLE": whole, "LANES": LANES, "VECTOR": VECTOR}
            warps = 256 // target.warp_size
            yield line(target, label, sum_of_powers, "*fp32", row, block, warps, LANES * VECTOR, size)
        for label, pointers, shape, warps in (
            ("bf16", "*bf16", tile, 4),
            ("bf16, one warp", "*bf16", small, 1),
            ("fp32", "*fp32", small, 1),
        ):
            yield line(target, label, matrix_product, pointers, {"size": "i32"}, shape, warps)
        # All of the 256 registers that a thread of a warp of 32 has, or the 512 of one of 64.
        block = 8 * target.warp_size**2
        yield line(target, "spilling", keep_everything, "*fp32", {}, {"BLOCK": block}, 1)
        # On CDNA 3 this compiler adds the wait state behind assembly too.
        if target.hazard == "result":
            yield line(target, "early", logarithm_without_a_wait, "*fp32", {}, {"BLOCK": 64}, 1)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=variables, timeout=1_800
    )


@pytest.fixture(scope="module")
def lines() -> pd.DataFrame:
    done = python("-m", "tests.tools.test_gate", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return pd.DataFrame([json.loads(line) for line in done.stdout.splitlines()]).set_index(["label", "target"])


def skip_if_left_out(lines: pd.DataFrame, *names: str) -> None:
    if left_out := set(names) - set(lines.index.get_level_values("target")):
        pytest.skip(f"this machine's Triton cannot compile for {', '.join(sorted(left_out))}")


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_over_whole_blocks_breaks_no_rule(lines: pd.DataFrame, name: str) -> None:
    skip_if_left_out(lines, name)
    line = lines.loc["whole", name]
    assert line.broken == ""
    assert line.narrowest_loop_load == line.widest_load == 16
    assert line.spill_bytes == 0
    # One exp2 and one sum of an element, however often the loop is unrolled.
    assert line.special == 1.0
    assert line.fp32 >= (0.5 if name.startswith("gfx") else 1.0)
    assert line.fp32 + line.alu + line.special < line.total < 12
    assert line.unrolled >= 1


def test_ptxas_unrolls_a_short_loop(lines: pd.DataFrame) -> None:
    skip_if_left_out(lines, "sm_90")
    assert lines.loc[("whole", "sm_90"), "unrolled"] == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("label", "message"),
    [("masked", "loads of 4 bytes"), ("miscounted", "the main loop is"), ("spilling", "spills")],
)
def test_planted_defects_are_reported(lines: pd.DataFrame, label: str, message: str, name: str) -> None:
    skip_if_left_out(lines, name)
    assert message in lines.loc[(label, name), "broken"]


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.hazard == "result"])
def test_a_logarithm_that_is_read_too_early_is_reported(lines: pd.DataFrame, name: str) -> None:
    skip_if_left_out(lines, name)
    assert "transcendentals are read before they are there" in lines.loc[("early", name), "broken"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dot_is_known_by_its_instruction(lines: pd.DataFrame, name: str) -> None:
    skip_if_left_out(lines, name)
    assert lines.loc[("bf16", name), "tensor_core"] == TARGETS[name].tensor_core
    assert "instead of" not in lines.loc[("bf16", name), "broken"]
    assert lines.loc[("fp32", name), "tensor_core"] == ("MFMA" if name.startswith("gfx9") else "none")


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
def test_a_dot_that_misses_the_newest_tensor_core_is_reported(lines: pd.DataFrame, name: str) -> None:
    skip_if_left_out(lines, name)
    assert f"HMMA instead of {TARGETS[name].tensor_core}" in lines.loc[("bf16, one warp", name), "broken"]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.md"
    path.write_text(
        "before\n<!-- gate:resources -->\nold\n<!-- /gate:resources -->\n"
        "between\n<!-- gate:roofline --><!-- /gate:roofline -->\nafter\n"
    )
    return path


def test_a_document_gets_both_tables(lines: pd.DataFrame, document: Path) -> None:
    skip_if_left_out(lines, *NAMES)
    lines = lines.reset_index()
    for _ in range(2):
        command.write_tables(document, lines)
        text = document.read_text()
        assert "old" not in text
        assert text.startswith("before\n<!-- gate:resources -->\n")
        assert text.endswith("<!-- /gate:roofline -->\nafter\n")
        assert text.count("| kernel | label | sm_80 | sm_90 | gfx942 |\n") == 1
        assert text.count("| kernel | label | bytes | A100 | H100 | MI300X |\n") == 1
        assert "HMMA instead of HGMMA" in text


def test_a_document_without_markers_is_refused(lines: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "empty.md"
    path.write_text("nothing")
    with pytest.raises(SystemExit, match="gate:resources"):
        command.write_tables(path, lines.reset_index())
    assert path.read_text() == "nothing"


QUICK = ("sm_90",)


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(tuple(name for name in NAMES if name not in QUICK), id="others", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_of_the_library_keeps_the_rules(targets: tuple[str, ...], document: Path, tmp_path: Path) -> None:
    path = tmp_path / "gate.csv"
    # The interpreter is for other tests: the gate has to step out of it.
    options = ("--targets", *targets, "--csv", str(path), "--docs", str(document))
    done = python("-m", "tools.gate", *options, TRITON_INTERPRET="1")
    assert path.exists(), done.stderr
    lines = pd.read_csv(path, keep_default_na=False)
    broken = lines[lines["broken"] != ""]
    assert broken.empty, broken[["kernel", "label", "target", "broken"]].to_string()
    left_out = set(re.findall(r"^(\w+) is left out", done.stderr, re.MULTILINE))
    assert done.returncode == (1 if left_out else 0), done.stderr
    for _, line in lines.iterrows():
        name = f"{line.kernel}, {line.label}, {line.target}"
        assert line.blocks >= 1, name
        if line.bytes_per_element:
            assert line.narrowest_loop_load == 16, name
            assert float(line.unrolled) >= 1, name
    assert set(lines["target"]) == set(targets) - left_out
    assert set(lines["kernel"]) >= {"row_stats", "row_mixture", "row_grad", "tile_stats"}
    assert lines.groupby("target").size().nunique() == 1
    assert "| tile_stats |" in document.read_text()


def test_a_target_without_its_assembler_is_left_out_by_name(tmp_path: Path) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'release 13.1, V13.1.80' || exit 1\n")
    assembler.chmod(0o755)
    # Of all kernels the one with the fewest variants; a process more is another import of torch.
    call = ("-m", "tools.gate", "--jobs", "1", "--kernels", "row_entries", "--targets")
    done = python(
        *call, "sm_90", "sm_100", TRITON_PTXAS_BLACKWELL_PATH=str(assembler), TRITON_CACHE_DIR=str(tmp_path / "cache")
    )
    assert done.returncode == 1
    assert re.search(r"^sm_100 is left out: \w+Error: .+", done.stderr, re.MULTILINE), done.stderr
    assert "row_entries" in done.stdout
    assert "0 with broken rules; targets left out: 1" in done.stdout
    alone = python(*call, "sm_100", TRITON_PTXAS_BLACKWELL_PATH=str(assembler))
    assert alone.returncode == 1
    assert "Traceback" not in alone.stderr


def test_a_kernel_that_is_not_there_is_refused() -> None:
    done = python("-m", "tools.gate", "--targets", "sm_90", "--kernels", "row_none", "--jobs", "1")
    assert done.returncode == 1
    assert "no kernel is named row_none" in done.stderr


if __name__ == "__main__":
    for line in planted():
        print(line)
