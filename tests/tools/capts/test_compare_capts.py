"""The comparison of CAPTS' policies on a small world: from fit to table, and what it must not see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrec.data import Dataset
from genrec.io import read_json
from genrec.tools import CAPTSConfig
from genrec.tools.capts.requests import DAY, look_ahead, triggers_of
from tests.tools.ebr.ebr_world import world_catalog, world_sequences

CHEAP = {"channels": ["itemknn", "markov", "content"], "neighbours": 6, "depth": 3, "quota": 4, "epochs": 2, "width": 8}
CHEAP |= {"rows": 32, "learning_rate": 0.01}
WORLD = Dataset("world", world_catalog(), world_sequences(40))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; `data` is what it loads."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import compare_capts

    monkeypatch.setattr(compare_capts, "data", WORLD, raising=False)
    monkeypatch.setattr(compare_capts, "load_dataset", lambda _: compare_capts.data)
    monkeypatch.setattr(compare_capts, "CUTS", (6, 10, 14))
    monkeypatch.setattr(compare_capts, "AT", 10)
    return compare_capts


def run(compare: Any, monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr("sys.argv", ["compare_capts.py", *map(str, flags)])
    return int(compare.main())


def test_from_fit_to_table(
    compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "arms", tmp_path / "out"
    shared = ("--data", "world", "--work", work, "--seeds", 0)
    fit = ("fit", *shared, "--quotas", 2, "--settings")
    assert run(compare, monkeypatch, *fit, json.dumps(CHEAP)) == 0
    assert run(compare, monkeypatch, *fit, json.dumps(CHEAP)) == 0
    assert "capts.0: done before" in capsys.readouterr().out
    assert run(compare, monkeypatch, *fit, json.dumps(CHEAP | {"depth": 2})) == 2
    assert "was made with other depth; take another --work" in capsys.readouterr().err

    found = {name: np.load(work / "capts.0" / f"{name}.npy") for name in compare.ARMS}
    names = compare.columns(CHEAP["channels"])
    fetched, wasted = names.index("fetched@6"), names.index("wasted@10")
    for name in compare.ARMS:  # an upper bound, for every request and list
        assert (found[name][:, :3] <= found[compare.ORACLE][:, :3] + 1e-9).all()
        assert found[name].shape[1] == len(names)
        assert (found[name][:, fetched : fetched + 3] <= compare.CUTS).all()
        assert ((found[name][:, wasted] >= 0) & (found[name][:, wasted] < 1)).all()
    assert run(compare, monkeypatch, "table", *shared, "--out", out) == 0
    about = read_json(out / "report.json")["about"]
    assert len(about["verdicts"]["overlap, ours - independent"]) == 3 and about["settings"]["window"] == 11
    assert {len(seeds) for seeds in about["per_seed"].values()} == {1}
    assert about["greed"][0]["requests"] and 0 < about["greed"][0]["greedy / exact, mean"] <= 1 + 1e-6
    assert (out / "calibration.png").is_file() and "oracle, test" in about["costs"][0]

    monkeypatch.setattr(compare, "data", replace(WORLD, sequences=world_sequences(40, seed=1)))
    assert run(compare, monkeypatch, "table", *shared, "--out", out) == 2
    assert "was made with other data" in capsys.readouterr().err


def fitted(compare: Any, dataset: Dataset) -> Any:
    config = CAPTSConfig(**CHEAP, window=compare.window_of(dataset))
    return compare.Shared(config, {}).fit(compare.train_of(dataset), dataset.catalog)


def changed_from(cut: float) -> Dataset:
    s = WORLD.sequences
    items = np.where(s.times < cut, s.items, (s.items + 5) % 32).astype(np.int32)
    assert (items != s.items).any()
    return replace(WORLD, sequences=replace(s, items=items))


def test_events_after_the_cut_change_no_table_label_or_weight(compare: Any) -> None:
    """From the data set through the cut to what is fitted."""
    after = changed_from(compare.cut_of(WORLD))
    tools, labels = [fitted(compare, d) for d in (WORLD, after)], []
    for tool, dataset in zip(tools, (WORLD, after), strict=True):
        train = compare.train_of(dataset)
        cut = float(np.quantile(train.times, tool.config.past, method="higher"))
        replay = look_ahead(train, cut, tool.config)
        labels.append(tool.labels(replay, triggers_of(replay.contexts, tool.config), tool.kept["past"]))
    assert labels[0][0].any()
    for a, b in zip(*labels, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, array in tools[0].arrays().items():
        np.testing.assert_array_equal(array, tools[1].arrays()[name])
    contexts, others = ({c.user: c for c in compare.test_requests(d, 3, 11)[0]} for d in (WORLD, after))
    asked = [context for user, context in contexts.items() if user in others]
    assert asked and all(others[c.user] == c for c in asked)
    np.testing.assert_array_equal(*(t.score_all(asked) for t in tools))


def test_what_the_replay_looks_ahead_into_is_in_no_table_of_the_replay(compare: Any) -> None:
    train = compare.train_of(WORLD)
    inner = float(np.quantile(train.times, 0.75, method="higher"))
    a, b = (fitted(compare, d) for d in (WORLD, changed_from(inner)))
    np.testing.assert_array_equal(a.kept["past"].rows, b.kept["past"].rows)
    assert (a.kept["all"].rows != b.kept["all"].rows).any()


def test_requests_of_the_test_want_what_is_new_within_the_window(compare: Any) -> None:
    cut = compare.cut_of(WORLD)
    whole = compare.test_requests(WORLD, 3, compare.window_of(WORLD))
    short = compare.test_requests(WORLD, 3, 5)
    assert len(short[0]) < len(whole[0]) and all(max(c.times) < cut for c in whole[0])
    s = WORLD.sequences
    for user, new in zip(short[2], short[1], strict=True):
        mine = slice(int(s.offsets[user]), int(s.offsets[user + 1]))
        inside = (s.times[mine] >= cut) & (s.times[mine] < cut + 5 * DAY)
        assert set(new.tolist()) <= set(s.items[mine][inside].tolist())


def test_ratings_are_the_feedback_where_weights_are_all_alike(compare: Any) -> None:
    s = WORLD.sequences
    rated = replace(s, ratings=np.where(np.arange(s.events) % 2, 5, 1).astype(np.float32))
    compare.data = replace(WORLD, sequences=rated)
    assert np.unique(compare.load("world").sequences.weights) == pytest.approx([1 / 3, 5 / 3])
    compare.data = WORLD
    assert (compare.load("world").sequences.weights == 1).all()


def test_the_mean_label_asks_by_place_and_channel_alone(compare: Any) -> None:
    tool = fitted(compare, WORLD)
    train = compare.train_of(WORLD)
    replay = look_ahead(train, float(np.quantile(train.times, tool.config.past, method="higher")), tool.config)
    triggers = triggers_of(replay.contexts, tool.config)
    label, _, there = tool.labels(replay, triggers, tool.kept["past"])
    assert tool.rates[0] == pytest.approx((label & there)[:, 0].sum(axis=0) / there[:, 0].sum(axis=0))
    rates = tool.rates
    tool.labels(replay, triggers, tool.kept["all"])  # of other tables, as the test's are: nothing is learned of them
    assert tool.rates is rates
    prior = compare.Prior.of(tool)
    prior.rates = np.zeros_like(rates)
    prior.rates[1, 2] = 1.0
    _, _, found = prior.route([c for c in replay.contexts if len(set(c.history)) > 2][:5])
    assert all(one.pairs[0] == (1, 2) for one in found)
