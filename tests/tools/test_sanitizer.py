"""The memory sanitizer: one planted fault of each kind, and kernels without one."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tools.interpreter.sanitizer import Finding, Hazard, Sanitizer, SanitizerError, sanitize, sparse_rows  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size), mask=offsets < size)


@triton.jit
def copy_rows_kernel(x_ptr, out_ptr, x_stride_row, columns, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride_row + offsets, mask=offsets < columns)
    tl.store(out_ptr + row * columns + offsets, x, mask=offsets < columns)


@triton.jit
def copy_halves_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr.to(tl.pointer_type(tl.int16)) + offsets))


@triton.jit
def overlapping_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * BLOCK // 2 + tl.arange(0, BLOCK), 1.0)


@triton.jit
def read_neighbour_kernel(x_ptr, SHIFT: tl.constexpr):
    program = tl.program_id(0)
    neighbour = tl.load(x_ptr + program + SHIFT)
    tl.store(x_ptr + program + 1, neighbour)


@triton.jit
def prefix_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, offsets.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    previous = tl.load(x_ptr + offsets - 1, mask=offsets > 0, other=0.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK + offsets, previous)


@triton.jit
def overwrite_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 0.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + 3, 1.0)


@triton.jit
def scatter_kernel(out_ptr, ids_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.load(ids_ptr + tl.arange(0, BLOCK)), 1.0)


@triton.jit
def scale_in_place_kernel(x_ptr, id_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pivot = tl.load(x_ptr + tl.load(id_ptr))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) / pivot)


@triton.jit
def count_kernel(count_ptr, READ: tl.constexpr):
    tl.atomic_add(count_ptr, 1)
    if READ:
        tl.load(count_ptr)


@triton.jit
def fail_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.static_assert(False, "planted")


def check(kernel, grid, *args, sanitizer_options=None, **constants) -> tuple[Finding, ...]:
    """The findings of one launch."""
    try:
        with sanitize(**(sanitizer_options or {})):
            kernel[grid](*args, **constants)
    except SanitizerError as error:
        assert all(str(finding) in str(error) for finding in error.findings)
        return error.findings
    return ()


def test_a_clean_kernel_has_no_finding():
    x, out = torch.randn(30), torch.empty(30)
    with sanitize(outputs={"copy_kernel": ["out_ptr"]}) as sanitizer:
        sanitizer.expect_written(out)
        copy_kernel[(4,)](x, out, 30, BLOCK=8)
    assert torch.equal(x, out)


def test_a_load_past_the_end_is_found_and_not_made():
    x, out = torch.randn(20), torch.zeros(40)
    (finding,) = check(copy_kernel, (4,), x, out, 27, BLOCK=8)
    assert finding == Finding(Hazard.OUTSIDE, "copy_kernel", ((2, 0, 0),), "x_ptr", (20,), 7)
    assert str(finding) == (
        "copy_kernel: program (2, 0, 0) accesses x_ptr[20], which is in no tensor of the launch (7 in all)"
    )
    assert torch.equal(out[:27], torch.cat([x, torch.zeros(7)]))


def test_a_store_before_the_start_is_found_and_not_made():
    memory = torch.zeros(32)
    (finding,) = check(scatter_kernel, (1,), memory[8:], torch.arange(-4, 4), BLOCK=8)
    assert (finding.hazard, finding.argument, finding.element, finding.count) == (Hazard.OUTSIDE, "out_ptr", (-4,), 4)
    assert memory.nonzero().ravel().tolist() == [8, 9, 10, 11]


def test_a_gap_between_the_rows_of_a_view_is_outside_unless_storages_are_enough():
    x, out = torch.randn(4, 8)[:, :5], torch.empty(4, 6)
    (finding,) = check(copy_rows_kernel, (4,), x, out, 8, 6, BLOCK=8, WIDE=True)
    assert (finding.hazard, finding.argument, finding.element, finding.count) == (Hazard.OUTSIDE, "x_ptr", (5,), 4)
    options = {"exact_views": False}
    assert not check(copy_rows_kernel, (4,), x, out, 8, 6, sanitizer_options=options, BLOCK=8, WIDE=True)


def test_two_views_of_one_storage_are_both_inside():
    x = torch.randn(32)
    assert not check(copy_kernel, (2,), x[:16], x[16:], 16, BLOCK=8)


def test_views_of_one_storage_with_elements_of_different_sizes_are_the_same_memory():
    memory = torch.zeros(64, dtype=torch.uint8)
    x = memory.view(torch.float32)[:8]
    assert not check(copy_kernel, (2,), x, memory.view(torch.int16)[16:24], 8, BLOCK=4)
    # The first program's 4 elements of 2 bytes are the second one's last 2 of 4 bytes.
    (finding,) = check(copy_kernel, (2,), x, memory.view(torch.int16)[12:20], 8, BLOCK=4)
    ids = ((1, 0, 0), (0, 0, 0))
    assert finding == Finding(Hazard.READ_WRITE, "copy_kernel", ids, "x_ptr/out_ptr", (6,), 2)


def test_an_access_narrower_than_the_elements_is_not_supported():
    x, out = torch.zeros(8), torch.zeros(8, dtype=torch.int16)
    with pytest.raises(Exception, match="2-byte items in tensors of 4-byte elements"):
        check(copy_halves_kernel, (1,), x, out, BLOCK=8)


def test_programs_that_write_one_element_are_found():
    (finding,) = check(overlapping_kernel, (2,), torch.empty(12), BLOCK=8)
    assert finding == Finding(Hazard.WRITE_WRITE, "overlapping_kernel", ((1, 0, 0), (0, 0, 0)), "out_ptr", (4,), 4)
    assert "programs (1, 0, 0) and (0, 0, 0) write out_ptr[4]" in str(finding)


@pytest.mark.parametrize(("shift", "element", "pair"), [(0, (1,), (1, 0)), (2, (2,), (0, 1))])
def test_a_read_of_another_programs_write_is_found_in_either_order(shift, element, pair):
    (finding,) = check(read_neighbour_kernel, (2,), torch.zeros(4), SHIFT=shift)
    ids = tuple((program, 0, 0) for program in pair)
    assert finding == Finding(Hazard.READ_WRITE, "read_neighbour_kernel", ids, "x_ptr", element, 1)
    assert f"program {ids[0]} reads x_ptr[{element[0]}], which program {ids[1]} writes" in str(finding)


def test_programs_are_named_by_their_place_in_the_grid():
    (finding,) = check(count_kernel, (1, 1, 2), torch.zeros(1, dtype=torch.int32), READ=True)
    assert finding.programs == ((0, 0, 0), (0, 0, 1))


def test_unwritten_elements_of_a_parameter_are_found():
    x, out = torch.randn(4, 6), torch.empty(4, 6)
    options = {"outputs": {"copy_kernel": ["out_ptr"]}}
    (finding,) = check(copy_kernel, (3,), x, out, 22, sanitizer_options=options, BLOCK=8)
    assert finding == Finding(Hazard.UNWRITTEN, "copy_kernel", (), "out_ptr", (3, 4), 2)
    assert "out_ptr[3, 4] is never written" in str(finding)


@pytest.mark.parametrize("name", ["missing_ptr", "size"])
def test_outputs_has_to_name_tensor_arguments(name):
    x, out = torch.randn(2, 8)
    with pytest.raises(Exception, match=f"outputs names {name}"):
        check(copy_kernel, (1,), x, out, 8, sanitizer_options={"outputs": {"copy_kernel": [name]}}, BLOCK=8)


def test_outputs_has_to_name_launched_kernels():
    with pytest.raises(ValueError, match="not launched: other_kernel"), sanitize(outputs={"other_kernel": ["x"]}):
        pass


def test_expected_elements_may_be_written_by_several_launches():
    x, out = torch.randn(16), torch.empty(4, 4)
    with sanitize() as sanitizer:
        sanitizer.expect_written(out)
        copy_kernel[(1,)](x, out, 8, BLOCK=8)
        copy_kernel[(1,)](x, out.view(16)[8:], 8, BLOCK=8)


def test_elements_that_no_launch_writes_are_found():
    x, out, other = torch.randn(16), torch.empty(4, 4), torch.empty(3)
    with pytest.raises(SanitizerError) as caught, sanitize() as sanitizer:
        sanitizer.expect_written(out[:, 2:])
        sanitizer.expect_written(other)
        copy_kernel[(1,)](x, out, 7, BLOCK=8)
    late, never = caught.value.findings
    assert late == Finding(Hazard.UNWRITTEN, "copy_kernel", (), "out_ptr", (1, 1), 5)
    assert never == Finding(Hazard.UNWRITTEN, "no kernel", (), "tensor", (0,), 3)


def test_a_program_that_reads_its_own_write_needs_a_barrier():
    x = torch.empty(16)
    assert not check(prefix_kernel, (1,), x, BARRIER=True, BLOCK=8)
    (finding,) = check(prefix_kernel, (1,), x, BARRIER=False, BLOCK=8)
    assert finding == Finding(Hazard.READ_OWN_WRITE, "prefix_kernel", ((0, 0, 0),), "x_ptr", (0,), 7)
    assert "program (0, 0, 0) reads x_ptr[0] after writing it, with no barrier between" in str(finding)


def test_a_program_that_writes_twice_needs_a_barrier():
    x = torch.empty(8)
    assert not check(overwrite_kernel, (1,), x, BARRIER=True, BLOCK=8)
    (finding,) = check(overwrite_kernel, (1,), x, BARRIER=False, BLOCK=8)
    assert finding == Finding(Hazard.WRITTEN_TWICE, "overwrite_kernel", ((0, 0, 0),), "x_ptr", (3,), 1)


def test_two_lanes_of_one_store_at_one_address_are_found():
    ids = torch.tensor([0, 5, 2, 5])
    (finding,) = check(scatter_kernel, (1,), torch.empty(8), ids, BLOCK=4)
    assert (finding.hazard, finding.element, finding.count) == (Hazard.WRITTEN_TWICE, (5,), 1)


def test_a_read_that_another_lane_overwrites_needs_a_barrier():
    x, pivot = torch.ones(8), torch.tensor([3])
    assert not check(scale_in_place_kernel, (1,), x, pivot, BARRIER=True, BLOCK=8)
    (finding,) = check(scale_in_place_kernel, (1,), x, pivot, BARRIER=False, BLOCK=8)
    assert finding == Finding(Hazard.OVERWRITTEN_READ, "scale_in_place_kernel", ((0, 0, 0),), "x_ptr", (3,), 1)


def test_atomics_of_several_programs_agree_with_each_other_but_not_with_a_plain_read():
    count = torch.zeros(1, dtype=torch.int32)
    assert not check(count_kernel, (3,), count, READ=False)
    (finding,) = check(count_kernel, (3,), count, READ=True)
    assert (finding.hazard, finding.argument) == (Hazard.READ_WRITE, "count_ptr")


def test_an_allowed_hazard_is_no_finding():
    options = {"allow": {Hazard.WRITTEN_TWICE}}
    assert not check(overwrite_kernel, (1,), torch.empty(8), sanitizer_options=options, BARRIER=False, BLOCK=8)


def test_arguments_that_are_the_same_memory_are_all_named():
    x = torch.zeros(20)
    findings = {finding.hazard: finding for finding in check(copy_kernel, (2,), x, x[1:], 16, BLOCK=8)}
    assert findings.keys() == {Hazard.READ_WRITE, Hazard.OVERWRITTEN_READ}
    assert {finding.argument for finding in findings.values()} == {"x_ptr/out_ptr"}
    assert findings[Hazard.READ_WRITE].element == (8,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offset_computed_in_int32_is_found_in_rows_that_are_far_apart(dtype):
    stride = 2**30 + 16
    x, out = sparse_rows(4, 5, stride, dtype), torch.empty(4, 5, dtype=dtype)
    x.copy_(torch.arange(20.0).view(4, 5))
    assert not check(copy_rows_kernel, (4,), x, out, stride, 5, BLOCK=8, WIDE=True)
    assert torch.equal(x, out)
    (finding,) = check(copy_rows_kernel, (4,), x, out, stride, 5, BLOCK=8, WIDE=False)
    assert (finding.hazard, finding.kernel, finding.programs) == (Hazard.OUTSIDE, "copy_rows_kernel", ((2, 0, 0),))
    # Rows 2 and 3; the address is that of the wrapped offset, whatever tensor is nearest to it.
    assert finding.count == 10


def test_an_exception_of_the_block_carries_the_findings():
    with pytest.raises(Exception, match="planted") as caught, sanitize():
        fail_kernel[(1,)](torch.zeros(6), BLOCK=8)
    assert caught.value.__notes__ == [
        "fail_kernel: program (0, 0, 0) accesses x_ptr[6], which is in no tensor of the launch (2 in all)"
    ]


def test_the_interpreter_is_as_before_after_the_block():
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    before = dict(vars(GridExecutor))
    with sanitize() as sanitizer:
        assert isinstance(sanitizer, Sanitizer)
        assert "create_masked_load" in vars(interpreter_builder)
    assert dict(vars(GridExecutor)) == before
    assert not {"create_masked_load", "create_masked_store", "create_dot"} & vars(interpreter_builder).keys()
