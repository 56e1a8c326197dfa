"""Metrics against scikit-learn, against loops, and at their edges."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity

from genrec.evaluation.metrics import coverage, diversity, hit_rate, mrr, ndcg, novelty, recall

INF, NAN = float("inf"), float("nan")
ITEMS = 50


def ranks_of(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Ranks [B, T], NaN padded, of the wanted items, bool [B, N]."""
    place = np.argsort(np.argsort(-scores, axis=1), axis=1).astype(float)
    out = np.full((len(scores), wanted.sum(axis=1).max()), NAN)
    for b, row in enumerate(wanted):
        out[b, : row.sum()] = place[b, row]
    return out


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, ITEMS))


@pytest.mark.parametrize("k", [1, 5, 10, ITEMS])
def test_one_wanted_item_agrees_with_scikit_learn(scores: np.ndarray, k: int) -> None:
    targets = np.random.default_rng(1).integers(0, ITEMS, len(scores))
    wanted = np.eye(ITEMS, dtype=bool)[targets]
    ranks = ranks_of(scores, wanted)[:, 0]
    accuracy = top_k_accuracy_score(targets, scores, k=k, labels=np.arange(ITEMS)) if k < ITEMS else 1.0
    assert hit_rate(ranks, k).mean() == pytest.approx(accuracy)
    assert recall(ranks, k).mean() == pytest.approx(accuracy)
    for b in range(len(scores)):
        expected = ndcg_score(wanted[b : b + 1].astype(float), scores[b : b + 1], k=k)
        assert ndcg(ranks[b : b + 1], k)[0] == pytest.approx(expected)
    if k == ITEMS:
        assert mrr(ranks, k).mean() == pytest.approx(label_ranking_average_precision_score(wanted, scores))


@pytest.mark.parametrize("k", [1, 3, 10, ITEMS])
def test_many_wanted_items_agree_with_scikit_learn(scores: np.ndarray, k: int) -> None:
    wanted = np.random.default_rng(2).random((len(scores), ITEMS)) < 0.15
    wanted[:, 0] = True
    ranks = ranks_of(scores, wanted)
    expected = [ndcg_score(w[None].astype(float), s[None], k=k) for w, s in zip(wanted, scores, strict=True)]
    assert ndcg(ranks, k) == pytest.approx(expected)
    for b, (w, s) in enumerate(zip(wanted, scores, strict=True)):
        top = np.argsort(-s)[:k]
        assert recall(ranks, k)[b] == pytest.approx(w[top].sum() / w.sum())
        assert hit_rate(ranks, k)[b] == w[top].any()
        hits = np.flatnonzero(w[top])
        assert mrr(ranks, k)[b] == pytest.approx(1 / (1 + hits[0]) if len(hits) else 0)


def test_the_last_place_counts_and_the_next_does_not() -> None:
    ranks = np.array([0.0, 9.0, 10.0, INF])
    assert hit_rate(ranks, 10).tolist() == [1, 1, 0, 0]
    assert ndcg(ranks, 10) == pytest.approx([1, 1 / np.log2(11), 0, 0])
    assert mrr(ranks, 10) == pytest.approx([1, 0.1, 0, 0])
    assert recall(np.array([[0.0, INF, NAN]]), 1).tolist() == [0.5]


@pytest.mark.parametrize("function", [hit_rate, recall, ndcg, mrr])
def test_wrong_ranks_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="at least 1"):
        function(np.array([0.0]), 0)
    with pytest.raises(ValueError, match="negative"):
        function(np.array([-1.0]), 5)
    with pytest.raises(ValueError, match="no wanted item"):
        function(np.array([[NAN, NAN]]), 5)
    assert function(np.zeros(0), 5).shape == (0,)


def test_coverage_counts_items_once_and_ignores_padding() -> None:
    assert coverage(np.array([[0, 1], [1, -1]]), 4) == 0.5
    assert coverage(np.full((2, 3), -1), 4) == 0.0


def test_novelty_is_the_mean_self_information() -> None:
    counts = np.array([6, 0, 0, 0, 0, 0])  # shares with one added: 7/12 and 1/12
    found = novelty(np.array([[0, 1], [0, -1], [-1, -1]]), counts)
    assert found == pytest.approx([(np.log2(12 / 7) + np.log2(12)) / 2, np.log2(12 / 7), 0])


def test_diversity_is_one_less_the_mean_cosine_of_pairs() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(20, 5)) * rng.uniform(0.1, 9, size=(20, 1))
    lists = np.array([rng.permutation(20)[:6] for _ in range(4)])
    lists[1, 4:] = -1
    expected = []
    for row in lists:
        c = cosine_similarity(vectors[row[row >= 0]])
        expected.append(1 - np.mean([c[i, j] for i, j in combinations(range(len(c)), 2)]))
    assert diversity(lists, vectors) == pytest.approx(expected)
    assert diversity(np.array([[3, -1], [-1, -1]]), vectors).tolist() == [0, 0]
    assert diversity(np.array([[0, 1]]), np.zeros((2, 4))).tolist() == [1]
    assert diversity(np.array([[0, 1]]), np.ones((2, 4))) == pytest.approx([0])
