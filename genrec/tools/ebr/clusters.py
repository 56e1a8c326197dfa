"""Divide: which cluster every item is in, and what to call the clusters (2302.02657, section "divide").

From the paper: k-means on item vectors offline, categories in production. Ours: the vectors (`vectors.py`), behaviour
beside content, so that an item that nobody chose yet is placed by its words; no cluster is empty; a label is the words
that set a cluster apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from genrec.data.dataset import Catalog, Sequences
from genrec.errors import GenrecError
from genrec.tools.base import short_title
from genrec.tools.content import words
from genrec.tools.ebr.config import EBRConfig
from genrec.tools.ebr.vectors import ItemVectors

ITERATIONS = 25
TRIES, FEW = 8, 1000  # starts of k-means where there are at most so many vectors
WIDTH = 64  # dimensions of each of the two vectors
LABEL_CHARACTERS = 40


@dataclass(frozen=True)
class Clusters:
    """A division of N items into K clusters. of: int32 [N]; labels: K names, of untrusted words."""

    of: np.ndarray
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [K]."""
        return np.bincount(self.of, minlength=len(self))

    @cached_property
    def order(self) -> np.ndarray:
        """All rows, cluster after cluster, int64 [N]."""
        return np.argsort(self.of, kind="stable")

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each cluster begins in `order`, int64 [K + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def members(self, k: int) -> np.ndarray:
        """The rows of cluster k, ascending."""
        return self.order[self.offsets[k] : self.offsets[k + 1]]

    def number(self, name: str) -> int:
        """The cluster of this label or number. Raises GenrecError for an unknown one."""
        if name in self.labels:
            return self.labels.index(name)
        if name.isdecimal() and int(name) < len(self):
            return int(name)
        raise GenrecError(f"there is no cluster {name!r}; clusters are 0 to {len(self) - 1}: {', '.join(self.labels)}")


def divide(train: Sequences, catalog: Catalog, config: EBRConfig, vectors: ItemVectors | None = None) -> Clusters:
    """The clusters of a catalogue; fewer than asked for where it has fewer items. Only training events are read.
    vectors: those of train and catalog, where they are at hand.

    Raises GenrecError where categories are wanted and the catalogue has none.
    """
    n = len(catalog)
    k = min(config.clusters, n)
    if config.divide == "categories":
        of = by_category(catalog, k)
    elif config.divide == "random":
        of = (np.random.default_rng(config.seed).permutation(n) % k).astype(np.int32)
    else:
        vectors = vectors or ItemVectors(train, catalog)
        both = np.concatenate([vectors.behaviour(WIDTH), vectors.content(WIDTH)], axis=1)
        of = kmeans(both, k, config.seed)
    if config.divide == "random":
        return Clusters(of, tuple(f"random {c}" for c in range(int(of.max()) + 1)))
    return Clusters(of, labels_of(of, catalog))


def by_category(catalog: Catalog, k: int) -> np.ndarray:
    """int32 [N]: the k - 1 most frequent category paths down to the level that tells most apart, and the rest.

    The level is the one of whose k - 1 most frequent paths the largest holds the smallest share of the items.
    """
    paths = catalog.categories
    if not any(paths):
        raise GenrecError("the catalogue has no categories to divide by; take EBR's divide 'kmeans'")
    best: tuple[float, np.ndarray] | None = None
    for depth in range(1, min(6, max(map(len, paths))) + 1):
        names = [tuple(path[:depth]) for path in paths]
        kept = [name for name, _ in sorted(Counter(filter(None, names)).items(), key=lambda x: (-x[1], x[0]))]
        place = {name: i for i, name in enumerate(kept if len(kept) < k and all(names) else kept[: max(1, k - 1)])}
        of = np.array([place.get(name, len(place)) for name in names], np.int32)
        largest = float(np.bincount(of).max() / len(of))
        if best is None or largest < best[0] - 1e-9:
            best = largest, of
    assert best is not None
    return best[1]


def kmeans(vectors: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Clusters of vectors [N, D] by faiss k-means, int32 [N], numbered by size from the largest; none is empty (an
    empty one takes the worst-placed item of the largest). Of few vectors, where a start decides, the best of TRIES
    starts. Raises GenrecError for NaN or infinity."""
    import faiss

    vectors = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise GenrecError(f"the vector of item row {bad} holds NaN or infinity; clusters need finite vectors")
    n = len(vectors)
    quiet = {"min_points_per_centroid": 1, "max_points_per_centroid": max(256, -(-n // k)), "seed": seed + 1}
    tries = TRIES if n <= FEW else 1
    engine = faiss.Kmeans(vectors.shape[1], k, niter=ITERATIONS, nredo=tries, verbose=False, **quiet)
    engine.train(vectors)
    distance, of = engine.index.search(vectors, 1)
    distance, of = distance[:, 0], of[:, 0]
    for empty in np.flatnonzero(np.bincount(of, minlength=k) == 0):
        largest = int(np.bincount(of, minlength=k).argmax())
        inside = np.flatnonzero(of == largest)
        of[inside[distance[inside].argmax()]] = empty
    sizes = np.bincount(of, minlength=k)
    rank = np.empty(k, np.int32)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(k, dtype=np.int32)
    return rank[of]


def labels_of(of: np.ndarray, catalog: Catalog, count: int = 3) -> tuple[str, ...]:
    """For each cluster the words of titles and categories that set it apart: share inside x log(share inside / share
    anywhere). Different clusters have different labels."""
    k = int(of.max()) + 1
    inside: list[Counter[str]] = [Counter() for _ in range(k)]
    anywhere: Counter[str] = Counter()
    for c, title, path in zip(of.tolist(), catalog.titles, catalog.categories, strict=True):
        found = {w for w in words(" ".join([title, *path])) if len(w) > 2 and not w.isdecimal()}
        inside[c].update(found)
        anywhere.update(found)
    sizes = np.bincount(of, minlength=k)
    labels: list[str] = []
    for c in range(k):
        lift = {
            w: m / sizes[c] * np.log((m / sizes[c]) / (anywhere[w] / len(of))) for w, m in inside[c].items() if sizes[c]
        }
        best = sorted((w for w in lift if lift[w] > 0), key=lambda w: (-lift[w], w))[:count]
        label = short_title(" ".join(best), LABEL_CHARACTERS) or f"cluster {c}"
        labels.append(label if label not in labels else f"{label} ({c})")
    return tuple(labels)
