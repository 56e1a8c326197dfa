"""Where the items of all clusters are searched: one array or one faiss index, in which a cluster is a range.

From the paper: a nearest-neighbour index per cluster, searched in parallel. Ours: one index with offsets. Up to EXACT
items it is the vectors in the order of the clusters, and a cluster is a slice. Above, it is one IndexIVFFlat in which
every cluster has inverted lists of its own (its centroids are found inside it): the users' vectors of a cluster are
searched together, in its lists only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from genrec.tools.ebr.clusters import Clusters

EXACT = 50_000  # items
PROBES = 8  # lists searched per user and cluster
POINTS = 64  # items per centroid that k-means reads
SAMPLE = 512  # items per cluster from which the softmax's sum is estimated above EXACT


class ClusterIndex:
    """Inner-product search inside clusters. vectors: float32 [N, d]; exact None decides by EXACT."""

    def __init__(
        self, vectors: np.ndarray, clusters: Clusters, exact: bool | None = None, probes: int = PROBES, seed: int = 0
    ) -> None:
        self.clusters, self.probes = clusters, probes
        self.approximate = len(vectors) > EXACT if exact is None else not exact
        rng = np.random.default_rng(seed)
        members = [clusters.members(k) for k in range(len(clusters))]
        self.sample = [m if len(m) <= SAMPLE else np.sort(rng.choice(m, SAMPLE, replace=False)) for m in members]
        self.sampled = [vectors[s] for s in self.sample]
        self.index: Any = None
        if self.approximate:
            self._build(vectors, members)
        else:
            self.ordered = vectors[clusters.order]

    def _build(self, vectors: np.ndarray, members: list[np.ndarray]) -> None:
        import faiss

        d = vectors.shape[1]
        self.centroids: list[np.ndarray] = []
        self.lists = [0]
        for m in members:
            n = int(max(1, min(len(m), round(2 * len(m) ** 0.5))))
            kmeans = faiss.Kmeans(
                d, n, niter=10, max_points_per_centroid=POINTS, min_points_per_centroid=1, seed=1, spherical=False
            )
            kmeans.train(np.ascontiguousarray(vectors[m]))
            self.centroids.append(np.asarray(kmeans.centroids))
            self.lists.append(self.lists[-1] + n)
        quantizer = faiss.IndexFlatL2(d)
        quantizer.add(np.concatenate(self.centroids))
        self.index = faiss.IndexIVFFlat(quantizer, d, self.lists[-1], faiss.METRIC_INNER_PRODUCT)
        self.index.own_fields = False
        self._quantizer = quantizer
        self.index.is_trained = True
        for k, m in enumerate(members):
            part = faiss.IndexFlatL2(d)
            part.add(self.centroids[k])
            for rows in np.array_split(m, max(1, len(m) // 65536)):
                x = np.ascontiguousarray(vectors[rows])
                lists = part.search(x, 1)[1][:, 0] + self.lists[k]
                self._add(x, rows, lists)

    def _add(self, x: np.ndarray, rows: np.ndarray, lists: np.ndarray) -> None:
        import faiss

        ids, lists = rows.astype(np.int64), lists.astype(np.int64)
        self.index.add_core(len(x), faiss.swig_ptr(x), faiss.swig_ptr(ids), faiss.swig_ptr(lists))

    def search(self, vectors: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The counts[b, k] best items of every cluster. vectors: [B, K, d], counts: int [B, K].

        Returns rows int64 [B, L], -1 padded, and inner products float32 [B, L]; in no particular order.
        """
        users, k = counts.shape
        width = np.minimum(counts, self.clusters.sizes[None])
        at = np.concatenate([np.zeros((users, 1), np.int64), np.cumsum(width, axis=1)], axis=1)
        rows = np.full((users, int(at[:, -1].max(initial=0))), -1, np.int64)
        logits = np.full(rows.shape, -np.inf, np.float32)
        for c in range(k):
            asked = np.flatnonzero(width[:, c])
            for part in _alike(width[asked, c]):
                who = asked[part]
                most = int(width[who, c].max())
                found, value = self._inside(np.ascontiguousarray(vectors[who, c]), c, most)
                place = at[who, c][:, None] + np.arange(most)
                there = np.arange(most) < width[who, c][:, None]
                b = np.broadcast_to(who[:, None], there.shape)
                rows[b[there], place[there]], logits[b[there], place[there]] = found[there], value[there]
        return rows, logits

    def _inside(self, x: np.ndarray, k: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The `most` best items of cluster k for users x [U, d], best first."""
        if self.index is None:
            start, end = self.clusters.offsets[k], self.clusters.offsets[k + 1]
            scores = x @ self.ordered[start:end].T
            if most < scores.shape[1]:
                best = np.argpartition(-scores, most - 1, axis=1)[:, :most]
            else:
                best = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
            value = np.take_along_axis(scores, best, 1)
            order = np.argsort(-value, axis=1, kind="stable")
            best = np.take_along_axis(best, order, 1)
            return self.clusters.order[start + best], np.take_along_axis(value, order, 1)
        centroids = self.centroids[k]
        near = x @ centroids.T
        probes = min(self.probes, len(centroids))
        lists = np.argpartition(-near, probes - 1, axis=1)[:, :probes].astype(np.int64)
        distance = np.take_along_axis(near, lists, 1)
        self.index.nprobe = probes
        value, found = self.index.search_preassigned(x, most, lists + self.lists[k], distance)
        return found, np.where(found < 0, -np.inf, value)

    def log_mass(self, vectors: np.ndarray, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """log of the sum of exp(inner product) over each cluster, float32 [B, K]. What was found (rows and logits
        [B, L] of `search`) counts itself; the rest is estimated from at most SAMPLE items of the cluster."""
        out = np.empty(vectors.shape[:2], np.float32)
        of = np.where(rows >= 0, self.clusters.of[rows], -1)
        for k, (sample, sampled) in enumerate(zip(self.sample, self.sampled, strict=True)):
            b, place = np.nonzero(of == k)
            found = np.full((len(vectors), rows.shape[1]), -np.inf, np.float32)
            found[b, place] = logits[b, place]
            rest = vectors[:, k] @ sampled.T + np.log(self.clusters.sizes[k] / max(1, len(sample)))
            at = np.searchsorted(sample, rows[b, place]).clip(max=len(sample) - 1)
            twice = sample[at] == rows[b, place]  # sampled, and found already
            rest[b[twice], at[twice]] = -np.inf
            out[:, k] = np.logaddexp.reduce(np.concatenate([found, rest], axis=1), axis=1)
        return out


def _alike(counts: np.ndarray) -> list[np.ndarray]:
    """Positions grouped by the power of two of their count, so that nobody pays for a much longer list."""
    group = np.ceil(np.log2(np.maximum(counts, 1))).astype(int)
    return [np.flatnonzero(group == g) for g in np.unique(group)]
