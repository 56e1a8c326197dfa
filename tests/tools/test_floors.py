"""Each floor against the definition written out with loops."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pytest

from genrec.contracts import UserContext
from genrec.errors import GenrecError
from genrec.tools import (
    EASE,
    Content,
    ContentConfig,
    EASEConfig,
    ItemKNN,
    ItemKNNConfig,
    Markov,
    MarkovConfig,
    Popularity,
)
from genrec.tools.ease import mirror_lower, top_of_dense
from tests.tools.small_world import TRAIN, catalog, contexts, sequences

HISTORIES = [[0, 1, 2], [1, 0, 3], [2, 3, 4], [4, 5], [0, 2, 5], [3]]


def test_popularity_counts_users_not_events() -> None:
    tool = Popularity().fit(sequences([0, 0, 0, 1], [1], [1, 2]), catalog())
    assert tool.score_all(contexts([5])).tolist() == [[1, 3, 1, 0, 0, 0]]


def test_itemknn_is_shrunk_cosine_over_the_faded_history() -> None:
    tool = ItemKNN(ItemKNNConfig(recency=0.5, shrink=2.0)).fit(TRAIN, catalog())
    sets = [set(h) for h in HISTORIES]

    def weight(i: int, j: int) -> float:
        both = sum(i in s and j in s for s in sets)
        return 0.0 if i == j else both / ((sum(i in s for s in sets) * sum(j in s for s in sets)) ** 0.5 + 2.0)

    expected = [weight(2, j) + 0.5 * weight(0, j) for j in range(6)]
    assert tool.score_all(contexts([0, 2]))[0] == pytest.approx(expected, abs=1e-3)  # stored as float16


def test_ease_solves_its_own_regression() -> None:
    """B minimises |X - XB|^2 + lambda |B|^2 with a zero diagonal: column by column, that is a ridge regression."""
    tool = EASE(EASEConfig(penalty=0.7)).fit(TRAIN, catalog())
    x = np.zeros((6, 6))
    for user, history in enumerate(HISTORIES):
        x[user, history] = 1
    for j in range(6):
        others = [i for i in range(6) if i != j]
        a = x[:, others]
        expected = np.linalg.solve(a.T @ a + 0.7 * np.eye(5), a.T @ x[:, j])
        found = tool.weights.toarray()[:, j]
        assert found[j] == 0
        assert found[others] == pytest.approx(expected, abs=1e-3)  # stored as float16
    assert (tool.weights.data < 0).any()


def test_ease_scores_fade_by_doublings() -> None:
    tool = EASE(EASEConfig(recency=0.5)).fit(TRAIN, catalog())
    b = tool.weights.toarray()
    assert tool.score_all(contexts([1, 0, 2]))[0] == pytest.approx(b[2] + b[0] / 2 + b[1] / 3, abs=1e-6)


def test_ease_in_a_large_catalogue_uses_the_most_popular_items_only() -> None:
    tool = EASE(EASEConfig(penalty=1.0, most_items=3)).fit(TRAIN, catalog())
    alone = EASE(EASEConfig(penalty=1.0)).fit(sequences([0, 2], [0, 3], [2, 3], [], [0, 2], [3]), catalog())
    np.testing.assert_allclose(tool.weights.toarray(), alone.weights.toarray(), atol=1e-3)
    assert set(np.unique(tool.weights.nonzero()[1])) == {0, 2, 3}


def test_ease_that_cannot_be_inverted_names_lambda() -> None:
    with pytest.raises(GenrecError, match="lambda = 0"):
        EASE(EASEConfig(penalty=0.0)).fit(sequences([0, 1]), catalog())


@pytest.mark.parametrize("block", [1, 2, 3, 64])
def test_dense_helpers_do_not_depend_on_the_block(block: int) -> None:
    a = np.random.default_rng(0).normal(size=(7, 7))
    symmetric = np.tril(a) + np.tril(a, -1).T
    half = np.asfortranarray(np.tril(a))
    mirror_lower(half, block)
    np.testing.assert_array_equal(half, symmetric)
    top = top_of_dense(a, 2, block).toarray()
    for row, kept in zip(a, top, strict=True):
        best = np.argsort(-np.abs(row))[:2]
        assert set(np.flatnonzero(kept)) == set(best) and (kept[best] == row[best]).all()
    np.testing.assert_array_equal(top_of_dense(a, 99, block).toarray(), a)


def test_markov_counts_directed_steps_within_the_window() -> None:
    tool = Markov(MarkovConfig(window=2, damping=1.0)).fit(sequences([0, 1, 2, 3], [0, 2], [1, 1, 4]), catalog())
    w = tool.weights.toarray()
    assert w[0] == pytest.approx([0, 1 / 2, (0.5 + 1) / 2, 0, 0, 0], abs=1e-3)
    assert w[1] == pytest.approx([0, 0, 1 / 3, 0.5 / 3, (0.5 + 1) / 3, 0], abs=1e-3)  # 1 after 1 is no move
    assert w[3].tolist() == [0] * 6  # nothing follows, and nobody's events follow another's
    plain = Markov(MarkovConfig(window=2, damping=0.0)).fit(sequences([0, 1, 2, 3], [0, 2], [1, 1, 4]), catalog())
    assert plain.weights.toarray()[0] == pytest.approx([0, 1, 1.5, 0, 0, 0], abs=1e-3)


def test_markov_uses_the_weights_of_both_events() -> None:
    train = sequences([0, 1, 2], weights=[[2.0, 0.5, 0.0]])
    w = Markov(MarkovConfig(window=1, damping=0.0)).fit(train, catalog()).weights.toarray()
    assert w[0, 1] == 1.0 and w[1, 2] == 0.0


def test_neighbours_bounds_what_is_kept_per_item() -> None:
    for tool in (
        ItemKNN(ItemKNNConfig(neighbours=1)),
        EASE(EASEConfig(neighbours=1)),
        Markov(MarkovConfig(neighbours=1)),
    ):
        assert np.diff(tool.fit(TRAIN, catalog()).weights.indptr).max() == 1


def test_content_is_the_cosine_of_tf_idf_rows() -> None:
    tool = Content(ContentConfig(recency=0.5)).fit(TRAIN, catalog())
    documents = [t.lower().replace(".", "").split() for t in catalog().texts]
    assert documents[1] == ["black", "tea", "acme", "tea"]  # title, brand, category
    held = Counter(w for d in documents for w in set(d))

    def row(words: list[str]) -> dict[str, float]:
        values = {w: (1 + log(n)) * (log(7 / (1 + held[w])) + 1) for w, n in Counter(words).items() if w in held}
        length = sum(v * v for v in values.values()) ** 0.5
        return {w: v / length for w, v in values.items()}

    def cosine(a: dict[str, float], b: dict[str, float]) -> float:
        return sum(v * b.get(w, 0.0) for w, v in a.items())

    rows = [row(d) for d in documents]
    expected = [cosine(rows[4], r) + 0.5 * cosine(rows[1], r) for r in rows]
    assert tool.score_all(contexts([1, 4]))[0] == pytest.approx(expected, rel=1e-4)
    query = Content(ContentConfig(query=3.0)).fit(TRAIN, catalog())
    asked = query.score_all([UserContext(query="Rye BREAD, unheard-of")])[0]
    assert asked == pytest.approx([3 * cosine(row(["rye", "bread"]), r) for r in rows], rel=1e-4)
    assert query.score_all([UserContext(query="nothing known")])[0].tolist() == [0] * 6


def test_content_reaches_items_that_nobody_chose() -> None:
    tool = Content().fit(sequences([0]), catalog())
    (found,) = tool.retrieve(contexts([2]), 1)
    assert found.items.tolist() == [3]


def test_content_without_any_text_is_silent() -> None:
    tool = Content().fit(TRAIN, catalog(["", "", "-", "?", "!", "."]))
    assert np.isfinite(tool.score_all(contexts([0, 4]))).all()
