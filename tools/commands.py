"""Command lines of several commands, each imported when it is called: neither their list nor --help waits for torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module

from srpo_kernels.verify.command_line import parse


def run(prog: str, description: str, commands: Mapping[str, tuple[type, str, str]]) -> None:
    """Call the command that the first argument names: ``commands`` has its options, its module, and what it does."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"{prog} COMMAND --help has the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    each = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (_, _, does) in commands.items():
        each.add_parser(name, help=does, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    options, module, _ = commands[command]
    parsed = parse(options, f"{prog} {command}", sys.argv[2:])
    getattr(import_module(module), command)(parsed)
