"""Every configuration in which the engine can launch a kernel, for compilers that run ahead of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget

from srpo_kernels.kernels.launch import (
    RowLaunch,
    Vendor,
    elements_launch,
    gradient_terms,
    launch_options,
    merge_launch,
    mixture_terms,
    row_launch,
    tile_launch,
)
from srpo_kernels.kernels.primitives import VECTOR
from srpo_kernels.kernels.row_entries import row_entries_kernel
from srpo_kernels.kernels.row_grad import row_grad_kernel
from srpo_kernels.kernels.row_mixture import row_mixture_kernel
from srpo_kernels.kernels.row_stats import row_stats_kernel
from srpo_kernels.kernels.row_units import units_kernel
from srpo_kernels.kernels.scale import scale_kernel
from srpo_kernels.kernels.tile_stats import merge_tiles_kernel, tile_stats_kernel
from srpo_kernels.rows.mixture import MIXTURE_DIVERGENCES, MixtureDivergence, mixture_of

# Compiled in is which terms a mixture has, the same for any alpha.
_ALPHA = 0.5
# One id per row, or the default top-k.
_ID_BLOCKS = (1, 128)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments and its compile-time values.

    ``divisible`` names the pointers and strides that are multiples of 16. ``elements_per_iteration`` is how many
    columns of the vocabulary a program handles in one turn of its loop, ``bytes_per_element`` what it moves for each;
    both are 0 where there is no such loop.
    """

    kernel: str
    label: str
    function: JITFunction[object]
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    elements_per_iteration: int
    bytes_per_element: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told at a launch."""
        return launch_options(self.num_warps, self.num_stages)


def variants(target: GPUTarget) -> Iterator[Variant]:
    """All variants for ``target``."""
    vendor: Vendor = "nvidia"
    if target.backend == "hip":
        vendor = "cdna" if target.warp_size == 64 else "rdna"
    capability = int(target.arch) // 10 if vendor == "nvidia" else 0
    for softcap in (False, True):
        for half in (False, True):
            yield _row_grad(*_gradients()[0], softcap, half, 1, vendor)
            yield _row_grad(*_gradients()[0], softcap, half, _ID_BLOCKS[1], vendor)
        yield _row_stats(1, softcap, vendor)
        # A teacher with a logit transform of its own is in units where the student is not.
        for in_units in (False, True) if softcap else (False,):
            yield _row_stats(2, softcap, vendor, in_units)
            for mixed in MIXTURE_DIVERGENCES:
                yield _row_mixture(mixed, softcap, vendor, in_units)
            yield _row_entries(softcap, vendor, in_units)
            for (label, terms), half in product(_gradients()[1:], (False, True)):
                yield _row_grad(label, terms, softcap, half, 1, vendor, in_units)
        for models, dtype, bias in product((1, 2), _DTYPES, (False, True)):
            yield _tile_stats(models, dtype, softcap, bias, vendor, capability)

    for models in (1, 2):
        yield _merge_tiles(models, vendor)
    units = {"raw_ptr": "*fp32", "units_ptr": "*fp32", "count": "i32", "inner": "fp32"}
    yield _by_element("units", "softcap", units_kernel, units, ("raw_ptr", "units_ptr"), VENDOR=vendor)
    scale = {"values_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*bf16", "count": "i32"}
    yield _by_element("scale", "into bf16", scale_kernel, scale, ("values_ptr", "out_ptr", "count"))
    # Triton compiles in what is a multiple of 16, as most vocabularies are.
    gradients = dict(_gradients())
    for variant in (
        _row_stats(2, False, vendor),
        _row_mixture("jsd", False, vendor, False),
        *(_row_grad(name, gradients[name], False, True, 1, vendor) for name in ("jsd", "log-prob and entropy")),
        _tile_stats(1, torch.bfloat16, False, False, vendor, capability),
        _tile_stats(2, torch.bfloat16, False, False, vendor, capability),
    ):
        divisible = (*variant.divisible, "vocab_size")
        yield replace(variant, label=f"{variant.label}, V % 16 = 0", divisible=divisible)


def _row_stats(models: int, softcap: bool, vendor: Vendor, in_units: bool = False) -> Variant:
    launch = row_launch(models, vendor)
    return _row_variant(
        "row_stats",
        _label("student and teacher" if models == 2 else "student", softcap=softcap, teacher_in_units=in_units),
        row_stats_kernel,
        {"z_ptr": "*fp32", "y_ptr": "*fp32", "target_ids_ptr": "*i64", "sums_ptr": "*fp32"},
        {"TEACHER": models == 2, "SOFTCAP": softcap, "TEACHER_SOFTCAP": softcap and not in_units, "VENDOR": vendor},
        launch,
        4 * models,
    )


def _row_mixture(divergence: MixtureDivergence, softcap: bool, vendor: Vendor, in_units: bool) -> Variant:
    return _row_variant(
        "row_mixture",
        _label(divergence, softcap=softcap, teacher_in_units=in_units),
        row_mixture_kernel,
        {"z_ptr": "*fp32", "y_ptr": "*fp32", "coefficients_ptr": "*fp32", "sums_ptr": "*fp32"},
        {
            **mixture_terms(mixture_of(divergence, _ALPHA)),
            "SOFTCAP": softcap,
            "TEACHER_SOFTCAP": softcap and not in_units,
            "VENDOR": vendor,
        },
        row_launch(2, vendor),
        8,
    )


def _row_entries(softcap: bool, vendor: Vendor, in_units: bool) -> Variant:
    return _row_variant(
        "row_entries",
        _label("any divergence", softcap=softcap, teacher_in_units=in_units),
        row_entries_kernel,
        {"z_ptr": "*fp32", "y_ptr": "*fp32", "numbers_ptr": "*fp32", "sums_ptr": "*fp32"},
        {"SOFTCAP": softcap, "TEACHER_SOFTCAP": softcap and not in_units, "VENDOR": vendor},
        row_launch(2, vendor),
        8,
    )


def _gradients() -> list[tuple[str, dict[str, bool]]]:
    """The terms of a gradient: of none, one or several divergences."""
    mixed = {name: mixture_of(name, _ALPHA) for name in MIXTURE_DIVERGENCES}
    return [
        ("log-prob and entropy", gradient_terms(None)),
        ("forward_kl", gradient_terms(None, forward_kl=True)),
        ("reverse_kl", gradient_terms(None, reverse_kl=True)),
        *((name, gradient_terms(mixture)) for name, mixture in mixed.items()),
        ("entries", gradient_terms(None, entries=True)),
        # Of several divergences those with the most numbers in registers.
        ("both KLs, jsd", gradient_terms(mixed["jsd"], forward_kl=True, reverse_kl=True)),
        ("both KLs, entries", gradient_terms(None, forward_kl=True, reverse_kl=True, entries=True)),
    ]


def _row_grad(
    label: str,
    terms: dict[str, bool],
    softcap: bool,
    half: bool,
    id_block: int,
    vendor: Vendor,
    in_units: bool = False,
) -> Variant:
    models = 2 if any(terms.values()) else 1
    return _row_variant(
        "row_grad",
        _label(label, softcap=softcap, teacher_in_units=in_units, top_k=id_block > 1, into_bf16=half),
        row_grad_kernel,
        {
            "z_ptr": "*fp32",
            "y_ptr": "*fp32",
            "out_ptr": "*bf16" if half else "*fp32",
            "ids_ptr": "*i64",
            "id_grads_ptr": "*fp32",
            "coefficients_ptr": "*fp32",
        },
        {
            **terms,
            # Triton compiles an argument of 1 in.
            **({"num_ids": 1} if id_block == 1 else {}),
            "SOFTCAP": softcap,
            "TEACHER_SOFTCAP": softcap and not in_units,
            "BLOCK_IDS": id_block,
            "VENDOR": vendor,
        },
        row_launch(models, vendor),
        4 * models + (2 if half else 4),
    )


def _tile_stats(models: int, dtype: torch.dtype, softcap: bool, bias: bool, vendor: Vendor, capability: int) -> Variant:
    launch = tile_launch(models, dtype, vendor, capability)
    names = tile_stats_kernel.arg_names
    own = {"target_ids_ptr": "*i64", "sums_ptr": "*fp32", "inner": "fp32", "slope2": "fp32"}
    constexprs: dict[str, object] = {
        "TEACHER": models == 2,
        "BIAS": bias,
        "SOFTCAP": softcap,
        "VENDOR": vendor,
        "WIDEN": False,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_VOCAB": launch.block_vocab,
        "BLOCK_HIDDEN": launch.block_hidden,
    }
    signature = {name: own.get(name, "*" + _DTYPES[dtype] if name.endswith("_ptr") else "i32") for name in names}
    return Variant(
        "tile_stats",
        _label(
            f"student and teacher, {_DTYPES[dtype]}" if models == 2 else f"student, {_DTYPES[dtype]}",
            softcap=softcap,
            bias=bias,
        ),
        tile_stats_kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs,
        tuple(name for name in names if name.endswith(("_ptr", "_stride_row", "hidden_size"))),
        launch.num_warps,
        launch.num_stages,
        0,
        0,
    )


def _merge_tiles(models: int, vendor: Vendor) -> Variant:
    launch = merge_launch(vendor)
    return Variant(
        "merge_tiles",
        "student and teacher" if models == 2 else "student",
        merge_tiles_kernel,
        {
            "sums_ptr": "*fp32",
            "merged_ptr": "*fp32",
            "tiles": "i32",
            "slope2": "fp32",
            "TEACHER": "constexpr",
            "BLOCK_TILES": "constexpr",
        },
        {"TEACHER": models == 2, "BLOCK_TILES": launch.lanes},
        ("sums_ptr", "merged_ptr"),
        launch.num_warps,
        launch.num_stages,
        0,
        0,
    )


def _by_element(
    kernel: str,
    label: str,
    function: JITFunction[object],
    arguments: dict[str, str],
    divisible: tuple[str, ...],
    **constexprs: object,
) -> Variant:
    launch = elements_launch()
    constexprs["BLOCK"] = launch.lanes
    signature = arguments | dict.fromkeys(constexprs, "constexpr")
    return Variant(kernel, label, function, signature, constexprs, divisible, launch.num_warps, launch.num_stages, 0, 0)


def _row_variant(
    kernel: str,
    label: str,
    function: JITFunction[object],
    pointers: dict[str, str],
    constexprs: dict[str, object],
    launch: RowLaunch,
    bytes_per_element: int,
) -> Variant:
    constexprs = constexprs | {"LANES": launch.lanes}
    scalars = {"inner": "fp32", "slope2": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    names = function.arg_names
    return Variant(
        kernel,
        label,
        function,
        {name: (pointers | scalars).get(name, "i32") for name in names},
        constexprs,
        (*pointers, *(name for name in names if name.endswith("_stride_row"))),
        launch.num_warps,
        launch.num_stages,
        launch.lanes * VECTOR.value,
        bytes_per_element,
    )


def _label(text: str, **flags: bool) -> str:
    return ", ".join([text, *(name.replace("_", " ") for name, on in flags.items() if on)])
