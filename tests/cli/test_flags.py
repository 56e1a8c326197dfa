"""Help and flags: light, complete, and refused where they are wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import ROOT, Capture

from genrec import commands
from genrec.cli import main, parser
from training.config import HEADS, PACKAGED, PROTOCOLS, TOOLS, FitConfig

COMMANDS = (
    "demo", "data", "fit", "align", "instruct", "worker", "recommend", "trace", "tool", "eval", "rank", "ui",
)  # fmt: skip


def test_help_of_every_command_loads_nothing_heavy() -> None:
    script = f"""
import contextlib, io, sys
from genrec.cli import main
for command in [[], *[[c] for c in {COMMANDS}]]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert said.getvalue().startswith("usage: genrec"), command
print(*[m for m in ("torch", "transformers", "pandas", "numpy", "pyarrow", "scipy", "gradio", "rich", "vllm")
        if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_command_is_in_the_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n    {name}" in out for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["guess"],
        ["fit"],
        ["fit", "--data", "x", "--out", "y", "--protocol", "guess"],
        ["fit", "--data", "x", "--out", "y", "--epoch", "3"],  # no abbreviations
        ["recommend"],
        ["recommend", "--user", "a", "--history", "b"],
        ["recommend", "--history", "[1,"],
        ["recommend", "--history", '[["a"]]'],
        ["recommend", "--history", "a", "--attribute", "age"],
        ["recommend", "--history", "a", "--attribute", "=24"],
        ["instruct", "--users", "-1"],
        ["instruct", "--shard", "0/2"],
        ["instruct", "--shard", "3/2"],
        ["instruct", "--expire", "3 days"],
        ["worker", "--tokens", "0"],
        ["ui", "--port", "70000"],
    ],
)
def test_wrong_flags_exit_with_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and "error:" in err


def test_fit_has_a_flag_for_every_setting() -> None:
    default = FitConfig("ml-100k", Path("out"))
    read = parser().parse_args(["fit", "--data", "ml-100k", "--out", "out"])
    assert {f.name: getattr(read, f.name) for f in dataclasses.fields(FitConfig)} == vars(default)
    changed = [
        "--epochs=3",
        "--dropout=0",
        "--tools=ease, markov",
        "--bf16",
        "--protocol=rolling",
        "--embeddings=e.npy",
    ]
    read = parser().parse_args(["fit", "--data=x", "--out=o", *changed])
    assert (read.epochs, read.dropout, read.tools, read.bf16) == (3, 0.0, ("ease", "markov"), True)
    assert (read.protocol, read.embeddings, read.out) == ("rolling", "e.npy", Path("o"))
    assert parser().parse_args(["fit", "--data=x", "--out=o", "--tools="]).tools == ()


def test_the_settings_name_what_exists() -> None:
    from genrec.generator.config import GeneratorConfig
    from genrec.tokenizer import embeddings
    from genrec.tools import FLOORS
    from training.fit import SPLITS

    assert tuple(FLOORS) == TOOLS and tuple(SPLITS) == PROTOCOLS and embeddings.PACKAGED == PACKAGED
    assert GeneratorConfig().heads == HEADS


def test_demo_settings_are_settings() -> None:
    config = FitConfig(out=Path("out"), **commands.DEMO_FIT)
    assert config.data == "ml-100k"


def test_identifiers_may_hold_commas() -> None:
    def read(text: str) -> list[str]:
        return parser().parse_args(["trace", "--history", text]).history

    assert read(" a, b ,,c") == ["a", "b", "c"] and read("") == [] and read('["a,b", 7]') == ["a,b", "7"]
