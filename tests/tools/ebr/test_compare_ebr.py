"""The comparison of EBR's arms on a small world: it goes on after a kill, keeps runs apart, and sees no test event."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrec.data import Dataset
from genrec.io import read_json
from genrec.tools.ebr import EBR, Controls, EBRConfig
from genrec.tools.learning import _Run
from tests.tools.ebr.ebr_world import SMALL, world_catalog, world_sequences

SETTINGS = json.dumps(SMALL | {"steps": 6, "check": 3})
WORLD = Dataset("world", world_catalog(), world_sequences(24))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; `data` is what it loads."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import compare_ebr

    monkeypatch.setattr(compare_ebr, "data", WORLD, raising=False)
    monkeypatch.setattr(compare_ebr, "load_dataset", lambda _: compare_ebr.data)
    monkeypatch.setattr(compare_ebr, "CUTS", (5, 20, 100))
    monkeypatch.setattr(compare_ebr, "LIST", 5)
    return compare_ebr


def run(compare: Any, monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr("sys.argv", ["compare_ebr.py", *map(str, flags)])
    return int(compare.main())


def fit(compare: Any, monkeypatch: pytest.MonkeyPatch, work: Path, *flags: object) -> int:
    shared = ("--data", "world", "--work", work, "--seeds", 0, "--settings", SETTINGS)
    return run(compare, monkeypatch, "fit", *shared, "--arms", "softmax", "hadamard", *flags)


def test_a_killed_comparison_goes_on_to_its_table(
    compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out, save = tmp_path / "arms", tmp_path / "out", _Run.save

    def dies(run: _Run, path: Path) -> None:
        save(run, path)
        if "hadamard" in str(path) and run.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr("genrec.tools.learning.SAVE_SECONDS", -1.0)
        killing.setattr(_Run, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(compare, monkeypatch, work)
    assert (work / "softmax.0" / "done.json").is_file() and not (work / "hadamard.0" / "done.json").is_file()
    assert fit(compare, monkeypatch, work) == 0
    assert "softmax.0: done before" in capsys.readouterr().out
    assert fit(compare, monkeypatch, tmp_path / "whole") == 0
    for name in ("global", "inside", "quota5", "oracle20"):
        files = (f / "hadamard.0" / f"{name}.npy" for f in (work, tmp_path / "whole"))
        np.testing.assert_array_equal(*map(np.load, files))

    table = ("table", "--data", "world", "--work", work, "--seeds", 0, "--out", out)
    assert run(compare, monkeypatch, *table) == 0
    about = read_json(out / "report.json")["about"]
    assert about["arms"]["hadamard"]["steps"] == about["arms"]["softmax"]["steps"] == [6]
    assert about["arms"]["hadamard"]["ms_per_step"][0] > 0 and about["settings"]["negatives"] == 6
    assert (out / "alpha.png").is_file() and len(about["alpha"]) == len(compare.ALPHAS)
    assert any("EBR, Hadamard - SASRec, softmax, Recall@" in name for name in about["verdicts"])
    assert {len(x["NDCG@10"]) for x in about["per_seed"].values()} == {1}

    capsys.readouterr()
    assert fit(compare, monkeypatch, work, "--negatives", 3) == 2
    assert capsys.readouterr().err.strip() == (
        f"{work / 'softmax.0'} was made with other negatives; take another --work or remove it"
    )
    items = np.roll(WORLD.sequences.items, 1)
    monkeypatch.setattr(compare, "data", replace(WORLD, sequences=replace(WORLD.sequences, items=items)))
    assert run(compare, monkeypatch, *table) == 2
    assert "was made with other data" in capsys.readouterr().err


def test_test_events_change_ranks_only(compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clusters, weights, the step and the alpha that are chosen: from the data set through the split to the files."""
    s = WORLD.sequences
    items = s.items.copy()
    items[s.offsets[1:] - 1] = (items[s.offsets[1:] - 1] + 5) % 32
    assert fit(compare, monkeypatch, tmp_path / "a") == 0
    monkeypatch.setattr(compare, "data", replace(WORLD, sequences=replace(s, items=items)))
    assert fit(compare, monkeypatch, tmp_path / "b") == 0
    for arm in ("softmax.0", "hadamard.0"):
        a, b = (tmp_path / f / arm for f in "ab")
        assert (a / "tool" / "tool.safetensors").read_bytes() == (b / "tool" / "tool.safetensors").read_bytes()
        one, other = (read_json(f / "done.json") for f in (a, b))
        assert one["learned"]["best_step"] == other["learned"]["best_step"]
        assert (one["alpha"], one["recall_of_alphas"]) == (other["alpha"], other["recall_of_alphas"])
        assert (np.load(a / "global.npy") != np.load(b / "global.npy")).any()


