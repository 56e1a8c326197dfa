"""Confidence intervals: a bootstrap over users, because the requests of one user are not independent.

A user with all of their requests is drawn or left out as one block (a cluster). The interval is the percentile one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over requests with its interval; low and high are NaN for fewer than two users."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap(
    values: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """The mean of every column with its user-clustered interval.

    values: float [B, M], one row per request and one column per metric; users: int [B], any labels.
    All columns share the same resamples. Raises ValueError where there is no request or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(users):
        raise ValueError(f"values must be [{len(users)}, metrics], not {values.shape}")
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("a bootstrap needs at least one request and finite values")
    means = values.mean(axis=0)
    cluster = np.unique(users, return_inverse=True)[1].ravel()
    n = int(cluster.max()) + 1
    if n < 2:
        return [Interval(float(m), float("nan"), float("nan")) for m in means]
    sums = np.stack([np.bincount(cluster, weights=column, minlength=n) for column in values.T], axis=1)
    sums = np.concatenate([sums, np.bincount(cluster, minlength=n)[:, None]], axis=1)  # [n, M + 1]: sums, then requests
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    drawn = []
    for start in range(0, resamples, block):
        r = min(block, resamples - start)
        picks = rng.integers(0, n, size=(r, n)) + np.arange(r)[:, None] * n
        times = np.bincount(picks.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)  # multinomial counts
        total = times @ sums
        drawn.append(total[:, :-1] / total[:, -1:])
    tail = (1.0 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1.0 - tail], axis=0)
    return [Interval(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]


def paired(
    a: np.ndarray, b: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """Mean of a - b per column, [B, M] each, on the same requests; an interval above zero says that a is better."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a pairing needs the same requests and metrics: {a.shape} against {b.shape}")
    return bootstrap(a - b, users, resamples, seed, level)
