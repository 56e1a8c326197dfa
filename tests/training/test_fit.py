"""The whole fit: the same bundle whether or not it was killed on the way; clear refusals."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from genrec.bundle import TIMELINE, Bundle
from genrec.data import leave_one_out, load_dataset
from genrec.errors import GenrecError
from genrec.instructions.timeline import Timeline
from training.fit import Fit, FitConfig, fit, read_embeddings

ROOT = Path(__file__).resolve().parents[2]
# Imports once, then forks a process for every [settings, moment, n, file]: killed with SIGKILL at the n-th passing of
# the moment, or left to end. The file takes how often each moment was passed. Prints the exit codes.
RUNS = """
import collections, json, os, signal, sys, threading
from pathlib import Path
from typing import Any
import faiss, matplotlib.backends.backend_agg, matplotlib.figure, scipy.optimize, torch
import genrec.generator.model, genrec.generator.teacher, genrec.tokenizer.report, training.evaluate, training.generator
from training.fit import FitConfig, fit

def run(settings, moment, at, log):
    passed = collections.Counter()
    def pass_by(where):
        passed[where] += 1
        if (where, passed[where]) == (moment, at):
            os.kill(os.getpid(), signal.SIGKILL)
    rename, step = Path.replace, training.generator.Run.train_step
    def replace(path, target):
        pass_by("written")
        rename(path, target)
        pass_by("moved" if str(target) == settings["out"] else "renamed")
    def train_step(self):
        pass_by("step")
        return step(self)
    Path.replace, training.generator.Run.train_step = replace, train_step
    if moment == "timer":
        threading.Timer(at / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    fit(FitConfig(**(settings | {"out": Path(settings["out"]), "tools": tuple(settings["tools"])})))
    Path(log).write_text(json.dumps(passed))
    sys.stdout.flush()
    os._exit(0)

for job in map(json.loads, sys.stdin):
    child = os.fork()
    if not child:
        try:
            run(*job)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def digest(bundle: Path) -> dict[str, str]:
    """Checksums of everything but the report itself, which carries times."""
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    return {name: f["sha256"] for name, f in files.items() if not name.startswith("report/report.")}


def measured(bundle: Path) -> list[Any]:
    report = json.loads((bundle / "report" / "report.json").read_text())
    return [report["rows"], report["comparisons"], report["about"]["seeds"]]


def test_kill_9_at_random_moments_changes_nothing(tiny_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    out, log = tmp_path / "killed", tmp_path / "passed.json"
    with subprocess.Popen(
        [sys.executable, "-c", RUNS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as runner:

        def run(folder: Path, moment: str = "never", at: int = 0) -> int:
            assert runner.stdin is not None and runner.stdout is not None
            changes = {"epochs": 60, "checkpoint_seconds": 0.0, "tools": ("popularity", "markov")}
            settings = tiny_config(folder, **changes).as_dict()
            runner.stdin.write(json.dumps([settings, moment, at, str(log)]) + "\n")
            runner.stdin.flush()
            return int(runner.stdout.readline())

        assert run(tmp_path / "whole") == 0
        assert json.loads(log.read_text())["step"] == 60  # more than what follows can use up
        draw = random.Random()
        moments = [
            ("written", 1),  # before anything is there
            ("timer", draw.randint(1, 300)),  # anywhere
            ("written", draw.randint(2, 12)),  # a whole temporary file stays
            ("renamed", draw.randint(2, 12)),
            ("step", draw.randint(1, 8)),
            ("step", draw.randint(1, 8)),
            ("step", draw.randint(1, 8)),
            ("written", draw.randint(1, 4)),
            ("moved", 1),  # right after the last move
        ]
        for moment, at in moments:
            assert not out.exists(), (moments, moment, at)  # nothing half-written
            assert run(out, moment, at) == -signal.SIGKILL, (moments, moment, at)
        assert out.exists() and out.with_name("killed.work").exists()
        assert run(out) == 0
    assert digest(out) == digest(tmp_path / "whole"), moments
    assert measured(out) == measured(tmp_path / "whole"), moments
    assert Bundle.load(out).folder == out
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed", "passed.json"}, moments
    assert list(tmp_path.rglob(".*")) == [], moments


def test_what_a_killed_write_leaves_is_not_sealed(tiny_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "b", epochs=1)
    left = tmp_path / "b.work" / "bundle" / "data" / ".catalog.parquet.99.tmp"

    def plant(line: str) -> None:
        if line.startswith("report: test"):
            left.write_bytes(b"half")

    bundle = fit(config, plant)
    assert not list(bundle.rglob("*.tmp")) and not [n for n in digest(bundle) if n.endswith(".tmp")]
    assert Bundle.load(bundle).folder == config.out


@pytest.mark.parametrize("left", [["done/data", "config.json"], ["config.json"], []])
def test_a_kill_after_the_last_move_is_mended_by_the_next_run(
    left: list[str], tiny_bundle: Path, tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    out, work = tmp_path / "b", tmp_path / "b.work"
    shutil.copytree(tiny_bundle, out)
    for name in left:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps(json.loads((out / "bundle.json").read_text())["config"]))
    work.mkdir(exist_ok=True)
    assert fit(tiny_config(out)) == out
    assert not work.exists()


def test_the_work_folder_of_another_fit_and_a_foreign_one_are_left_alone(
    tiny_bundle: Path, tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    out, work = tmp_path / "b", tmp_path / "b.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(GenrecError, match="exists and is no started fit"):
        fit(tiny_config(out))
    shutil.copytree(tiny_bundle, out)
    assert fit(tiny_config(out)) == out
    (work / "config.json").write_text("{}")
    assert fit(tiny_config(out)) == out
    assert (work / "thesis.txt").read_text() == "years of work"


def test_two_fits_into_one_folder_are_refused_until_the_first_ends(
    tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "b")
    said: list[str] = []

    def meanwhile(line: str) -> None:
        said.append(line)
        with pytest.raises(GenrecError, match=r"another fit is at work in .*b\.work; wait for it"):
            fit(config)
        raise KeyboardInterrupt

    for start_of_line in ("data: shop", "data: done before"):
        with pytest.raises(KeyboardInterrupt):
            fit(config, meanwhile)
        assert said.pop().startswith(start_of_line)


def test_a_finished_bundle_is_not_made_twice(tiny_bundle: Path, tiny_config: Callable[..., FitConfig]) -> None:
    before = (tiny_bundle / "bundle.json").stat().st_mtime_ns
    clock = time.monotonic()
    said: list[str] = []
    assert fit(tiny_config(tiny_bundle), said.append) == tiny_bundle
    assert (tiny_bundle / "bundle.json").stat().st_mtime_ns == before and "already" in said[-1]
    assert time.monotonic() - clock >= 0
    with pytest.raises(GenrecError, match="other settings or data"):
        fit(tiny_config(tiny_bundle, epochs=4))


def test_the_content_of_the_data_decides_what_is_the_same_fit(
    tiny_bundle: Path, tiny_config: Callable[..., FitConfig], shop_folder: Path, tmp_path: Path
) -> None:
    """A copy of the files elsewhere and another pace of checkpoints are the same fit; one line more is not."""
    copy = shutil.copytree(shop_folder, tmp_path / shop_folder.name)
    same = tiny_config(tiny_bundle, data=str(copy), embeddings=str(copy / "embeddings.npy"), checkpoint_seconds=1.0)
    assert fit(same) == tiny_bundle
    with (copy / "interactions.csv").open("a", encoding="utf-8") as file:
        file.write("u0,tea-1,1700000000\n")
    with pytest.raises(GenrecError, match="other settings or data"):
        fit(same)


def test_a_foreign_folder_is_left_alone(tiny_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(GenrecError, match="no bundle"):
        fit(tiny_config(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_started_fit_of_other_settings_is_not_mixed_in(
    tiny_config: Callable[..., FitConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GenrecError, match="no file or folder"):
        fit(tiny_config(tmp_path / "b", data=str(tmp_path / "missing")))

    def fail(self: Fit) -> str:
        raise GenrecError("stopped")

    monkeypatch.setattr(Fit, "embed", fail)
    with pytest.raises(GenrecError, match="stopped"):  # the first fit kept nothing, so it does not stand in the way
        fit(tiny_config(tmp_path / "b"))
    with pytest.raises(GenrecError, match="started fit of other settings"):
        fit(tiny_config(tmp_path / "b", epochs=4))


def test_the_report_holds_every_system_with_intervals(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "report" / "report.json").read_text())
    rows = {r["system"]: r for r in report["rows"] if r["slice"] == "all"}
    assert {
        "popularity",
        "itemknn",
        "ease",
        "markov",
        "content",
        "floors fused",
        "generator alone",
        "genrec fused",
    } <= set(rows)
    for row in rows.values():
        ndcg = row["metrics"]["NDCG@10"]
        assert ndcg["low"] <= ndcg["mean"] <= ndcg["high"]
    assert {"machine", "command", "commit", "seeds", "protocol"} <= set(report["about"])
    assert any(c["system"] == "genrec fused" and c["baseline"] == "floors fused" for c in report["comparisons"])
    assert (tiny_bundle / "report" / "ndcg-at-10.png").stat().st_size > 1000


def test_the_generator_and_weights_never_saw_the_test_items(
    tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    """Changing every user's last item changes no trained file: nothing leaks from the test set."""
    from tests_support import shop

    a, b = shop(tmp_path / "a"), shop(tmp_path / "b")
    lines = (b / "interactions.csv").read_text().splitlines()
    last: dict[str, int] = {line.split(",")[0]: i for i, line in enumerate(lines)}
    for user, i in last.items():
        if user != "user":
            _, item, when = lines[i].split(",")
            other = "jam-0" if item != "jam-0" else "jam-1"
            lines[i] = f"{user},{other},{when}"
    (b / "interactions.csv").write_text("\n".join(lines) + "\n")
    made = [fit(tiny_config(tmp_path / f"bundle-{f.name}", data=str(f), epochs=1)) for f in (a, b)]
    first, second = (digest(m) for m in made)
    trained = [n for n in first if n.startswith(("tools/", "generator/", "tokenizer/", "fusion"))]
    assert trained and all(first[n] == second[n] for n in trained)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"protocol": "guess"}, "unknown protocol"),
        ({"tools": ("magic",)}, "unknown tool 'magic'"),
        ({"tools": ("ease", "ease")}, "there twice"),
        ({"epochs": 0}, "epochs is 0"),
        ({"d_model": 0}, "d_model is 0; it must be a multiple of the 4 attention heads"),
        ({"d_model": 30}, "d_model is 30; it must be a multiple of the 4 attention heads"),
        ({"levels": 1}, "levels is 1; it must be at least 2"),
        ({"codes": 1}, "codes is 1; it must be at least 2"),
        ({"retrieved": 30, "recent": 20, "max_history": 50}, "make it larger than 50"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed is 2147483648; it must be between 0 and"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds is -1.0"),
        ({"q2i": float("nan")}, "q2i is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"teaching": 2.0}, "teaching is 2.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(GenrecError, match=says):
        FitConfig("ml-100k", tmp_path, **settings)


def test_own_embeddings_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "e.npy"
    with pytest.raises(GenrecError, match="no such embeddings"):
        read_embeddings(file, 3)
    file.write_bytes(b"not numpy")
    with pytest.raises(GenrecError, match=r"not a \.npy"):
        read_embeddings(file, 3)
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(GenrecError, match=r"not a \.npy"):
        read_embeddings(file, 1)
    np.save(file, np.ones((2, 4)))
    with pytest.raises(GenrecError, match=r"expected floats of shape \(3, dimensions\)"):
        read_embeddings(file, 3)
    np.save(file, np.array([[1.0, 0], [0, 0], [1, 1]]))
    with pytest.raises(GenrecError, match="row 1"):
        read_embeddings(file, 3)
    np.save(file, np.array([[3.0, 4.0]]))
    assert read_embeddings(file, 1).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_a_fit_without_tools_leaves_the_generator_alone(tiny_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    bundle = Bundle.load(fit(tiny_config(tmp_path / "alone", tools=(), epochs=1)))
    assert bundle.tools == {} and set(bundle.fusion("home")["fused"]) == {"generator"}


def test_a_training_position_follows_only_texts_that_were_written_before_it(
    shop_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = leave_one_out(load_dataset(str(shop_folder)))
    first, second = split.train.users[:2]
    written = Timeline((first, first, second), np.array([2, 4, 1]), ("two", "four", "one"), ("m",) * 3)
    written.save(tmp_path / "t.parquet")
    job = object.__new__(Fit)
    job.config = SimpleNamespace(instructions=str(tmp_path / "t.parquet"), embedder="packaged")  # type: ignore[assignment]
    job.split, job.folder, job.work, job.report = split, tmp_path, tmp_path, lambda _: None
    monkeypatch.setattr("training.fit.TextEmbedder", lambda _: None)
    monkeypatch.setattr("training.fit.embed_texts", lambda _, texts, say: np.ones((len(texts), 4), np.float32))
    said = job.embed_instructions()
    told = load_file(tmp_path / "told.safetensors")["told"]
    start, n = split.train.offsets.tolist(), split.train.lengths.tolist()
    # The k-th event of a user is the target of a request that knows k events.
    assert told[: start[1]].tolist() == ([-1, -1, 0, 0] + [1] * 99)[: n[0]]
    assert told[start[1] : start[2]].tolist() == ([-1] + [2] * 99)[: n[1]]
    assert (told[start[2] :] == -1).all()
    assert said == f"{n[0] - 2 + n[1] - 1} of {split.train.events:,} training positions follow one of 3"
    assert len(Timeline.load(tmp_path / TIMELINE)) == 3