def test_quota_ranks_are_places_in_the_lists_that_the_tool_gives(compare: Any) -> None:
    split = compare.SPLITS["leave-one-out"](WORLD)
    tool = EBR(EBRConfig(**SMALL, steps=6)).fit(split.train, WORLD.catalog)
    for alpha in (1.0, 0.5, 2.0):
        found = compare.measure(tool, split.test, tool.clusters, alpha)
        lists = tool.retrieve(split.test.contexts, 5, Controls(alpha=alpha))
        for i, (target, mine) in enumerate(zip(split.test.targets, lists, strict=True)):
            place = np.flatnonzero(mine.items == target)
            assert found["quota5"][i] == (place[0] if len(place) else np.inf)
    alpha, recalls = compare.choose_alpha(tool, split.validation)
    ranks = compare.measure(tool, split.validation, tool.clusters, alpha)["quota5"]
    assert max(recalls) == pytest.approx(np.isfinite(ranks).mean())
    ranked = compare.measure(tool, split.validation, tool.clusters, alpha)["global"]
    assert compare.recall(tool, split.validation) == pytest.approx((ranked < 5).mean())


def test_arms_that_learn_as_many_positions_a_step_as_prompts_do(
    compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A prompt splits a sequence into several rows, so equal rows are not equal positions."""
    work, arms = tmp_path / "arms", ("softmax", "softmax-few", "softmax-many", "hadamard", "none-few", "random")
    shared = ("--data", "world", "--work", work, "--seeds", 0, "--settings", SETTINGS)
    assert run(compare, monkeypatch, "fit", *shared, "--arms", *arms) == 0
    done = {arm: read_json(work / f"{arm}.0" / "done.json") for arm in arms}
    assert done["softmax-few"]["rows"] == done["none-few"]["rows"] < done["softmax"]["rows"] == done["hadamard"]["rows"]
    for arm in ("softmax-few", "softmax-many", "none-few", "random"):
        assert done[arm]["epochs"] == pytest.approx(done["hadamard"]["epochs"], rel=0.2)
    assert done["softmax"]["epochs"] > 1.5 * done["hadamard"]["epochs"]
    saved = read_json(work / "softmax-many.0" / "tool" / "tool.json")
    assert saved["config"]["negatives"] == 6 * saved["config"]["clusters"]
    table = ("table", "--data", "world", "--work", work, "--seeds", 0, "--out", tmp_path / "out")
    assert run(compare, monkeypatch, *table) == 0


def test_a_verdict_says_when_the_seeds_do_not_agree(compare: Any) -> None:
    interval = compare.bootstrap(np.full((50, 1), 0.1), np.arange(50))[0]
    pair = compare.Comparison(
        compare.OURS, compare.MATCHED, "all", 50, {"Recall@100": interval, "in cluster @10": interval}
    )
    seeds = {compare.OURS: {"Recall@100": [0.3, 0.1], "in cluster @10": [0.3, 0.3]}}
    seeds[compare.MATCHED] = {"Recall@100": [0.1, 0.2], "in cluster @10": [0.1, 0.2]}
    said = compare.verdicts([pair], [], seeds)
    assert said[f"{compare.OURS} - {compare.MATCHED}, Recall@100"].endswith("above, but not in every seed")
    assert said[f"{compare.OURS} - {compare.MATCHED}, in cluster @10"].endswith("above")
