"""Routing: which trigger asks which channel, under one quota for all (2602.12564, CATR's last step). Pure functions.

From the paper: maximise the total value over channels while channels share a quota and should not overlap. Ours: score
r = p (1 + eta q); greedily take the best pair, then lower every other pair by its overlap with it; bounds per channel;
and, for small cases, the exact best set by integer programming, to see what greed loses.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from genrec.errors import GenrecError

SECONDS = 5.0  # that the exact solution of one request may take


def overlaps(lists: np.ndarray) -> np.ndarray:
    """float32 [P, P]: the share of pair q's list that pair p's list holds too, symmetric: |p & q| / the longer one.

    lists: int [P, L], -1 padded; an item stands once in a list. The diagonal is 0.
    """
    p, depth = lists.shape
    owner = np.repeat(np.arange(p), depth)
    flat = lists.ravel()
    keep = flat >= 0
    rows, columns = np.unique(flat[keep], return_inverse=True)
    held = sparse.csr_matrix(
        (np.ones(int(keep.sum()), np.float32), (owner[keep], columns)), shape=(p, max(1, len(rows)))
    )
    both = (held @ held.T).toarray()
    length = np.diff(held.indptr)
    both /= np.maximum(np.maximum(length[:, None], length[None, :]), 1)
    np.fill_diagonal(both, 0.0)
    return both


def bounds_of(available: np.ndarray, quota: int, least: int, most: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The quota and the bounds per channel [C] that can be met. available: pairs with a list per channel [C].

    A channel without neighbours is asked nothing; a quota larger than there are pairs takes them all.
    """
    ceiling = np.minimum(available, most or available.max(initial=0))
    floor = np.minimum(least, ceiling)
    if floor.sum() > quota:
        raise GenrecError(f"{least} pairs for each channel do not fit a quota of {quota}")
    return int(min(quota, ceiling.sum())), floor, ceiling


