"""The comparison of policy losses runs to its table, on a shop that takes seconds, and says what is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compare_alignment
from alignment_arm import places
from compare_alignment import main, settled
from tests_support import shop

from genrec.bundle import Bundle
from genrec.data import load_dataset, rolling
from training.align_config import AlignConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shop with twenty events a user: long enough for the rolling protocol."""
    made = shop(tmp_path_factory.mktemp("shop"))
    rng = np.random.default_rng(3)
    items = [line.split(",")[0] for line in (made / "items.csv").read_text(encoding="utf-8").splitlines()[1:]]
    lines = ["user,item,timestamp"]
    for user in range(12):
        lines += [f"u{user},{item},{1_600_000_000 + 9_000 * n}" for n, item in enumerate(rng.permutation(items)[:20])]
    (made / "interactions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def test_the_comparison_runs_from_fit_to_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = ["--work", str(tmp_path / "w")], tmp_path / "out"
    tiny = [*work, "--seeds", "0", "--steps", "4", "--requests", "8"]
    assert main(["fit", "--data", str(folder), "--epochs", "1", "--seeds", "0", *work]) == 0
    assert main(["run", *tiny, "--arms", "untouched"]) == 0
    assert "SA-GCPO keeps the temperatures of `genrec align`" in capsys.readouterr().out
    assert main(["run", *tiny, "--arms", "sa-gcpo"]) == 0
    assert main(["table", *work, "--skip-first", "99", "--out", str(out)]) == 2
    assert "--skip-first 99 leaves no test request" in capsys.readouterr().err
    assert main(["table", *work, "--skip-first", "1", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    systems = {row["system"] for row in report["rows"]}
    assert systems == {f"untouched: {p}" for p in ("guarded", "fused")} | {
        f"sa-gcpo: {p}" for p in ("guarded", "last", "fused")
    }
    means = [row for row in report["rows"] if row["slice"] == "reward, mean"]
    assert len(means) == 3 and all(row["metrics"]["reward"]["low"] is not None for row in means)
    assert any(c["slice"] == "reward, mean" and c["baseline"] == "untouched: guarded" for c in report["comparisons"])
    assert [one["cpu"] for one in report["about"]["arms_made_on"]]
    assert report["about"]["seconds_of_an_arm"]["sa-gcpo"]["update"] > 0
    for shares in report["about"]["ratios"]["sa-gcpo"].values():
        assert all(sum(values) == pytest.approx(1, abs=1e-3) for values in shares.values())
    assert report["about"]["skip_first"] == 1 and (out / "steadiness.png").exists()
    (tmp_path / "w" / "sa-gcpo.0").rename(tmp_path / "w" / "sa-gcpo.1")
    assert main(["table", *work, "--out", str(out)]) == 2
    assert "no seed is finished in every arm (untouched: 0, sa-gcpo: 1)" in capsys.readouterr().err


def test_the_sweep_decides_the_temperatures_of_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["--work", str(tmp_path / "w")]
    tiny = [*work, "--seeds", "0", "--steps", "2", "--requests", "8"]
    monkeypatch.setattr(compare_alignment, "TEMPERATURES", ((3.0, 1.0), (1.0, 3.0)))
    best = {"sweep_3_1": 0.1, "sweep_1_3": 0.2}
    monkeypatch.setattr(compare_alignment, "validations", lambda out: [(1, best[out.name.rpartition(".")[0]])])
    assert main(["fit", "--data", str(folder), "--epochs", "1", "--seeds", "0", *work]) == 0
    assert main(["sweep", *tiny]) == 0
    kept = json.loads((tmp_path / "w" / "temperatures.json").read_text())
    assert kept["kept"] == {"positive": 1.0, "negative": 3.0, "validation": 0.2} and len(kept["tried"]) == 2
    capsys.readouterr()
    assert main(["run", *tiny, "--arms", "sa-gcpo", "sapo", "taught"]) == 0
    assert "no sweep" not in capsys.readouterr().out
    config = {arm: Bundle.load(tmp_path / "w" / f"{arm}.0").config["aligned"] for arm in ("sa-gcpo", "sapo", "taught")}
    assert [config[arm]["temperature_negative"] for arm in config] == [3.0, 1.05, AlignConfig.temperature_negative]
    assert config["taught"]["teaching"] == 0.7 and config["taught"]["policy"] == 0


def test_teaching_is_made_once_and_all_arms_of_a_table_have_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["--work", str(tmp_path / "w")]
    tiny = [*work, "--seeds", "0", "--steps", "2", "--requests", "8"]
    assert main(["fit", "--data", str(folder), "--epochs", "1", "--seeds", "0", *work]) == 0
    assert main(["run", *tiny, "--arms", "untouched", "taught"]) == 0
    assert "teaching: as for the alignments before" not in capsys.readouterr().out
    monkeypatch.setattr("genrec.generator.teacher.teach", lambda *args, **kwargs: 1 / 0)
    assert main(["run", *tiny, "--teaching", "0.7", "--arms", "sa-gcpo"]) == 0
    assert "sa-gcpo.0: teaching: as for the alignments before" in capsys.readouterr().out
    assert Bundle.load(tmp_path / "w" / "sa-gcpo.0").config["aligned"]["teaching"] == 0.7
    assert main(["table", *work, "--out", str(tmp_path / "out")]) == 2
    assert "untouched.0 was made with teaching 0.0, sa-gcpo.0 with 0.7" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "w" / "sa-gcpo.0")
    assert main(["run", *tiny, "--arms", "sa-gcpo"]) == 0
    assert main(["table", *work, "--out", str(tmp_path / "out")]) == 0


def test_the_place_of_a_request_counts_the_users_older_ones(folder: Path) -> None:
    test = rolling(load_dataset(str(folder))).test
    found = places(test, test)
    for user in np.unique(test.users):
        mine = found[test.users == user]
        assert sorted(mine.tolist()) == list(range(len(mine)))


def test_a_sweep_is_judged_by_the_last_third() -> None:
    assert settled([9.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == 5.0 and settled([7.0]) == 7.0
