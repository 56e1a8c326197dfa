"""Every part of the reward on a catalogue that fits on a page, the floor, and the file of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genrec.alignment.rewards import (
    LEAST_PRICE,
    PARTS,
    RewardContext,
    ScenarioWeights,
    inject,
    judge,
    price_of_drift,
    score,
)
from genrec.data.scenarios import SCENARIOS
from genrec.errors import GenrecError
from genrec.tokenizer.trie import Trie

CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
TEXT = np.array([[1, 0], [1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
NAN = np.nan


def context(**changes: object) -> RewardContext:
    """Two home requests: the first wants item 0, the second item 3; item 4 was had by both."""
    allowed = np.ones((2, 5), bool)
    allowed[:, 4] = False
    made = RewardContext(
        scenarios=["home", "home"],
        targets=np.array([0, 3]),
        allowed=allowed,
        paths=Trie.build(CODES).path.numpy(),
        text=TEXT,
        taste=np.stack([TEXT[::-1], TEXT]).astype(np.float32),
        satisfaction=np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]], np.float32),
        fold=np.array([1, 0]),
        scores=np.array([[3.0, 2, 1, 0, 9], [0, 0, 5, 1, 9]], np.float32),
        tail=np.array([False, False, True, True, False]),
        queries=np.array([[0.0, 1.0], [NAN, NAN]], np.float32),
        triggers=np.array([4, -1]),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


GROUP = np.array([[0, 1, 2, 4, -1], [3, 2, 1, 4, -1]])
log2 = np.log2
EXPECTED = {
    "format": [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]],
    "hit": [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    "prefix": [[1, 0.5, 0, 0, 0], [1, 0.5, 0, 0, 0]],
    "text": [[1, 1, 0, 0.6, 0], [1, 0, 0, 0, 0]],
    # the first is judged by the second fold, whose taste is the text; the second by the first fold's, reversed
    "collaborative": [[1, 1, 0, 0.6, 0], [1, 0, 0, 1, 0]],
    "ranking": [[1, 1 / log2(3), 0.5, 0, 0], [1 / log2(3), 1, 0.5, 0, 0]],
    "tail": [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0]],
    "satisfaction": [[0.5, 0.4, 0.3, 0.1, 0], [0.4, 0.3, 0.2, 0.5, 0]],
    "query": [[0, 0, 1, 0.8, 0], [0, 0, 0, 0, 0]],
    "similar": [[0.6, 0.6, 0.8, 1, 0], [0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_parts(name: str) -> None:
    found = PARTS[name](GROUP, context())
    assert found.dtype == np.float32 and found == pytest.approx(np.array(EXPECTED[name]), abs=1e-6)


def test_diversity_looks_at_the_others_of_the_group() -> None:
    found = PARTS["diversity"](np.array([[0, 1, 2], [0, -1, -1]]), context())
    assert found[0] == pytest.approx([0.5, 0.5, 1.0])  # 0 and 1 are alike, 2 is like neither
    assert not found[1].any()


@pytest.mark.parametrize("name", PARTS)
def test_parts_stay_between_0_and_1_and_survive_what_is_missing(name: str) -> None:
    blind = context(targets=np.array([-1, -1]), queries=np.full((2, 2), NAN, np.float32))
    for made in (context(), blind, context(scores=np.full((2, 5), -np.inf, np.float32))):
        found = PARTS[name](GROUP, made)
        assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
        assert not found[:, -1].any()
        assert PARTS[name](GROUP[:, :0], made).shape == (2, 0)


def test_no_target_and_no_query_give_the_whole_group_the_same() -> None:
    blind = context(targets=np.array([-1, -1]), queries=np.full((2, 2), NAN, np.float32))
    for name in ("hit", "prefix", "text", "collaborative", "query"):
        assert not PARTS[name](GROUP, blind).any()


def test_the_reward_is_the_weighted_sum_and_the_floor_is_the_targets_own() -> None:
    weights = ScenarioWeights({"home": {"hit": 0.5, "ranking": 0.3, "diversity": 0.2}}, {"home": 1.0})
    found = judge(GROUP, context(), weights)
    diversity = PARTS["diversity"](GROUP, context())
    own = 0.5 * np.array(EXPECTED["hit"]) + 0.3 * np.array(EXPECTED["ranking"])
    assert found.own == pytest.approx(own, abs=1e-6) and found.total == pytest.approx(own + 0.2 * diversity, abs=1e-6)
    assert found.floor == pytest.approx([0.8, 0.5 + 0.3 / log2(3)])  # without diversity, which a target cannot have
    assert set(found.parts) == {"format", "hit", "ranking", "diversity"}  # format is told, weighed or not
    assert found.hits.tolist() == [[True, False, False, False, False]] * 2
    assert (found.own[found.hits] == found.floor).all()  # to the last bit: a hit is never below its own floor


def test_the_ranker_can_speak_by_its_score_and_drift_costs() -> None:
    weights = ScenarioWeights({"home": {"hit": 0.5, "ranking": 0.5}}, {"home": 1.0})
    found = judge(GROUP, context(), weights, scored=True)
    assert found.parts["ranking"].tolist() == [[3, 2, 1, 9, 0], [1, 5, 0, 9, 0]] == score(GROUP, context()).tolist()
    assert found.floor.tolist() == [2.0, 1.0]
    costs = np.tile([0.5, 0, 0, 0, 0, 1.5], (2, 1))
    less = found.less(costs)
    assert (found.total - less.total).tolist() == [[0.5, 0, 0, 0, 0]] * 2 == (found.own - less.own).tolist()
    assert less.floor.tolist() == [0.5, -0.5]


def test_rewards_can_be_given_in_another_unit() -> None:
    weights = ScenarioWeights({"home": {"hit": 0.3, "ranking": 0.7}}, {"home": 1.0})
    found = judge(GROUP, replace(context(), targets=np.array([0, -1])), weights)
    other = found.times(np.array([[3.0], [0.5]]))
    assert other.total == pytest.approx(found.total * [[3.0], [0.5]]) and other.own == pytest.approx(other.total)
    assert (other.own[0][found.hits[0]] == other.floor[0]).all() and found.hits[0].any()  # to the last bit
    assert np.isnan(other.floor[1]) and other.parts is found.parts


def test_shuffled_rewards_are_those_of_the_same_group() -> None:
    found = judge(GROUP, context(), ScenarioWeights({"home": {"ranking": 1.0}}, {"home": 1.0}))
    there = GROUP >= 0
    other = found.shuffled(there, np.random.default_rng(0))
    assert (np.sort(other.total, 1) == np.sort(found.total, 1)).all() and (other.total != found.total).any()
    assert (other.total[~there] == found.total[~there]).all() and (other.floor == found.floor).all()


@pytest.mark.parametrize(
    ("fused", "price"),
    [({"ease": 0.1, "markov": 0.1, "generator": 0.8}, 4.0), ({"ease": 1.0, "generator": 0.0}, LEAST_PRICE),
     ({"ease": 1.0}, LEAST_PRICE), ({"generator": 1.0}, 1.0), ({"ease": 0.0, "generator": 1.0}, 1.0)],
)  # fmt: skip
def test_the_price_of_drift_is_the_generators_weight_over_the_tools(fused: dict[str, float], price: float) -> None:
    assert price_of_drift(fused) == pytest.approx(price)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([[1, 2, -1, -1], [0, 1, 2, -1]], [[1, 0, 2, -1], [0, 3, 2, 1]]),  # the target, then the ranker's best
        ([[0, 1, 2, 3], [3, 2, 1, 0]], [[0, 1, 2, 3], [3, 2, 1, 0]]),  # there already: nothing is there twice
        ([[-1] * 4, [-1] * 4], [[0, 1, -1, -1], [3, 2, -1, -1]]),
    ],
)  # fmt: skip
def test_injected_completions_are_the_target_and_the_rankers_best(group: list, expected: list) -> None:
    """The ranker's first is item 0 for the first and item 2 for the second request; item 4 is not legal."""
    assert inject(np.array(group), context(), 3).tolist() == expected
    assert inject(np.array(group), context(), 0).tolist() == group
    with pytest.raises(ValueError, match="at least one must stay"):
        inject(np.array(group), context(), 4)


