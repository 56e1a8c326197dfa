"""Errors meant for the person at the keyboard: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import sys


class GenrecError(Exception):
    """Bad input or a missing piece. The command line prints the message alone and exits with 2."""


def missing_package(package: str, extra: str) -> GenrecError:
    """The error for an optional package that is not installed, with the command that installs it: from a checkout, as
    genrec is on no package index, and with uv, which reads the overrides in pyproject.toml that pip does not."""
    install = f"{sys.executable or 'python'} -m uv pip install -e '.[{extra}]'"
    return GenrecError(f"{package} is not installed; install it, in the folder of genrec, with: {install}")
