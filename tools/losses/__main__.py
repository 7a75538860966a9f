"""``python -m tools.losses``: write the table into its document."""

from __future__ import annotations

import argparse

from tools import losses


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(prog="python -m tools.losses", description=losses.__doc__).parse_args()
    # Imported here, so that --help need not wait for torch.
    from tools.losses.table import write

    write()


if __name__ == "__main__":
    main()