def test_an_illegal_target_is_not_injected() -> None:
    assert inject(np.array([[1, 2], [1, 0]]), context(targets=np.array([4, -1])), 1).tolist() == [[1, 2], [1, 0]]


def test_an_illegal_target_has_no_floor() -> None:
    weights = ScenarioWeights({"home": {"ranking": 1.0}}, {"home": 1.0})
    assert np.isnan(judge(GROUP, context(targets=np.array([4, -1])), weights).floor).all()  # had before; none


def test_every_scenario_is_judged_by_its_own_weights() -> None:
    weights = ScenarioWeights({"home": {"hit": 1.0}, "discovery": {"tail": 1.0}}, {"home": 1.0})
    found = judge(GROUP, context(scenarios=["home", "discovery"]), weights)
    assert found.total[0].tolist() == EXPECTED["hit"][0] and found.total[1].tolist() == EXPECTED["tail"][1]
    with pytest.raises(GenrecError, match="no reward weights for the scenario 'moon'"):
        judge(GROUP, context(scenarios=["home", "moon"]), weights)


def test_an_empty_group_is_judged() -> None:
    found = judge(np.zeros((2, 0), np.int64), context(), ScenarioWeights.load())
    assert found.total.shape == (2, 0) and np.isfinite(found.floor).all()


def test_the_shipped_weights_cover_all_scenarios_and_are_comparable() -> None:
    shipped = ScenarioWeights.load()
    assert set(shipped.weights) == set(SCENARIOS) == set(shipped.shares)
    assert sum(shipped.shares.values()) == pytest.approx(1)
    for parts in shipped.weights.values():
        assert sum(parts.values()) == pytest.approx(1)
    assert "tail" in shipped.weights["discovery"] and "query" in shipped.weights["search"]
    assert "satisfaction" in shipped.weights["favourites"] and "similar" in shipped.weights["item"]
    distinct = {tuple(sorted(parts.items())) for parts in shipped.weights.values()}
    assert len(distinct) == len(shipped.weights)  # else the matrix of scenarios could show no control
    assert not any("format" in parts for parts in shipped.weights.values())  # always 1: no gradient


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[home]\nshare = 1\nluck = 1\n", "weighs 'luck'; there are: format"),
        ("[home]\nshare = 1\nhit = -1\n", "hit is -1; it must be a number"),
        ('[home]\nshare = 1\nhit = "much"\n', "hit is 'much'"),
        ("[home]\nshare = 1\nhit = nan\n", "hit is nan"),
        ("[home]\nshare = 1\nhit = true\n", "hit is True"),
        ("[home]\nshare = 1\n", "weighs nothing"),
        ("[home]\nhit = 1\n", "no scenario has a share"),
        ("hit = 1\n", "stands outside of a scenario"),
        ("[home\n", "cannot be read as reward weights"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_weights_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(GenrecError, match=message) as refused:
        ScenarioWeights.load(tmp_path / "w.toml")
    assert "\n" not in str(refused.value).split(" (")[0]
    with pytest.raises(GenrecError, match="cannot be read"):
        ScenarioWeights.load(tmp_path / "absent.toml")
