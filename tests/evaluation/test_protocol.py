"""Full ranking with seen items masked, against a loop over the catalogue."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.contracts import UserContext
from genrec.data.dataset import EvalSet
from genrec.evaluation.protocol import (
    rank_all,
    rank_lists,
    seen_index,
    slices,
    target_ranks,
    tie_numbers,
    top_lists,
)

INF = float("inf")


def requests(histories: list[list[int]], targets: list[int], trigger: int | None = None) -> EvalSet:
    n = len(histories)
    contexts = [UserContext(history=tuple(h), trigger=trigger) for h in histories]
    return EvalSet("test", contexts, np.array(targets, dtype=np.int32), np.arange(n), np.arange(n) % 2 == 0)


def random_set(n: int = 40, items: int = 25, levels: int = 5, seed: int = 0) -> tuple[EvalSet, np.ndarray]:
    """Scores with many ties; some targets repeat a seen item."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, items, rng.integers(0, 9)).tolist() for _ in range(n)]
    return requests(histories, rng.integers(0, items, n).tolist()), rng.integers(0, levels, (n, items)).astype(float)


def test_ranks_agree_with_a_loop_over_the_items() -> None:
    asked, scores = random_set()
    lowest = target_ranks(scores, asked.targets, seen_index(asked.contexts), np.zeros(len(asked)))
    highest = target_ranks(scores, asked.targets, seen_index(asked.contexts), np.full(len(asked), 1 - 1e-9))
    for b, (context, target) in enumerate(zip(asked.contexts, asked.targets, strict=True)):
        rivals = [i for i in range(scores.shape[1]) if i != target and i not in context.history]
        if target in context.history:
            assert lowest[b] == highest[b] == INF
            continue
        above = sum(scores[b, i] > scores[b, target] for i in rivals)
        assert lowest[b] == above
        assert highest[b] == above + sum(scores[b, i] == scores[b, target] for i in rivals)


def test_a_wanted_item_that_was_seen_is_missed_by_scores_and_by_lists_alike() -> None:
    asked = requests([[2, 0]], [2])
    assert target_ranks(np.array([[9.0, 1.0, 5.0]]), asked.targets, seen_index(asked.contexts), np.zeros(1)) == [INF]
    assert rank_lists("s", np.array([[0, 2]]), asked).ranks.tolist() == [INF]


def test_the_trigger_is_masked_too() -> None:
    asked = requests([[0]], [2], trigger=1)
    ranks = target_ranks(np.array([[9.0, 8.0, 5.0, 6.0]]), asked.targets, seen_index(asked.contexts), np.zeros(1))
    assert ranks.tolist() == [1]


def test_ties_are_uniform_over_the_equal_places() -> None:
    n = 5000
    asked = requests([[]] * n, [0] * n)
    ranks = rank_all("flat", lambda c: np.zeros((len(c), 4)), asked).ranks
    shares = np.bincount(ranks.astype(int), minlength=4) / n
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_nan_scores_are_refused_and_minus_infinity_is_the_bottom() -> None:
    asked = requests([[]], [1])
    with pytest.raises(ValueError, match="NaN"):
        target_ranks(np.array([[0.0, np.nan]]), asked.targets, seen_index(asked.contexts), np.zeros(1))
    ranks = target_ranks(np.array([[0.0, -INF, 3.0]]), asked.targets, seen_index(asked.contexts), np.full(1, 0.99))
    assert ranks.tolist() == [2]


@pytest.mark.parametrize("chunk", [1, 7, 40, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    asked, scores = random_set()
    at = {id(c): b for b, c in enumerate(asked.contexts)}
    found = rank_all("s", lambda cs: scores[[at[id(c)] for c in cs]], asked, k=4, chunk=chunk)
    ties = tie_numbers(len(asked))
    np.testing.assert_array_equal(
        found.ranks, target_ranks(scores, asked.targets, seen_index(asked.contexts), ties).astype(float)
    )
    np.testing.assert_array_equal(found.lists, top_lists(scores, seen_index(asked.contexts), 4))
    assert found.system == "s"


def test_seeds_decide_ties_and_only_ties() -> None:
    assert tie_numbers(5, 1).tolist() == tie_numbers(5, 1).tolist() != tie_numbers(5, 2).tolist()
    asked, _ = random_set()
    distinct = np.random.default_rng(1).permutation(25).astype(float)
    one, two = (rank_all("s", lambda c: np.tile(distinct, (len(c), 1)), asked, seed=s).ranks for s in (0, 1))
    np.testing.assert_array_equal(one, two)


def test_top_lists_are_ordered_unseen_and_padded() -> None:
    asked = requests([[4], [0, 1, 2]], [0, 3])
    scores = np.array([[1.0, 3.0, 3.0, -INF, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert top_lists(scores, seen_index(asked.contexts), 4).tolist() == [[1, 2, 0, -1], [4, 3, -1, -1]]
    assert top_lists(scores, seen_index(asked.contexts), 99).shape == (2, 5)


def test_lists_and_scores_give_the_same_ranks_within_the_list() -> None:
    asked, _ = random_set(seed=5)
    scores = np.random.default_rng(6).normal(size=(len(asked), 25))
    by_scores = rank_all("s", lambda c: scores, asked, k=10)
    kept = top_lists(scores, (np.zeros(0, int), np.zeros(0, int)), 25)  # seen items stand in these lists
    by_lists = rank_lists("s", kept, asked, k=10)
    np.testing.assert_array_equal(by_lists.ranks, by_scores.ranks)
    np.testing.assert_array_equal(by_lists.lists, by_scores.lists)


def test_beyond_the_list_the_rank_is_infinite() -> None:
    asked = requests([[1], [], []], [2, 5, 5])
    found = rank_lists("beam", np.array([[1, 0, 2], [4, 3, -1], [-1, -1, -1]]), asked, k=2)
    assert found.ranks.tolist() == [1, INF, INF]
    assert found.lists.tolist() == [[0, 2], [4, 3], [-1, -1]]


def test_illegal_lists_are_refused() -> None:
    asked = requests([[], []], [0, 0])
    with pytest.raises(ValueError, match="list 1 of beam holds an item twice"):
        rank_lists("beam", np.array([[0, 1], [2, 2]]), asked)
    with pytest.raises(ValueError, match="1 lists were given for 2 requests"):
        rank_lists("beam", np.array([[0, 1]]), asked)


def test_no_request_gives_no_rank() -> None:
    found = rank_all("s", lambda c: np.zeros((len(c), 3)), requests([], []), k=2)
    assert found.ranks.shape == (0,) and found.lists.shape == (0, 2)


def test_slices_split_the_requests() -> None:
    masks = slices(requests([[]] * 5, [0] * 5))
    assert masks["all"].sum() == 5 and masks["same-day"].tolist() == [True, False, True, False, True]
    assert (masks["same-day"] ^ masks["different-day"]).all()
