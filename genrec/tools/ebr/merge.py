"""Merge: how many items of each cluster a list of M takes (2302.02657): M_k = M p_k^alpha / sum p^alpha.

Ours, where the paper is silent: whole numbers by largest remainder, no more than a cluster has, the rest shared out
among the others again; floors and exact quotas per cluster come first. Pure functions.
"""

from __future__ import annotations

import numpy as np

from genrec.errors import GenrecError
from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.config import Controls


def sharpened(log_p: np.ndarray, alpha: float) -> np.ndarray:
    """p^alpha / sum p^alpha out of log p [B, K]; rows sum to 1. alpha 0: equal shares."""
    scaled = alpha * log_p if alpha else np.zeros_like(log_p)
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    shares = np.exp(scaled)
    return shares / shares.sum(axis=1, keepdims=True)


def apportion(total: int, shares: np.ndarray, caps: np.ndarray, least: np.ndarray | int = 0) -> np.ndarray:
    """Whole numbers by largest remainder, int64 [B, K]: row sums are min(total, sum of caps), no entry is above its cap
    or below `least` ([B, K] or broadcast to it; a cap wins over it).

    shares: float [B, K], >= 0. Clusters whose share is below their least or above their cap are set to it, the greater
    excess first, and the others share what is left; where nobody has a share, by room. Equal remainders: the lower
    cluster. Raises GenrecError where `least` asks for more than `total`.
    """
    shares = np.asarray(shares, np.float64)
    caps = np.broadcast_to(np.asarray(caps, np.int64), shares.shape)
    lowest: np.ndarray = np.minimum(np.broadcast_to(np.asarray(least, np.int64), shares.shape), caps)
    if (lowest.sum(axis=1) > total).any():
        raise GenrecError(f"floors and quotas ask for {int(lowest.sum(axis=1).max())} items in a list of {total}")
    wanted = np.minimum(total, caps.sum(axis=1))
    pinned, value = np.zeros(shares.shape, bool), np.zeros(shares.shape, np.int64)
    while True:
        rest = wanted - value.sum(axis=1)
        weight = np.where(pinned, 0.0, shares)
        silent = weight.sum(axis=1) <= 0
        weight[silent] = np.where(pinned, 0, caps)[silent]
        ideal = rest[:, None] * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
        under = np.where(pinned, 0.0, lowest - ideal).clip(0)
        over = np.where(pinned, 0.0, ideal - caps).clip(0)
        lower = (under.sum(axis=1) >= over.sum(axis=1))[:, None]
        outside = np.where(lower, under, over) > 1e-9
        if not outside.any():
            break
        pinned, value = pinned | outside, np.where(outside, np.where(lower, lowest, caps), value)
    whole = np.floor(ideal + 1e-9).astype(np.int64)
    rank = np.argsort(np.argsort(-(ideal - whole - pinned), axis=1, kind="stable"), axis=1)
    return value + whole + (rank < (rest - whole.sum(axis=1))[:, None])


def counts_of(
    total: int, log_p: np.ndarray, caps: np.ndarray, clusters: Clusters, controls: Controls, alpha: float
) -> np.ndarray:
    """M_k of B requests, int64 [B, K]. log_p: [B, K]; caps: items left in each cluster, [B, K]; alpha: the fitted one.

    Raises GenrecError for an unknown cluster and for quotas that do not fit into `total`.
    """
    shares = sharpened(log_p, alpha if controls.alpha is None else controls.alpha)
    caps = np.broadcast_to(np.asarray(caps, np.int64), shares.shape).copy()
    least = np.zeros(shares.shape, np.int64)
    for name, count in controls.floors.items():
        least[:, clusters.number(name)] = count
    for name, count in controls.quotas.items():
        k = clusters.number(name)
        caps[:, k] = np.minimum(caps[:, k], count)
        least[:, k] = count
    return apportion(total, shares, caps, least)
