"""Ranking metrics as pure NumPy functions of ranks or of top-k lists. No state, no randomness, no masking.

Ranks are counted from 0 (0 is the top of the list); `inf` is an item that was not ranked at all. They have the shape
[B] where every request has one wanted item, or [B, T] with NaN as padding where requests have up to T of them. Accuracy
metrics return one value per request, float64 [B], so that slices, intervals and pairings can be taken from them.
Lists are integer catalogue rows [B, K], best first, -1 as padding at the end.
"""

from __future__ import annotations

import numpy as np


def _checked(ranks: np.ndarray, k: int) -> np.ndarray:
    """Ranks as float64 [B, T]. Raises ValueError for k < 1, a negative rank or a request without a wanted item."""
    ranks = np.asarray(ranks, dtype=np.float64)
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if (ranks < 0).any():
        raise ValueError("ranks are counted from 0: a negative one was given")
    if np.isnan(ranks).all(axis=1).any():
        raise ValueError("a request has no wanted item: all of its ranks are NaN")
    return ranks


def hit_rate(ranks: np.ndarray, k: int) -> np.ndarray:
    """HR@k: 1 where any wanted item is among the first k, else 0."""
    return np.any(_checked(ranks, k) < k, axis=1).astype(np.float64)


def recall(ranks: np.ndarray, k: int) -> np.ndarray:
    """Recall@k: the share of a request's wanted items among the first k. Equals HR@k where there is one."""
    ranks = _checked(ranks, k)
    wanted = ~np.isnan(ranks)
    return np.average(ranks < k, axis=1, weights=wanted)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k with binary relevance: the sum of 1 / log2(rank + 2) over the hits, over that of the best list."""
    ranks = _checked(ranks, k)
    gain = np.where(ranks < k, 1.0 / np.log2(np.where(ranks < k, ranks, 0.0) + 2.0), 0.0).sum(axis=1)
    best = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))
    return gain / best[np.minimum((~np.isnan(ranks)).sum(axis=1), k) - 1]


def mrr(ranks: np.ndarray, k: int) -> np.ndarray:
    """MRR@k: 1 / (1 + rank) of the first wanted item, 0 where none is among the first k."""
    first = np.nanmin(_checked(ranks, k), axis=1)
    return np.where(first < k, 1.0 / (1.0 + np.where(first < k, first, 0.0)), 0.0)


def coverage(lists: np.ndarray, items: int) -> float:
    """The share of the catalogue's `items` that stands in at least one list."""
    return len(np.unique(lists[lists >= 0])) / items


def novelty(lists: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean self-information of a list in bits, float64 [B]: -log2 of the item's share of the training events.

    counts: events per item [N]; one is added to each, so that an item without events has a finite value.
    An empty list counts 0. Source: Zhou et al. 2010.
    """
    bits = -np.log2((counts + 1.0) / (counts + 1.0).sum())
    there = lists >= 0
    return np.where(there, bits[np.maximum(lists, 0)], 0.0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def diversity(lists: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Intra-list diversity, float64 [B]: 1 - mean cosine over the pairs of a list; 0 for fewer than two items.

    vectors: one per item [N, D], of any length; a zero vector is unlike everything. The pairs are not formed: the sum
    of their cosines is (|sum of unit vectors|^2 - sum of |unit vector|^2) / 2.
    """
    there = lists >= 0
    found = vectors[np.maximum(lists, 0)].astype(np.float64) * there[..., None]
    norms = np.linalg.norm(found, axis=-1, keepdims=True)
    unit = found / np.where(norms > 0, norms, 1.0)
    together = (np.square(unit.sum(axis=1)).sum(axis=-1) - np.square(unit).sum(axis=(1, 2))) / 2
    n = there.sum(axis=1)
    pairs = n * (n - 1) / 2
    return np.where(pairs > 0, 1.0 - together / np.maximum(pairs, 1), 0.0)
