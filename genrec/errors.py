"""Errors meant for the person at the keyboard: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations


class GenrecError(Exception):
    """Bad input or a missing piece. The command line prints the message alone and exits with 2."""


def missing_package(package: str, extra: str) -> GenrecError:
    """The error for an optional package that is not installed, with the command that installs it."""
    return GenrecError(f"{package} is not installed; install it with: pip install 'genrec[{extra}]'")
