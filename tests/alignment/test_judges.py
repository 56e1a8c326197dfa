"""A judge knows nothing of the users of its fold, and is the same after it was stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genrec.alignment.judges import Bench, Judge, folds_of, satisfactions, taste_vectors
from genrec.contracts import UserContext
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.tokenizer.trie import Trie
from genrec.tools import FLOORS
from tests.tools.small_world import TRAIN, catalog

TOOLS = {name: FLOORS[name] for name in ("popularity", "itemknn", "content")}


def rated(train: Sequences) -> Sequences:
    ratings = np.array([5, 1, 4, 5, 5, 1, 2, 4, 5, 3, 3, 1, 5, 4, 2], np.float32)[: train.events]
    return replace(train, ratings=ratings)


def test_users_are_dealt_into_folds_by_the_seed() -> None:
    first = folds_of(TRAIN, 3, seed=1)
    assert np.bincount(first).tolist() == [2, 2, 2] and (first == folds_of(TRAIN, 3, seed=1)).all()
    with pytest.raises(GenrecError, match="6 users cannot be judged by others in 7 folds"):
        folds_of(TRAIN, 7)


def test_what_judges_a_fold_does_not_see_its_users() -> None:
    """Changing what a user did changes no judge that is not fitted on that user."""
    out = TRAIN.user_of == 0
    other = replace(TRAIN, items=np.where(out, (TRAIN.items + 3) % 6, TRAIN.items).astype(np.int32))
    one, two = (Judge.fit(rated(s).keep(~out), catalog(), TOOLS) for s in (TRAIN, other))
    asked = [UserContext(history=(0, 1)), UserContext(history=(4,))]
    fusion = {"popularity": 0.3, "itemknn": 0.7}
    assert (one.scores(asked, lambda _: fusion) == two.scores(asked, lambda _: fusion)).all()
    assert (one.taste == two.taste).all() and (one.satisfaction == two.satisfaction).all()


def test_a_stored_judge_says_the_same(tmp_path: Path) -> None:
    made = Judge.fit(rated(TRAIN), catalog(), TOOLS)
    made.save(tmp_path)
    again = Judge.load(tmp_path, TOOLS)
    asked = [UserContext(history=(0, 1), scenario="search", query="tea")]
    fusion = {"content": 1.0}
    assert (made.scores(asked, lambda _: fusion) == again.scores(asked, lambda _: fusion)).all()
    assert (made.taste == again.taste).all() and (made.satisfaction == again.satisfaction).all()


def test_items_that_the_same_people_choose_are_near() -> None:
    vectors = taste_vectors(TRAIN, 7)
    norms = np.linalg.norm(vectors, axis=1)
    assert norms[:6] == pytest.approx(1.0, abs=1e-5) and norms[6] == 0  # nobody chose item 6
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[4]
    assert not taste_vectors(TRAIN.keep(np.zeros(TRAIN.events, bool)), 7).any()


def test_satisfaction_is_the_share_of_favourites_drawn_to_the_mean() -> None:
    found = satisfactions(rated(TRAIN), 6)
    assert ((found > 0) & (found < 1)).all()
    unrated = satisfactions(TRAIN, 6)
    assert not unrated.any()


def test_each_request_is_judged_by_its_fold_and_its_scenarios_fusion() -> None:
    judges = [Judge.fit(TRAIN.keep(TRAIN.user_of % 2 != f), catalog(), TOOLS) for f in (0, 1)]
    codes = np.array([[a, b] for a in range(2) for b in range(3)])
    fusions = {"home": {"popularity": 1.0}, "item": {"itemknn": 1.0}}
    bench = Bench.of(judges, Trie.build(codes), np.eye(6, dtype=np.float32) * 3, lambda s: fusions[s], TRAIN)
    asked = [UserContext(history=(0,)), UserContext(history=(0,), scenario="item", trigger=0)]
    made = bench.context(asked, np.array([1, 2]), np.array([1, 0]), np.ones((2, 6), bool))
    assert (made.scores[0] == judges[1].scores(asked[:1], bench.fusion)[0]).all()
    assert (made.scores[1] == judges[0].scores(asked[1:], bench.fusion)[0]).all()
    assert np.linalg.norm(bench.text, axis=1) == pytest.approx(1.0) and np.isnan(made.queries).all()
