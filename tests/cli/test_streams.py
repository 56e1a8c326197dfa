"""Exit codes, clean stdout, and what a terminal shows."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import ROOT, Capture, error_of, start

from genrec import commands, terminal
from genrec.cli import main


def failing(error: BaseException) -> Callable[..., None]:
    def run(_: object) -> None:
        raise error

    return run


def test_a_fault_of_ours_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for error in (RuntimeError("odd"), OSError(errno.EIO, "odd")):
        monkeypatch.setattr(commands, "data", failing(error))
        assert main(["data", "x"]) == 1
        assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_and_ctrl_c_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors
    for error in (OSError(errno.ENOSPC, "No space left on device", "/x"), RuntimeError(words)):
        monkeypatch.setattr(commands, "data", failing(error))
        assert "no space left on the disk" in error_of(capsys, "data", "x")
    monkeypatch.setattr(commands, "data", failing(KeyboardInterrupt()))
    assert main(["data", "x"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_fault(more: list[str], shop_folder: Path) -> None:
    running = start("data", str(shop_folder), *more)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    err = running.stderr.read()
    assert running.wait() == 141 and err == b""


def test_only_json_is_on_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(_: object) -> None:
        with terminal.work("noise") as report:
            os.write(1, b"from C++\n")
            sys.stdout.write("from Python\n")
            report("from us")
        terminal.show_json({"ok": "é"})

    monkeypatch.setattr(commands, "data", noisy)
    assert main(["data", "x", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"ok": "é"} and all(said in err for said in ("from C++", "from Python", "from us"))


def test_the_bars_of_libraries_are_quiet_in_every_command() -> None:
    script = """
import sys
from genrec import cli, commands
def load(_):
    import tqdm
    from transformers.utils import logging
    list(tqdm.tqdm(range(2)))
    list(logging.tqdm(range(2)))
commands.ui = load
sys.exit(cli.main(["ui"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_json_survives_a_stdout_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show_json(["Café"])
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == ["Café"]


def test_text_for_a_terminal_is_one_bounded_printable_line() -> None:
    assert terminal.plain("a\x1b[31mb\r\n\u202ec\x07") == "a [31mb c"
    assert terminal.plain("x" * 100, 10) == "x" * 9 + "…" and terminal.plain(None) == "None"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with terminal.work("fit") as report:
        report("generator: step 1,500 of 3,000, loss 2.0 [red]x")
        report("data: 5 users\x1b[2J")
        report("teaching: 7 of 7 positions")
    out, err = capsys.readouterr()
    assert out == "" and "data: 5 users" in err and "\x1b[2J" not in err and "[red]x" in err