def route(
    score: np.ndarray, lists: np.ndarray, quota: int, discount: float = 1.0, least: int = 0, most: int = 0
) -> list[tuple[int, int]]:
    """The pairs (trigger, channel) of one request, in the order in which they were taken. O(quota x pairs).

    score: float [n, C]; lists: int [n, C, L], -1 padded: a pair without a list is never taken. Equal scores: the
    earlier trigger, then the earlier channel. Every taken pair multiplies the scores of the others by
    1 - discount x overlap. At least `least` and at most `most` (0: no bound) pairs per channel.
    """
    n, c, depth = lists.shape
    if n == 0:
        return []
    there = (lists[:, :, 0] >= 0).ravel()
    channel = np.tile(np.arange(c), n)
    quota, floor, ceiling = bounds_of(np.bincount(channel[there], minlength=c), quota, least, most)
    live = score.ravel().astype(np.float64)
    live = live - min(0.0, float(live[there].min(initial=0.0)))  # a discount must lower a score, never raise it
    apart = 1 - discount * overlaps(lists.reshape(n * c, depth)) if discount else None
    taken: list[int] = []
    count = np.zeros(c, np.int64)
    for step in range(quota):
        owed = floor - count
        may = (count < ceiling) if owed.clip(0).sum() < quota - step else owed > 0
        best = int(np.where(there & may[channel], live, -np.inf).argmax())
        taken.append(best)
        count[channel[best]] += 1
        there[best] = False
        if apart is not None:
            live *= apart[best]
    return [(p // c, p % c) for p in taken]


def independent(score: np.ndarray, lists: np.ndarray, quota: int) -> list[tuple[int, int]]:
    """The control: each of the C channels with any list takes its own best quota / C triggers (those with the best pair
    one more), blind to the others; what a channel cannot take is lost."""
    there = lists[:, :, 0] >= 0
    able = np.flatnonzero(there.any(axis=0))
    able = able[np.argsort(-np.where(there, score, -np.inf).max(axis=0)[able], kind="stable")]
    c, taken = len(able), []
    for i, channel in enumerate(able.tolist()):
        mine = np.flatnonzero(there[:, channel])
        best = mine[np.argsort(-score[mine, channel], kind="stable")]
        taken += [(int(h), channel) for h in best[: quota // c + (i < quota % c)]]
    return sorted(taken, key=lambda pair: -float(score[pair]))


def total(score: np.ndarray, overlap: np.ndarray, chosen: list[int], discount: float = 1.0) -> float:
    """What a set of pairs is worth: its scores, less discount x overlap x the smaller score for every two of them."""
    s = score[chosen]
    both = overlap[np.ix_(chosen, chosen)] * np.minimum(s[:, None], s[None, :])
    return float(s.sum() - discount * both.sum() / 2)


def best_set(
    score: np.ndarray, lists: np.ndarray, quota: int, discount: float = 1.0, least: int = 0, most: int = 0
) -> list[tuple[int, int]]:
    """The set of pairs with the highest `total`, exactly, by integer programming: for some 60 pairs and less. Raises
    GenrecError where SECONDS do not suffice."""
    n, c, depth = lists.shape
    flat, overlap = score.ravel().astype(np.float64), overlaps(lists.reshape(n * c, depth))
    there = (lists[:, :, 0] >= 0).ravel()
    channel = np.tile(np.arange(c), n)
    quota, floor, ceiling = bounds_of(np.bincount(channel[there], minlength=c), quota, least, most)
    i, j = np.nonzero(np.triu(overlap, 1) * there[:, None] * there[None, :] if discount else np.zeros((1, 1)))
    pairs, p = len(i), n * c
    cost = np.concatenate([-flat, discount * overlap[i, j] * np.minimum(flat[i], flat[j])])
    rows = [LinearConstraint(np.concatenate([np.ones(p), np.zeros(pairs)])[None], quota, quota)]
    per_channel = np.concatenate([channel[None] == np.arange(c)[:, None], np.zeros((c, pairs), bool)], axis=1)
    rows.append(LinearConstraint(per_channel.astype(float), floor, ceiling))
    if pairs:  # y >= x_i + x_j - 1
        at = np.arange(pairs)
        column = np.concatenate([i, j, p + at])
        data = np.concatenate([np.ones(2 * pairs), -np.ones(pairs)])
        both = sparse.csr_matrix((data, (np.tile(at, 3), column)), shape=(pairs, p + pairs))
        rows.append(LinearConstraint(both, -np.inf, 1))
    upper = np.concatenate([there.astype(float), np.ones(pairs)])
    whole, limit = np.r_[np.ones(p), np.zeros(pairs)], {"time_limit": SECONDS}
    solved = milp(cost, integrality=whole, bounds=Bounds(0, upper), constraints=rows, options=limit)
    if solved.status:
        raise GenrecError(f"no best set of {p} pairs was found in {SECONDS:g} seconds: take fewer triggers")
    chosen = np.flatnonzero(solved.x[:p] > 0.5)
    return [(int(x) // c, int(x) % c) for x in chosen[np.argsort(-flat[chosen], kind="stable")]]


def best_cover(lists: np.ndarray, wanted: np.ndarray, quota: int, k: int) -> list[tuple[int, int]]:
    """The oracle: `quota` pairs that bring the most wanted items, exactly, where each brings the first k // quota items
    of its list, and the first k % quota pairs one more: what any policy may fetch, so none can find more.

    lists: int [n, C, L], unseen items, -1 padded; wanted: rows [F]. Pairs that bring nothing wanted fill up, newest
    trigger first.
    """
    n, c, depth = lists.shape
    whole, more = divmod(k, quota)
    flat = lists.reshape(n * c, depth)
    there = (flat[:, :, None] == wanted) & (wanted >= 0)  # [P, L, F]
    hit, last = there[:, :whole].any(axis=1), there[:, whole : whole + 1].any(axis=1)  # of every pair; of a longer one
    able = np.flatnonzero(hit.any(axis=1) | (last.any(axis=1) & (more > 0)))
    chosen = able.tolist()
    if len(able) > (min(quota, more) or quota):
        p, f = len(able), len(wanted)
        eye, no = np.eye(p), np.zeros((p, f))
        cost = np.concatenate([np.full(2 * p, 1e-6), -np.ones(f)])  # pair taken, pair longer, item found
        found = np.concatenate([-hit[able].T.astype(float), -last[able].T.astype(float), np.eye(f)], axis=1)
        budget = np.zeros((2, 2 * p + f))
        budget[0, :p], budget[1, p : 2 * p] = 1, 1
        rules = [
            LinearConstraint(found, -np.inf, 0),
            LinearConstraint(budget, 0, [quota, more]),
            LinearConstraint(np.concatenate([-eye, eye, no], axis=1), -np.inf, 0),  # only a taken pair can be longer
        ]
        kinds = np.r_[np.ones(2 * p), np.zeros(f)]
        x = milp(cost, integrality=kinds, bounds=Bounds(0, 1), constraints=rules).x > 0.5
        chosen = [*able[x[p : 2 * p]].tolist(), *able[x[:p] & ~x[p : 2 * p]].tolist()]
    rest = [q for q in range(n * c) if q not in set(chosen) and flat[q, 0] >= 0]
    return [(q // c, q % c) for q in [*chosen, *rest][:quota]]
