"""Rows, comparisons, provenance, and their four forms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genrec.contracts import UserContext
from genrec.data.dataset import EvalSet
from genrec.evaluation import report as reports
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import (
    Report,
    as_json,
    as_markdown,
    compare,
    published,
    rows_of,
    save,
)

INF = float("inf")


@pytest.fixture
def requests() -> EvalSet:
    contexts = [UserContext() for _ in range(6)]
    return EvalSet("test", contexts, np.zeros(6, np.int32), np.array([0, 0, 1, 1, 2, 2]), np.arange(6) < 2)


@pytest.fixture
def good() -> Ranked:
    return Ranked("good", np.array([0, 0, 0, 0, 1, INF]), np.tile([0, 1, -1], (6, 1)))


@pytest.fixture
def poor() -> Ranked:
    return Ranked("poor | <b>", np.array([0, INF, 12, INF, 30, 2]), np.tile([2, 3, 1], (6, 1)))


@pytest.fixture
def report(good: Ranked, poor: Ranked, requests: EvalSet) -> Report:
    counts, vectors = np.array([8, 4, 2, 1]), np.eye(4)
    rows = [r for s in (good, poor) for r in rows_of(s, requests, ks=(5, 10), counts=counts, vectors=vectors)]
    rows.append(published("SASRec", "somebody 2018", {"HR@10": 0.0605}))
    about = reports.provenance("leave-one-out", {"ties": 0}, 1.25, command="genrec eval")
    return Report("A $small$ table", tuple(rows), tuple(compare(good, poor, requests)), about)


def test_every_slice_has_a_row_with_its_own_numbers(good: Ranked, requests: EvalSet) -> None:
    rows = {r.slice: r for r in rows_of(good, requests, ks=(1, 10), counts=np.array([8, 4, 2, 1]))}
    assert list(rows) == ["all", "same-day", "different-day"]
    assert (rows["all"].requests, rows["all"].users) == (6, 3)
    assert (rows["same-day"].requests, rows["same-day"].users) == (2, 1)
    assert rows["all"].metrics["HR@10"].mean == pytest.approx(5 / 6)
    assert rows["all"].metrics["HR@1"].mean == pytest.approx(4 / 6)
    assert rows["different-day"].metrics["HR@10"].mean == pytest.approx(3 / 4)
    assert rows["all"].metrics["coverage"].mean == 0.5 and math.isnan(rows["all"].metrics["coverage"].low)
    assert "diversity" not in rows["all"].metrics


def test_an_empty_slice_has_no_row(good: Ranked, requests: EvalSet) -> None:
    late = EvalSet("test", requests.contexts, requests.targets, requests.users, np.zeros(6, bool))
    assert [r.slice for r in rows_of(good, late)] == ["all", "different-day"]
    assert [c.slice for c in compare(good, good, late)] == ["all", "different-day"]


def test_a_comparison_is_the_first_less_the_second(good: Ranked, poor: Ranked, requests: EvalSet) -> None:
    whole = compare(good, poor, requests)[0]
    assert (whole.system, whole.baseline, whole.slice) == ("good", "poor | <b>", "all")
    assert whole.differences["HR@10"].mean == pytest.approx(5 / 6 - 2 / 6)
    assert compare(good, good, requests)[0].differences["NDCG@10"].high == 0


def test_json_holds_every_row_and_no_nan(report: Report) -> None:
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert found["title"] == report.title and len(found["rows"]) == len(report.rows)
    last = found["rows"][-1]
    assert last["source"] == "somebody 2018"
    assert last["metrics"]["HR@10"] == {"mean": 0.0605, "low": None, "high": None}
    first = report.rows[0].metrics["HR@10"]
    assert found["rows"][0]["metrics"]["HR@10"] == {"mean": first.mean, "low": first.low, "high": first.high}


def test_markdown_has_all_rows_columns_and_what_a_number_carries(report: Report) -> None:
    text = as_markdown(report)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    header = table[0]
    for name in ("HR@5", "NDCG@10", "MRR@10", "novelty", "diversity", "coverage", "requests", "source"):
        assert f" {name} " in header
    unescaped = [line.replace("\\|", "") for line in table]
    assert {line.count("|") for line in unescaped[: 1 + len(report.rows)]} == {header.count("|")}
    assert "| SASRec | all |  |" in text and "somebody 2018" in text and "0.0605 |" in text
    assert "poor \\| <b>" in text and "Paired differences" in text and "+0.5000 [" in text
    for said in ("genrec eval", "leave-one-out", "'ties': 0", "commit"):
        assert said in text


def test_save_writes_json_markdown_and_plots(report: Report, tmp_path: Path) -> None:
    save(report, tmp_path / "report", plots=("HR@10", "NDCG@10", "no such metric"))
    found = {f.name: f for f in (tmp_path / "report").iterdir()}
    assert set(found) == {"report.json", "report.md", "hr-at-10.png", "ndcg-at-10.png"}
    assert found["hr-at-10.png"].read_bytes().startswith(b"\x89PNG") and found["hr-at-10.png"].stat().st_size > 5000
    assert json.loads(found["report.json"].read_text())["title"] == report.title


def test_provenance_says_where_a_number_comes_from() -> None:
    about = reports.provenance("p", {"fit": 3}, 12.345)
    assert about["seeds"] == {"fit": 3} and about["seconds"] == 12.3 and about["command"]
    assert about["machine"]["cores"] >= 1 and about["machine"]["cpu"] and about["machine"]["packages"]["numpy"]
    assert json.dumps(about)


def test_the_commit_marks_changes_and_is_unknown_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "genrec" / "evaluation" / "report.py"
    module.parent.mkdir(parents=True)
    module.write_text("one")
    monkeypatch.setattr(reports, "__file__", str(module))
    assert reports.commit() == "unknown"

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    assert reports.commit() == "unknown"  # a checkout without a commit
    git("add", ".")
    git("commit", "-m", "one")
    clean = reports.commit()
    assert len(clean) == 40
    module.write_text("two")
    assert reports.commit() == clean + "+changes"


def test_heavy_packages_wait_until_they_are_needed() -> None:
    code = "import sys, genrec.evaluation.report, genrec.tools.fusion, genrec.tools; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "rich", "sklearn", "pandas"} & set(loaded)
