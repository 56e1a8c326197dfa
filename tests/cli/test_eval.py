"""`genrec eval`: the stored table, and measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import Capture, error_of, json_of

from genrec.cli import main


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
