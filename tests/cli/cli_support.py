"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genrec.cli import main

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def start(*arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    """`genrec` in a process of its own, which Ctrl-C ends also where the tests run in a background that ignores it."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen([sys.executable, "-m", "genrec", *arguments], env=environment, preexec_fn=listen, **pipes)


def error_of(capsys: Capture, *arguments: str) -> str:
    """The one line of an exit with 2; stdout must be empty."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("genrec: error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def json_of(capsys: Capture, *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)
