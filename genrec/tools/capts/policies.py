"""Ways to choose triggers behind one interface: scores of pairs, then pairs under the shared quota.

`learned` is CAPTS. The others are what one would use instead (section 1.6 of the paper's peers): the newest triggers,
those with the best feedback, PinnerSage's medoids (Ward clusters of the triggers, the most recent and largest first),
PDN's (one learned score per trigger times the channel's similarity), and `independent`: CAPTS' values without its
routing. The oracle knows the future and is `routing.best_cover`. A list is what it holds beside the seen items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from genrec.tools.capts.channels import Channels
from genrec.tools.capts.config import CAPTSConfig
from genrec.tools.capts.requests import Triggers
from genrec.tools.capts.routing import independent, route

LEARNED = ("learned", "independent", "pdn")  # policies that need the network
FADE = 0.9  # weight per step back, of a trigger in its PinnerSage cluster
WARD = 1.0  # distance of unit vectors at which PinnerSage's clusters stay apart


@dataclass(frozen=True)
class Values:
    """What the network says, float32: value (a probability) and uniqueness [B, n, C], trigger [B, n]."""

    value: np.ndarray
    uniqueness: np.ndarray
    trigger: np.ndarray


@dataclass(frozen=True)
class Route:
    """The pairs (trigger, channel) of one request, in order, and the weight of each, float32 [T]."""

    pairs: list[tuple[int, int]]
    weights: np.ndarray


def policy_of(config: CAPTSConfig, values: Values | None) -> str:
    """The policy that is followed: without a network, those that need one give way to the newest triggers."""
    return config.policy if values is not None or config.policy not in LEARNED else "recent"


def pair_scores(
    triggers: Triggers, values: Values | None, channels: Channels, content: np.ndarray, config: CAPTSConfig
) -> np.ndarray:
    """float32 [B, n, C]: higher is asked first. content: unit item vectors [N, D], which PinnerSage clusters."""
    b, n = triggers.rows.shape
    shape = (b, n, len(channels.names))
    place = np.arange(n, dtype=np.float32)[None].repeat(b, 0)
    policy = policy_of(config, values)
    if values is not None and policy in ("learned", "independent"):
        return values.value * (1 + config.eta * values.uniqueness) if policy == "learned" else values.value
    if values is not None and policy == "pdn":
        alike = channels.scores[np.maximum(triggers.rows, 0), :, : config.depth].astype(np.float32).mean(axis=3)
        return values.trigger[:, :, None] * alike / channels.scale
    if policy == "feedback":
        score = triggers.about[..., 2] - 1e-3 * place
    elif policy == "pinnersage":
        score = np.stack([medoids(content[rows[rows >= 0]], n) for rows in triggers.rows]) - 1e-3 * place
    else:
        score = -place
    return np.broadcast_to(score[:, :, None], shape).astype(np.float32)


def medoids(vectors: np.ndarray, n: int) -> np.ndarray:
    """Importance of a user's triggers, float64 [n]: that of its Ward cluster for a cluster's medoid, 0 for the others.

    vectors: unit rows of the triggers [m, D], newest first; a cluster's importance is the sum of FADE^place.
    """
    out = np.zeros(n)
    m = len(vectors)
    fade = FADE ** np.arange(m)
    if m < 2:
        out[:m] = fade
        return out
    of = fcluster(linkage(vectors, method="ward"), WARD, criterion="distance")
    for c in np.unique(of):
        at = np.flatnonzero(of == c)
        distance = np.linalg.norm(vectors[at][:, None] - vectors[at][None], axis=2).sum(axis=1)
        out[at[distance.argmin()]] = fade[at].sum()
    return out


def routes(
    triggers: Triggers, values: Values | None, channels: Channels, content: np.ndarray, config: CAPTSConfig
) -> list[Route]:
    """The pairs of every request under the policy, the quota and the bounds of `config`."""
    scores = pair_scores(triggers, values, channels, content, config)
    policy = policy_of(config, values)
    out = []
    for b, whole in enumerate(triggers.lists(channels, config.depth)):
        n = int((triggers.rows[b] >= 0).sum())
        lists = whole[:n]
        if policy == "independent":
            pairs = independent(scores[b, :n], lists, config.quota)
        else:
            discount = config.discount if policy == "learned" else 0.0
            pairs = route(scores[b, :n], lists, config.quota, discount, config.least, config.most)
        if values is not None and policy in ("learned", "independent"):
            weights = np.array([values.value[b, h, c] for h, c in pairs], np.float32)
        else:
            weights = (1 / (1 + np.arange(len(pairs)))).astype(np.float32)
        out.append(Route(pairs, weights))
    return out


def retrieved(
    pairs: list[tuple[int, int]], rows: np.ndarray, channels: Channels, seen: np.ndarray, k: int, quota: int
) -> list[np.ndarray]:
    """What each pair brings when k items may be fetched in all: its first k / quota unseen ones (the first pairs one
    more). An item that two pairs bring counts for both: that is the price of overlap.

    rows: the request's triggers [n]; seen: rows to leave out.
    """
    found = []
    for i, (h, c) in enumerate(pairs):
        mine = channels.rows[rows[h], c]
        mine = mine[(mine >= 0) & ~np.isin(mine, seen)]
        found.append(mine[: k // quota + (i < k % quota)])
    return found


def union_recall(found: list[np.ndarray], wanted: np.ndarray) -> float:
    """The share of the wanted rows that some pair brought."""
    if not len(wanted):
        return 0.0
    return float(np.isin(wanted, np.concatenate(found) if found else np.zeros(0, np.int64)).mean())
