"""AUC and GAUC with intervals over users, as pure NumPy functions of labels, scores and users.

AUC: the chance that a positive sample scores above a negative one, ties counting half. GAUC: the AUC inside each user
who has both, weighted by the user's samples (Zhu et al. 2017, as DIN uses it); users with one kind only are left out.
Intervals come from a bootstrap over users (`genrec.evaluation.intervals`); a pair of systems shares its resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from genrec.evaluation.intervals import RESAMPLES, Interval, bootstrap

DETECTABLE = 1.959964 + 0.841621  # standard errors: a two-sided test at 5 % that finds the difference in 80 % of cases


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Of labels bool [B] and scores float [B]; NaN where one kind is missing."""
    return float(_weighted_auc(labels, scores, np.ones((1, len(labels))))[0])


def user_aucs(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> np.ndarray:
    """The AUC of each sample's own user, float64 [B]; NaN for users with one kind of label only. Its mean over the
    samples that have one is the GAUC."""
    labels, scores, users = _checked(labels, scores, users)
    code = np.unique(users, return_inverse=True)[1].ravel()
    order = np.lexsort((scores, code))
    code_, y, s = code[order], labels[order], scores[order]
    first = np.ones(len(s), bool)
    first[1:] = (code_[1:] != code_[:-1]) | (s[1:] != s[:-1])
    group = np.cumsum(first) - 1  # ties of one user
    n = int(code.max()) + 1 if len(code) else 0
    rank = np.zeros(len(s))
    size = np.bincount(group)
    start = np.concatenate([[0], np.cumsum(size)])[:-1]
    offset = np.searchsorted(code_, np.arange(n))
    rank[:] = (start + (size - 1) / 2)[group] - offset[code_]  # mean rank from 0 inside the user
    pos = np.bincount(code_, weights=y, minlength=n)
    neg = np.bincount(code_, minlength=n) - pos
    above = np.bincount(code_, weights=rank * y, minlength=n) - pos * (pos - 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (above / (pos * neg))[code]


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """Mean AUC inside the users, weighted by their samples; NaN where no user has both kinds."""
    own = user_aucs(labels, scores, users)
    return float(own[~np.isnan(own)].mean()) if (~np.isnan(own)).any() else float("nan")


def inside_or_over(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[str, float]:
    """What to judge a ranker's progress by: ("GAUC", its value), or ("AUC", over all samples) where less than a tenth
    of them belong to users with both kinds, as with an event or two of each; .5 where there is one kind alone."""
    own = user_aucs(labels, scores, users)
    inside = ~np.isnan(own)
    if len(own) and inside.mean() >= 0.1:
        return "GAUC", float(own[inside].mean())
    value = auc(labels, scores)
    return "AUC", 0.5 if np.isnan(value) else value


@dataclass(frozen=True)
class Draws:
    """A measure, and its value in each resample of the users, [resamples]. Two over the same samples share their
    resamples, so their difference is paired."""

    mean: float
    drawn: np.ndarray

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.mean - other.mean, self.drawn - other.drawn)

    def interval(self) -> Interval:
        return _percentiles(self.mean, self.drawn)


def auc_draws(
    labels: np.ndarray, scores: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Draws:
    """AUC of scores [B], or the mean over runs of [R, B], to be had once for many comparisons."""
    mean = float(np.mean([auc(labels, s) for s in np.atleast_2d(scores)]))
    return Draws(mean, _drawn_aucs(labels, scores, users, resamples, seed))


def auc_interval(
    labels: np.ndarray, scores: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """AUC of scores [B], or the mean over runs of [R, B], with its user-clustered interval."""
    return auc_draws(labels, scores, users, resamples, seed).interval()


def auc_difference(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """AUC of a less that of b, [B] or [R, B] (means over runs), on the same resamples of users."""
    return (auc_draws(labels, a, users, resamples, seed) - auc_draws(labels, b, users, resamples, seed)).interval()


def gauc_interval(
    labels: np.ndarray,
    scores: np.ndarray,
    users: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Interval:
    """GAUC of scores [B], or the mean over runs of [R, B], with its interval. groups: what an AUC is taken inside, if
    that is less than a user, such as a user's samples in one fold; the resamples are of users all the same."""
    return _clustered(_mean_user_aucs(labels, scores, users if groups is None else groups), users, resamples, seed)


def gauc_difference(
    labels: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    users: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Interval:
    """GAUC of a less that of b, [B] or [R, B] (means over runs), on the same resamples of users; groups as above."""
    inside = users if groups is None else groups
    own = _mean_user_aucs(labels, a, inside) - _mean_user_aucs(labels, b, inside)
    return _clustered(own, users, resamples, seed)


def detectable(difference: Interval) -> float:
    """The smallest true difference that such a comparison finds in 80 % of cases (two-sided, 5 %), from the width of
    its 95 % interval: 2.8 standard errors. NaN where there is no interval."""
    return DETECTABLE * (difference.high - difference.low) / (2 * 1.959964)


def buckets(counts: np.ndarray, edges: Sequence[int]) -> dict[str, np.ndarray]:
    """Masks, bool [B], by exposure: counts [B] of each sample's item in the training data, cut at rising edges.

    Example: edges (10, 50) give "0-9", "10-49" and "50+"."""
    if list(edges) != sorted(set(edges)) or (len(edges) and edges[0] < 1):
        raise ValueError(f"edges must rise and begin above 0, not {list(edges)}")
    bounds = [0, *edges]
    names = [f"{a}-{b - 1}" for a, b in pairwise(bounds)] + [f"{bounds[-1]}+"]
    place = np.searchsorted(np.asarray(edges), counts, side="right")
    return {name: place == i for i, name in enumerate(names)}


def _checked(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, users = np.asarray(labels).astype(bool), np.asarray(scores, np.float64), np.asarray(users)
    if not labels.shape == scores.shape == users.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape}, scores {scores.shape} and users {users.shape} must be the same [B]")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return labels, scores, users


def _weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC [R] under sample weights [R, B]."""
    labels, scores, _ = _checked(labels, scores, np.zeros(len(labels), np.int64))
    if not len(labels):
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    y, s, w = labels[order], scores[order], weights[:, order].astype(np.float64)
    start = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    pos, neg = np.add.reduceat(w * y, start, axis=1), np.add.reduceat(w * ~y, start, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((pos * (below + neg / 2)).sum(1) / (pos.sum(1) * neg.sum(1)))


def _drawn_aucs(labels: np.ndarray, scores: np.ndarray, users: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Mean AUC over the runs [R, B] of scores in each resample of users, [resamples]."""
    cluster = np.unique(users, return_inverse=True)[1].ravel()
    n = int(cluster.max()) + 1 if len(cluster) else 0
    if n < 2:
        return np.full(resamples, np.nan)
    rng = np.random.default_rng(seed)
    out = []
    step = max(1, 4_000_000 // max(1, len(labels)))
    for begin in range(0, resamples, step):
        r = min(step, resamples - begin)
        times = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(r)])[:, cluster]
        out.append(np.mean([_weighted_auc(labels, s, times) for s in np.atleast_2d(scores)], axis=0))
    return np.concatenate(out)


def _mean_user_aucs(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean([user_aucs(labels, s, users) for s in np.atleast_2d(scores)], axis=0))


def _clustered(own: np.ndarray, users: np.ndarray, resamples: int, seed: int) -> Interval:
    there = ~np.isnan(own)
    if not there.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    return bootstrap(own[there][:, None], np.asarray(users)[there], resamples, seed)[0]


def _percentiles(mean: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[~np.isnan(drawn)]  # a resample may hold one kind of label only
    if not len(drawn):
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean, float(low), float(high))
