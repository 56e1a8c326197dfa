"""Routing: greedy under bounds, overlap, the exact sets against brute force, the rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.tools import CAPTSConfig
from genrec.tools.capts.channels import Channels
from genrec.tools.capts.policies import Values, medoids, pair_scores, retrieved, routes, union_recall
from genrec.tools.capts.requests import Triggers
from genrec.tools.capts.routing import best_cover, best_set, independent, overlaps, route, total

APART = np.arange(3 * 2 * 4).reshape(3, 2, 4)  # 3 triggers, 2 channels, lists that share nothing


def random_case(seed: int, n: int = 4, c: int = 3, depth: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lists = np.stack([[rng.choice(12, depth, replace=False) for _ in range(c)] for _ in range(n)])
    lists[rng.random((n, c)) < 0.1] = -1
    return rng.random((n, c)), lists


def test_without_overlap_the_best_pairs_are_taken_in_order() -> None:
    score = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.3]])
    assert route(score, APART, 3) == [(0, 1), (1, 0), (2, 0)]  # equals: the earlier channel
    assert route(score, APART, 99) == [(0, 1), (1, 0), (2, 0), (2, 1), (1, 1), (0, 0)]
    assert route(np.zeros((0, 2)), np.zeros((0, 2, 4), int), 3) == []


def test_overlap_lowers_the_other_lists() -> None:
    lists = np.array([[[1, 2], [1, 2]], [[3, 4], [1, 9]]])
    score = np.array([[0.9, 0.8], [0.3, 0.5]])
    assert overlaps(lists.reshape(4, 2)).tolist() == [[0, 1, 0, 0.5], [1, 0, 0, 0.5], [0, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert route(score, lists, 2, discount=0.0) == [(0, 0), (0, 1)]
    assert route(score, lists, 2) == [(0, 0), (1, 0)]  # .8 x 0, .3, .5 x .5
    assert route(-score, lists, 2)[0] == (1, 0)  # a discount lowers negative scores too


@pytest.mark.parametrize("seed", range(12))
def test_bounds_per_channel_hold(seed: int) -> None:
    score, lists = random_case(seed)
    for quota, least, most in ((6, 1, 3), (6, 2, 0), (3, 1, 1), (5, 0, 2), (50, 2, 3)):
        pairs = route(score, lists, quota, 1.0, least, most)
        there = (lists[:, :, 0] >= 0).sum(axis=0)
        count = np.bincount([c for _, c in pairs], minlength=3)
        assert len(set(pairs)) == len(pairs) == min(quota, np.minimum(there, most or 99).sum())
        assert (count >= np.minimum(least, there)).all() and (count <= (most or 99)).all()
        assert all(lists[h, c, 0] >= 0 for h, c in pairs)


def test_a_channel_without_neighbours_is_asked_nothing() -> None:
    lists = APART.copy()
    lists[:, 1] = -1
    assert [c for _, c in route(np.ones((3, 2)), lists, 6, least=2)] == [0, 0, 0]
    assert route(np.ones((3, 2)), np.full((3, 2, 4), -1), 4) == []
    with pytest.raises(GenrecError, match="do not fit a quota of 3"):
        route(np.ones((3, 2)), APART, 3, least=2)


@pytest.mark.parametrize("seed", range(10))
def test_the_exact_set_is_the_best_of_all_sets(seed: int) -> None:
    score, lists = random_case(seed, n=3, c=3)
    overlap, flat = overlaps(lists.reshape(9, -1)), score.ravel()
    able = [p for p in range(9) if lists.reshape(9, -1)[p, 0] >= 0]
    for quota, least, most in ((3, 0, 0), (4, 1, 2)):
        best = best_set(score, lists, quota, 1.0, least, most)
        there = (lists[:, :, 0] >= 0).sum(axis=0)

        def fits(chosen: tuple[int, ...], least: int = least, most: int = most, there: np.ndarray = there) -> bool:
            count = np.bincount([p % 3 for p in chosen], minlength=3)
            return bool((count >= np.minimum(least, there)).all() and (count <= (most or 9)).all())

        brute = max(total(flat, overlap, list(s)) for s in itertools.combinations(able, quota) if fits(s))
        assert total(flat, overlap, [h * 3 + c for h, c in best]) == pytest.approx(brute)
        greedy = [h * 3 + c for h, c in route(score, lists, quota, 1.0, least, most)]
        assert total(flat, overlap, greedy) <= brute + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_the_oracle_covers_as_much_as_any_set_of_as_many_items(seed: int) -> None:
    _, lists = random_case(seed, n=3)
    lists = np.where(lists < 0, -1, lists)
    wanted = np.random.default_rng(seed).choice(12, 6, replace=False)
    flat = lists.reshape(9, -1)
    able = [p for p in range(9) if flat[p, 0] >= 0]

    def covered(chosen: tuple[int, ...], k: int) -> int:
        """Of pairs in this order, the first k % 3 of which bring one item more."""
        brought = [flat[p, : k // 3 + (i < k % 3)] for i, p in enumerate(chosen)]
        return len(np.intersect1d(np.concatenate(brought), wanted))

    for k in (15, 10, 8, 2):
        found = best_cover(lists, wanted, 3, k)
        assert len(found) == len(set(found)) == 3
        mine = covered(tuple(h * 3 + c for h, c in found), k)
        assert mine == max(covered(s, k) for s in itertools.permutations(able, 3))


def test_independent_channels_are_blind_to_one_another() -> None:
    lists = np.array([[[1, 2], [1, 2]], [[3, 4], [5, 6]]])
    score = np.array([[0.9, 0.8], [0.3, 0.5]])
    assert independent(score, lists, 2) == [(0, 0), (0, 1)]
    assert sum(channel == 1 for _, channel in independent(score[:, ::-1].copy(), lists[:, ::-1].copy(), 3)) == 2, (
        "the channel with the best pair takes what is over, wherever it stands"
    )
    assert sorted(independent(score, lists, 3)) == [(0, 0), (0, 1), (1, 0)]
    lists[:, 1] = -1  # an empty channel has no part of the quota
    assert independent(score, lists, 2) == independent(score, lists, 4) == [(0, 0), (1, 0)]


# -- policies -----------------------------------------------------------------------------------------

ROWS = np.concatenate([APART, np.full((21, 2, 4), -1)]).astype(np.int32)
CHANNELS = Channels(("a", "b"), ROWS, (ROWS >= 0).astype(np.float16), np.ones(24, np.float32))
TRIGGERS = Triggers(np.array([[2, 0, 1]]), np.zeros((1, 3, 6), np.float32))
TRIGGERS.about[0, :, 2] = [1.0, 3.0, 2.0]
CONTENT = np.eye(4, dtype=np.float32)[[0, 1, 0, 2]]
VALUES = Values(
    np.array([[[0.1, 0.2], [0.3, 0.1], [0.1, 0.9]]], np.float32),
    np.array([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], np.float32),
    np.array([[0.1, 0.5, 0.9]], np.float32),
)
CONFIG = CAPTSConfig(channels=("markov", "content"), quota=2, depth=4)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("recent", [(0, 0), (0, 1)]),
        ("feedback", [(1, 0), (1, 1)]),
        ("learned", [(2, 1), (1, 0)]),
        ("independent", [(2, 1), (1, 0)]),
        ("pdn", [(2, 0), (2, 1)]),
        ("pinnersage", [(0, 0), (0, 1)]),  # triggers 2 and 1 are of one cluster, whose medoid is the newest
    ],
)
def test_every_policy_goes_through_one_interface(policy: str, expected: list[tuple[int, int]]) -> None:
    (found,) = routes(TRIGGERS, VALUES, CHANNELS, CONTENT, replace(CONFIG, policy=policy))
    assert found.pairs == expected and len(found.weights) == 2 and (found.weights > 0).all()


def test_without_a_network_the_newest_triggers_are_asked() -> None:
    for policy in ("learned", "independent", "pdn"):
        (found,) = routes(TRIGGERS, None, CHANNELS, CONTENT, replace(CONFIG, policy=policy))
        assert found.pairs == [(0, 0), (0, 1)]


def test_uniqueness_raises_a_pair() -> None:
    scores = pair_scores(TRIGGERS, VALUES, CHANNELS, CONTENT, replace(CONFIG, eta=3.0))
    assert scores[0, 0].tolist() == pytest.approx([0.4, 0.2])


def test_medoids_stand_for_their_clusters() -> None:
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.1]], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = medoids(vectors, 5)
    assert np.flatnonzero(found).tolist() == [2, 3] and found[3] > found[2]
    assert medoids(vectors[:1], 2).tolist() == [1, 0] and medoids(vectors[:0], 2).tolist() == [0, 0]


def test_a_fetch_takes_the_same_number_for_every_policy_and_pays_for_overlap() -> None:
    table = np.array([[[4, 5, 6, 7]], [[4, 6, 8, 9]]], np.int32)
    channels = Channels(("a",), table, (table >= 0).astype(np.float16), np.ones(10, np.float32))
    found = retrieved([(0, 0), (1, 0)], np.array([0, 1]), channels, np.array([5]), 5, 2)
    assert [f.tolist() for f in found] == [[4, 6, 7], [4, 6]]
    assert union_recall(found, np.array([4, 7, 9, 2])) == 0.5
    assert union_recall([], np.array([1])) == 0.0 and union_recall(found, np.zeros(0, int)) == 0.0
