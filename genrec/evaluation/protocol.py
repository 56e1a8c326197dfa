"""The one evaluation protocol: full ranking, seen items masked, ties broken at random with a fixed seed.

Seen items are the rows of the request's history (and its trigger): no system recommends them, so a request whose
wanted item repeats one of them is a miss (rank inf) for every system. A tie is broken by one uniform number per
request, drawn from the seed and the request's position alone, so neither chunks nor the order of systems change a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import EvalSet

Scorer = Callable[[list[UserContext]], np.ndarray]
CHUNK = 512


@dataclass(frozen=True)
class Ranked:
    """What one system did on one EvalSet, per request, in the set's order.

    ranks: float64 [B], from 0, inf where the wanted item was not ranked; lists: int32 [B, K], the best rows, -1 padded.
    """

    system: str
    ranks: np.ndarray
    lists: np.ndarray


def seen_rows(context: UserContext) -> tuple[int, ...]:
    """The rows that are left out of this request's ranking."""
    return context.history if context.trigger is None else (*context.history, context.trigger)


def seen_index(contexts: list[UserContext]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all seen entries in a [B, N] score matrix: (request, row), int64."""
    seen = [seen_rows(c) for c in contexts]
    requests = np.repeat(np.arange(len(seen)), [len(s) for s in seen])
    rows = np.fromiter((r for s in seen for r in s), dtype=np.int64, count=len(requests))
    return requests, rows


def tie_numbers(n: int, seed: int = 0) -> np.ndarray:
    """One number in [0, 1) per request: 0 puts the wanted item first among its equals, towards 1 last."""
    return np.random.default_rng(seed).random(n)


def target_ranks(
    scores: np.ndarray, targets: np.ndarray, seen: tuple[np.ndarray, np.ndarray], ties: np.ndarray
) -> np.ndarray:
    """Ranks of the targets, float64 [B], from 0, among the items that are not seen; inf for a target that is.

    scores: [B, N], finite or -inf; seen: as `seen_index` gives; ties: as `tie_numbers` gives.
    Raises ValueError for NaN scores: they have no place in an order.
    """
    if np.isnan(scores).any():
        raise ValueError("the scores hold NaN: an item without a score must be -inf or filled in")
    own = scores[np.arange(len(targets)), targets][:, None]
    above, equal = scores > own, scores == own
    above[seen], equal[seen] = False, False
    equal[np.arange(len(targets)), targets] = False
    ranks = above.sum(axis=1) + np.floor(ties * (equal.sum(axis=1) + 1))
    ranks[seen[0][seen[1] == targets[seen[0]]]] = np.inf
    return ranks


def top_lists(scores: np.ndarray, seen: tuple[np.ndarray, np.ndarray], k: int) -> np.ndarray:
    """The k best unseen rows, int32 [B, k], best first, equals by row; -1 where fewer have a score above -inf."""
    masked = scores.astype(np.float32, copy=True)
    masked[seen] = -np.inf
    k = min(k, masked.shape[1])
    best = np.sort(np.argpartition(-masked, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(masked, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best, values = np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
    return np.where(np.isneginf(values), -1, best).astype(np.int32)


def rank_all(
    system: str, score_all: Scorer, requests: EvalSet, k: int = 10, seed: int = 0, chunk: int = CHUNK
) -> Ranked:
    """Ranks the whole catalogue for every request, `chunk` requests at a time, and keeps the k best of each."""
    ties = tie_numbers(len(requests), seed)
    ranks, lists = [], []
    for start in range(0, len(requests), chunk):
        part = slice(start, start + chunk)
        contexts = requests.contexts[part]
        scores, seen = score_all(contexts), seen_index(contexts)
        ranks.append(target_ranks(scores, requests.targets[part], seen, ties[part]))
        lists.append(top_lists(scores, seen, k))
    if not ranks:
        return Ranked(system, np.zeros(0), np.zeros((0, k), np.int32))
    return Ranked(system, np.concatenate(ranks), np.concatenate(lists))


def rank_lists(system: str, lists: np.ndarray, requests: EvalSet, k: int = 10) -> Ranked:
    """The same from candidate lists, int [B, L], best first, -1 padded: a wanted item beyond the list has rank inf.

    Seen items in a list are passed over, as in the full ranking. Raises ValueError where a list repeats an item.
    """
    lists = np.asarray(lists)
    if len(lists) != len(requests):
        raise ValueError(f"{len(lists)} lists were given for {len(requests)} requests")
    ranks = np.full(len(requests), np.inf)
    kept = np.full((len(requests), k), -1, dtype=np.int32)
    for b, context in enumerate(requests.contexts):
        rows = lists[b][lists[b] >= 0]
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"list {b} of {system} holds an item twice")
        target = int(requests.targets[b])
        seen = set(seen_rows(context))
        unseen = rows[[int(r) not in seen for r in rows]] if seen else rows
        kept[b, : min(k, len(unseen))] = unseen[:k]
        place = np.flatnonzero(rows == target)
        if len(place) and target not in seen:
            ranks[b] = sum(int(r) not in seen for r in rows[: place[0]])
    return Ranked(system, ranks, kept)


def slices(requests: EvalSet) -> dict[str, np.ndarray]:
    """Masks, bool [B]: all, and those whose wanted item falls on the same or on another day than the last event."""
    return {
        "all": np.ones(len(requests), dtype=bool),
        "same-day": requests.same_day.astype(bool),
        "different-day": ~requests.same_day.astype(bool),
    }
