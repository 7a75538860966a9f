"""What the compile gate reads from machine code, and the rules that it holds that to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from srpo_kernels.kernels.variants import Variant
from tools.gate import machine_code, rules
from tools.gate.hazards import early_reads
from tools.gate.targets import KINDS, TARGETS, Kind

# A prologue, a loop that was unrolled twice with its cold path behind the exit, and what is left over.
LOOPS = """
        /*0000*/                   MOV R0, 0x1 ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64+0x1000] ;
        /*0040*/               @P1 BRA `(.L_x_4) ;
.L_x_5:
        /*0050*/                   FADD R0, R0, R4 ;
        /*0060*/                   MUFU.EX2 R0, R0 ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00a0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00b0*/                   BRA.U UP0, `(.L_x_2) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   FMNMX R4, R4, R8, !PT ;
        /*00e0*/                   BRA `(.L_x_5) ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_the_one_that_reads_most() -> None:
    program = machine_code.parse_sass(LOOPS)
    loops = machine_code.natural_loops(program)
    assert [sorted(loop) for loop in loops] == [[*range(2, 9), 13, 14], [9, 10, 11]]
    assert machine_code.main_loop(program) == loops[0]
    assert [program.instructions[index].kind for index in sorted(loops[0])] == [
        *("memory", "memory", "control", "fp32", "special", "memory", "control", "alu", "control")
    ]
    assert sum(program.instructions[index].load_bytes for index in loops[0]) == 32
    assert sum(program.instructions[index].store_bytes for index in loops[0]) == 8


def test_a_program_without_loops_has_no_main_loop() -> None:
    program = machine_code.parse_amdgcn(
        "f:\n\tglobal_load_dwordx4 v[0:3], v4, s[0:1]\n\ts_endpgm\n.Lfunc_end0:\n\tv_nop\n"
    )
    assert [(i.load_bytes, i.falls_through) for i in program.instructions] == [(16, True), (0, False)]
    assert machine_code.main_loop(program) == frozenset()


@pytest.mark.parametrize(
    ("name", "registers", "shared", "columns", "num_warps", "blocks"),
    [
        ("sm_90", 32, 0, 0, 8, 8),
        ("sm_90", 33, 0, 0, 8, 6),
        ("sm_90", 255, 0, 0, 8, 1),
        ("sm_90", 32, 96 * 1024, 0, 4, 2),
        ("sm_80", 32, 163 * 1024, 0, 4, 1),
        ("sm_100", 32, 0, 256, 4, 2),
        ("sm_120", 32, 0, 0, 8, 6),
        ("gfx942", 64, 0, 0, 4, 8),
        ("gfx942", 94, 0, 0, 4, 5),
        ("gfx942", 64, 40 * 1024, 0, 4, 1),
    ],
)
def test_resident_blocks(name: str, registers: int, shared: int, columns: int, num_warps: int, blocks: int) -> None:
    assert TARGETS[name].resident_blocks(registers, shared, columns, num_warps) == blocks


def test_the_busiest_pipe_sets_the_issue_ratio() -> None:
    device = TARGETS["sm_90"].device
    assert device is not None
    # 3.35 TB/s over 132 SMs at 1.98 GHz is 12.8 bytes per clock.
    assert device.bytes_per_clock == pytest.approx(12.82, abs=0.01)
    counts = dict.fromkeys(KINDS, 0.0) | {"special": 2.0, "fp32": 10.0}
    ratio, pipe = device.issue_ratio(counts, 4)
    assert (pipe, ratio) == ("special", pytest.approx(2 / 16 / (4 / 12.82), rel=1e-3))


@pytest.mark.parametrize(
    ("constexprs", "change", "broken"),
    [
        ({"TEACHER": False}, {}, []),
        ({"TEACHER": False}, {"loop_bytes": 32}, ["14.5 instructions > 14"]),
        ({"TEACHER": True}, {"loop_bytes": 32}, []),
        ({"TEACHER": False, "SOFTCAP": True}, {"loop_bytes": 32}, []),
        ({"TEACHER": True}, {"loop_instructions": {"special": 64}}, ["issue/memory 0.801 > 0.7"]),
        ({}, {"shared_bytes": 228 * 1024}, ["233472 bytes of shared memory, of 232448"]),
        ({}, {"loop_bytes": 0, "narrowest_loop_load": 0}, ["loads of 0 bytes", "the main loop is None iterations"]),
    ],
)
def test_limits(constexprs: dict[str, object], change: dict[str, Any], broken: list[str]) -> None:
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0) | {"fp32": 100, "memory": 16}
    code = machine_code.MachineCode(32, 0, 0, 0, 16, "none", 16, 64, counts)
    changed = change | {"loop_instructions": counts | change.get("loop_instructions", {})}
    variant = Variant("row_stats", "", None, {}, constexprs, (), 8, 1, 256 * 8, 4)
    line = rules.line_of(variant, TARGETS["sm_90"], replace(code, **changed), 0.0)
    assert line.broken == "; ".join(broken)


def early(text: str, hazard: Any) -> int:
    return early_reads("f:\n" + "".join(f"\t{line}\n" for line in text.split("; ")) + "\ts_endpgm\n", hazard)


@pytest.mark.parametrize(
    ("text", "state", "result"),
    [
        ("v_log_f32 v2, v1; v_add_f32_e32 v3, v2, v2", 1, 1),
        # A wait state is any instruction; RDNA 3 wants the result.
        ("v_log_f32 v2, v1; s_nop 0; v_add_f32_e32 v3, v2, v2", 0, 1),
        ("v_log_f32 v2, v1; s_waitcnt_depctr 0xfff; v_add_f32_e32 v3, v2, v2", 0, 0),
        ("v_rcp_f32_e32 v2, v1; s_nop 0; v_dual_mul_f32 v5, v6, v7 :: v_dual_add_f32 v3, v4, v2", 0, 1),
        # What adds to a register reads it.
        ("v_exp_f32_e32 v2, v1; v_fmac_f32_e32 v2, v3, v4", 1, 1),
        ("v_exp_f32_e32 v2, v1; v_mov_b32_e32 v2, 0; v_add_f32_e32 v3, v2, v2", 0, 0),
        ("v_exp_f32_e32 v2, v1; v_pk_add_f32 v[8:9], v[2:3], v[4:5]", 1, 1),
        # Another transcendental follows at once on CDNA; on RDNA the second reads the first.
        ("v_exp_f32_e32 v2, v1; v_log_f32_e32 v3, v2; s_nop 0; v_add_f32_e32 v4, v5, v5", 0, 1),
        ("v_exp_f32_e32 v2, v1; " + "v_mul_f32_e32 v5, v6, v6; " * 6 + "v_add_f32_e32 v3, v2, v2", 0, 0),
        ("v_exp_f32_e32 v2, v1; " + "v_mul_f32_e32 v5, v6, v6; " * 5 + "v_add_f32_e32 v3, v2, v2", 0, 1),
    ],
)
def test_transcendentals_that_are_read_too_early(text: str, state: int, result: int) -> None:
    assert (early(text, "state"), early(text, "result")) == (state, result)


def test_a_reader_behind_a_branch_is_found() -> None:
    text = (
        "f:\n.LBB0_1:\n\tv_add_f32_e32 v3, v2, v2\n\tv_log_f32 v2, v1\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
        ".Lfunc_end0:\n"
    )
    assert early_reads(text, "result") == 1
    assert early_reads(text, "state") == 0
