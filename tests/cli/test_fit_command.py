"""`genrec fit`: a bundle, or one line; killed and out of room too."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_support import Capture, error_of, json_of, start

from genrec import commands
from genrec.cli import main

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
