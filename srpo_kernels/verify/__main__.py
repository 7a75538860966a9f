from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    import rich  # noqa: F401
    import tyro

    from srpo_kernels.verify.command_line import parse
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"python -m srpo_kernels.verify needs the package {missing.name}: pip install srpo-kernels[verify]"
    ) from missing


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check srpo_kernels on this machine: results, gradients, determinism; then time it beside plain torch.

    Every public function is run with every group of options, in every dtype, on every backend that is there, and held
    to plain torch in fp64 on the CPU. Exits with 1 where a check fails. With TRITON_INTERPRET=1 in the environment,
    the Triton kernels are checked on the CPU, in Triton's interpreter.
    """

    device: str | None = None
    """Where to run, as torch names it: cuda (AMD's too), xpu, mps, cpu. Default: the accelerator, or else the CPU."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """auto: every backend that can run on the device."""
    json: Path | None = None
    """File to write everything to; - is the standard output, and the tables go to the standard error."""
    only: tuple[str, ...] = ()
    """Checks whose function or group contains one of these, such as token_stats, or whose case is one of them, such as
    loss_type=gspo. Default: all."""
    quick: bool = False
    """One case of each group and policy loss, in fp32 and bf16."""
    full: bool = False
    """A current model's head in every dtype (else on an accelerator in bf16), and no smaller cases for the
    interpreter."""
    timing: bool = True
    """Measure time and memory of forward and backward too; --no-timing leaves that out."""
    report: Path | None = None
    """Folder for a whole report of the device in place of all this: parity, repeated runs, rates of matmuls and row
    passes, and whole steps beside every peer that is installed, as JSON and as Markdown. Goes on where it was ended."""
    minutes: float | None = None
    """Of --report: no section begins after that; 10 if not given."""
    sizes: Literal["gpu", "small"] | None = None
    """Of --report: small ones run on any machine. Default: small ones on a CPU."""
    retry: bool = False
    """Of --report: run sections that have failed again."""
    tune: Path | None = None
    """File of python -m tools.launches whose launches of the kernels to time on a GPU, in place of all this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(Options, "python -m srpo_kernels.verify", arguments, config=(tyro.conf.FlagCreatePairsOff,))
    if options.quick and options.full:
        raise SystemExit("--quick and --full contradict each other")
    if options.tune is not None and options != Options(device=options.device, tune=options.tune):
        raise SystemExit("--tune has no other option than --device")
    if options.report is None:
        if options.minutes is not None or options.sizes is not None or options.retry:
            raise SystemExit("--minutes, --sizes and --retry are options of --report")
    elif options.json is not None or options.only or options.quick or options.full or not options.timing:
        raise SystemExit("--report has all sections: leave out --json, --only, --quick, --full and --no-timing")
    # Imported here, so that --help need not wait for torch.
    from srpo_kernels.verify.command import report_device, tune_launches, verify

    if options.tune is not None:
        return tune_launches(options, options.tune)
    return verify(options) if options.report is None else report_device(options, options.report)


if __name__ == "__main__":
    sys.exit(main())
