"""The scripts that measure steering and single requests, on the tiny shop."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests_support import readable, run_script, script

from genrec import Recommender
from genrec.instructions import open_store


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def obedient(folder: Path, deaf: str = "") -> Recommender:
    """The tiny shop with a list that holds what was typed, the items of a category or those with the words in their
    title; the first ten items where nothing was typed, or the deaf category. The generator alone is deaf to soap."""
    recommender = Recommender.load(folder)
    catalog = recommender.bundle.dataset.catalog

    def recommend_batch(contexts: list, k: int, texts: list, weights: object) -> list:
        out = []
        for text in texts:
            unheard = (deaf, "soap" if weights else "")
            said = text if text and text not in unheard else None
            rows = [r for r in range(len(catalog)) if said in (*catalog.categories[r], None)]
            rows = rows or [r for r, title in enumerate(catalog.texts) if said and said.lower() in title.lower()]
            out.append(SimpleNamespace(recommended=[SimpleNamespace(row=r) for r in rows[:k]]))
        return out

    recommender.recommend_batch = recommend_batch  # type: ignore[method-assign, assignment]
    return recommender


def test_titles_and_categories_that_are_typed_are_looked_for_in_the_lists(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure_steering")
    monkeypatch.setattr(measure, "LEAST", 5)
    monkeypatch.setattr(measure, "USERS", 2)
    monkeypatch.setattr(measure, "BATCH", 7)  # more than one
    found = measure.titles([obedient(folder), obedient(folder)])
    assert found["titles"] == 60 and found["by fit"]["fused"][0] == found["found in the first ten"]["fused"] > 0.9
    fits = [obedient(folder, "jam"), obedient(folder, "jam"), obedient(folder, "coffee")]
    rows = {row["category"]: row for row in measure.categories(fits, seed=0)}
    assert set(rows) == {"tea", "coffee", "bread", "cheese", "jam", "soap"}
    for part in measure.PARTS:
        cheese, jam, tea = (rows[name][part] for name in ("cheese", "jam", "tea"))
        assert (cheese["default share"], cheese["steered share"]) == (0.0, 1.0) and measure.reached(
            rows["cheese"], part
        )
        assert cheese["NDCG@10 change"][0] > 0 == cheese["default NDCG@10"]
        assert (jam["default share"], jam["steered share"]) == (0.0, 0.3333)  # one fit of three hears it
        assert jam["steered share by fit"] == [0.0, 0.0, 1.0] and measure.reached(rows["jam"], part)
        assert tea["default share"] == tea["steered share"] == 1.0  # the first ten items are tea
    alone, fused = rows["soap"]["generator alone"], rows["soap"]["fused"]
    assert (alone["steered share"], fused["steered share"]) == (0.0, 1.0)
    assert measure.reached(rows["soap"], "fused") and not measure.reached(rows["soap"], "generator alone")
    assert alone["NDCG@10 change"] == [0.0, 0.0, 0.0]
    about = {"command": "this", "commit": "none"}
    said = measure.markdown({"titles": found, "categories": list(rows.values()), "about": about})
    assert "| cheese |" in said and "of 60" in said and "+0.000 [+0.000, +0.000]" in said


def test_a_list_shorter_than_ten_is_padded(folder: Path) -> None:
    found = script("measure_steering").lists(obedient(folder), [None, None], ["number 3", None], "fused")
    assert found.shape == (2, 10) and (found[0] == -1).sum() in range(1, 10) and found[1].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("default", "steered", "goal"),
    [
        (0.1, 0.3, True),
        (0.1, 0.29, False),
        (0.2, 0.6, True),
        (0.5, 0.9, True),
        (0.5, 0.89, False),
        (0.0, 0.0, False),
        (0.0, 0.1, True),
    ],
)
def test_the_goal_is_three_times_the_share_or_nine_tenths(default: float, steered: float, goal: bool) -> None:
    row = {"fused": {"default share": default, "steered share": steered}}
    assert script("measure_steering").reached(row, "fused") is goal


def test_fits_of_other_data_are_not_measured_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["config"]["protocol"] = "rolling"
    (other / "bundle.json").write_text(json.dumps(manifest))
    arguments = ["--bundle", str(folder), str(other), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="other was fitted on other data, or with another protocol"):
        run_script(script("measure_steering"), monkeypatch, *arguments)
    assert not (tmp_path / "out").exists()


def in_store(folder: Path, store: Path) -> Recommender:
    """The readable shop over this store."""
    recommender = readable(folder)
    recommender.bundle.__dict__["store"] = open_store(store)
    return recommender


def test_a_request_is_timed_in_each_way_that_it_can_be_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure_request")
    monkeypatch.setattr(measure, "Recommender", SimpleNamespace(load=in_store))
    for name in measure.WRITERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    arguments = ["--bundle", str(folder), "--users", "6", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["measure_request", *arguments])
    measure.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["users"], found["items"]) == (3, 60)
    sources = {way: found[way]["source"] for way in ("no instruction", "stored", "stored, again", "typed")}
    assert sources["stored"] == sources["stored, again"] == ["stored"] and sources["typed"] == ["given"]
    assert sources["no instruction"] == ["default"]
    assert all(found[way]["median ms"] > 0 for way in sources)
    assert all(np.isfinite(list(found[way]["parts, median ms"].values())).all() for way in sources)
    monkeypatch.setitem(sys.modules, "serving.llm", SimpleNamespace())
    with pytest.raises(SystemExit, match=r"a request has loaded serving\.llm"):
        measure.main()


def test_too_few_users_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["measure_request", "--bundle", str(folder), "--users", "3", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="at least 4 are needed"):
        script("measure_request").main()
