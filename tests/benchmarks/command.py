"""What the experiments' command lines share."""

from __future__ import annotations

import argparse
import sys

from genrec.errors import GenrecError


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Runs the subcommand whose function stands in `run`; returns 0, or 2 after one line on stderr."""
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except GenrecError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
