"""Scenarios: who qualifies, what is known, and that a query is made of the wanted item's own text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from genrec.data import SCENARIOS, Dataset, eval_set, from_arrow, leave_one_out, scenario, scenarios_for, target_mask
from genrec.data.dataset import Sequences
from genrec.data.scenarios import favourite_from, queries, tail_items, ways_to_ask
from genrec.errors import GenrecError

ITEMS = pa.table(
    {
        "item": list("abcde"),
        "title": ["The Big Red Lantern of Home", "A b C-3PO", "", "", "日本酒"],
        "category": [["X"], ["X"], ["Kitchen", "Small Pans"], [], []],
    }
)


def data(rated: bool = True) -> Dataset:
    columns = {
        "user": ["u"] * 5 + ["v"] * 4 + ["w"] * 2,
        "item": list("abcad") + list("aabb") + list("ca"),
        "timestamp": [*range(5), *range(4), *range(2)],
        "rating": [5.0, 4.0, 3.0, 5.0, 4.5, 1.0, 4.0, 5.0, 2.0, None, 5.0],
    }
    return from_arrow(pa.table(columns if rated else {k: v for k, v in columns.items() if k != "rating"}), ITEMS)


def sequence(items: list[int]) -> Sequences:
    n = len(items)
    return Sequences(
        ["u"], np.array([0, n]), np.array(items, np.int32), np.arange(n, dtype=float), np.ones(n), np.full(n, np.nan)
    )


def test_scenarios_of_a_data_set() -> None:
    assert data().scenarios == ("home", "item", "search", "favourites", "discovery")
    assert data(rated=False).scenarios == ("home", "item", "search", "discovery")
    bare = from_arrow(pa.table({"user": ["u"], "item": ["a"], "timestamp": [1]}))
    assert [s.name for s in scenarios_for(bare)] == ["home", "item", "discovery"]


def test_scenario_by_name() -> None:
    assert scenario("item", data()).trigger
    with pytest.raises(GenrecError, match=r"unknown scenario 'favourites': .* has home, item, search, discovery"):
        scenario("favourites", data(rated=False))


def test_queries() -> None:
    assert queries(data().catalog) == ["big red lantern", "3po", "small pans", "", "日本酒"]


def test_queries_skip_small_words_unless_there_are_no_others() -> None:
    table = pa.table({"item": ["a", "b"], "title": ["Silence of the Lambs, The (Part II)", "Of the"]})
    got = from_arrow(pa.table({"user": ["u"], "item": ["a"], "timestamp": [1]}), table)
    assert queries(got.catalog) == ["silence lambs part", "of the"]


def test_ways_to_ask_are_the_query_the_title_and_the_narrowest_categories() -> None:
    table = pa.table({"item": ["a", "b"], "title": ["The Big Red Lantern", None], "category": ["A|B|C|D", None]})
    got = from_arrow(pa.table({"user": ["u"], "item": ["a"], "timestamp": [1]}), table)
    assert ways_to_ask(got.catalog) == [["big red lantern", "the big red lantern", "d", "c", "b"], []]


def test_queries_are_bounded() -> None:
    table = pa.table({"item": ["a"], "title": ["x" * 400], "category": [["y"]]})
    assert queries(from_arrow(pa.table({"user": ["u"], "item": ["a"], "timestamp": [1]}), table).catalog) == ["x" * 60]


def test_the_head_holds_four_fifths() -> None:
    # counts 5, 3, 1, 1, 0 of 10: the head is {0, 1} (8 of 10)
    train = sequence([0] * 5 + [1] * 3 + [2, 3])
    assert tail_items(train, 5).tolist() == [False, False, True, True, True]
    # counts 5, 2, 2, 1: two items hold 7 of 10, so a third is needed; of equal counts the lower row comes first
    assert tail_items(sequence([0] * 5 + [1, 1, 2, 2, 3]), 4).tolist() == [False, False, False, True]
    assert tail_items(sequence([]), 3).tolist() == [True, True, True]


def test_favourites_start_at_four_fifths_of_the_scale() -> None:
    assert favourite_from(data().sequences) == 4.0
    ten = replace(data().sequences, ratings=np.array([10.0, np.nan], np.float32))
    assert favourite_from(ten) == 8.0
    assert favourite_from(sequence([1])) == float("inf")


def test_masks_of_training_events() -> None:
    d = data()
    train = leave_one_out(d).train
    assert "".join("abcde"[i] for i in train.items) == "abc" + "aa" + "ca"
    masks = {n: target_mask(s, train, d.catalog).astype(int).tolist() for n, s in SCENARIOS.items()}
    assert masks == {
        "home": [1, 1, 1, 1, 1, 1, 1],
        "item": [0, 1, 1, 0, 1, 0, 1],  # an event before is needed
        "search": [1, 1, 1, 1, 1, 1, 1],
        "favourites": [1, 1, 0, 0, 1, 0, 1],  # the rating of w's first event is unknown
        "discovery": [0, 1, 0, 0, 0, 0, 0],  # a (4 of 7) and c (2) hold 6 of 7 events
    }


def test_mask_leaves_out_textless_search_targets() -> None:
    train = data().sequences
    mask = target_mask(SCENARIOS["search"], train, data().catalog)
    assert (~mask).tolist() == (train.items == 3).tolist()


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (slice(5, 11), [False, True, True, True, False, True]),
        (slice(0, 7), [False, True, True, True, True, False, True]),
    ],
)
def test_mask_with_users_without_events(kept: slice, wanted: list[bool]) -> None:
    """First u has none left, then w, the last user."""
    keep = np.zeros(11, bool)
    keep[kept] = True
    mask = target_mask(SCENARIOS["item"], data().sequences.keep(keep), data().catalog)
    assert mask.tolist() == wanted


def test_eval_sets() -> None:
    d = data()
    split = leave_one_out(d)  # wanted: u d (4.5 stars), v b (2 stars)
    assert [c.user for c in split.test.contexts] == ["u", "v"]

    def ask(name: str) -> list[tuple[str | None, int | None, str | None, str]]:
        got = eval_set(split.test, SCENARIOS[name], d, split.train)
        assert got.name == f"leave-one-out test, {name}"
        assert len(got) == len(got.targets) == len(got.users) == len(got.same_day)
        assert all(c.clock is None for c in got.contexts)
        return [(c.user, c.trigger, c.query, c.scenario) for c in got.contexts]

    assert ask("home") == [("u", None, None, "home"), ("v", None, None, "home")]
    assert ask("item") == [("u", 0, None, "item"), ("v", 1, None, "item")]
    assert ask("search") == [("v", None, "3po", "search")]  # d has no text
    assert ask("favourites") == [("u", None, None, "favourites")]
    assert ask("discovery") == [("u", None, None, "discovery"), ("v", None, None, "discovery")]


def test_eval_set_keeps_histories_and_targets() -> None:
    d = data()
    split = leave_one_out(d)
    got = eval_set(split.test, SCENARIOS["favourites"], d, split.train)
    assert got.contexts[0].history == split.test.contexts[0].history and got.targets.tolist() == [3]


def test_eval_set_refuses_cut_histories() -> None:
    d = data()
    split = leave_one_out(d)
    for history in ((), tuple(range(5))):
        cut = replace(
            split.test, contexts=[replace(c, history=history, times=(), weights=()) for c in split.test.contexts]
        )
        with pytest.raises(ValueError, match="whole histories"):
            eval_set(cut, SCENARIOS["home"], d, split.train)


def test_no_request_qualifies_where_there_is_none() -> None:
    d = data()
    split = leave_one_out(d)
    nobody = split.test.take(np.zeros(0, np.int64))
    assert [len(eval_set(nobody, s, d, split.train)) for s in SCENARIOS.values()] == [0] * len(SCENARIOS)
