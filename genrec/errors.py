"""Errors meant for the person at the keyboard: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping


class GenrecError(Exception):
    """Bad input or a missing piece. The command line prints the message alone and exits with 2."""


def check_least(settings: object, bounds: Mapping[str, float], of: str = "") -> None:
    """Raises GenrecError for the first setting that is less than its bound, infinite or no number. of: whose they are,
    as in "EBR's "."""
    for name, least in bounds.items():
        value = getattr(settings, name)
        if not least <= value < math.inf:
            raise GenrecError(f"{of}{name} is {value}; it must be at least {least}")


def missing_package(package: str, extra: str) -> GenrecError:
    """The error for an optional package that is not installed, with the command that installs it: from a checkout, as
    genrec is on no package index, and with uv, which reads the overrides in pyproject.toml that pip does not."""
    install = f"{sys.executable or 'python'} -m uv pip install -e '.[{extra}]'"
    return GenrecError(f"{package} is not installed; install it, in the folder of genrec, with: {install}")
