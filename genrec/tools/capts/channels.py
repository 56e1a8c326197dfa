"""The item-to-item channels of CAPTS as one fitted table: item -> its R nearest, on every channel.

The paper has four production channels and does not say which. Ours reuse the tools: item-kNN, directed Markov, TF-IDF
content, EBR's item vectors, and item2vec's stand-in (`genrec.tools.ebr.vectors`). Each is fitted on the events it is
given and on nothing else. The table is dense, so that all lists of a request are one gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import sparse

from genrec.data.dataset import Catalog, Sequences
from genrec.errors import GenrecError
from genrec.tools.capts.config import CAPTSConfig
from genrec.tools.content import Content
from genrec.tools.ebr.config import EBRConfig
from genrec.tools.ebr.tool import EBR
from genrec.tools.ebr.vectors import behaviour_vectors, unit
from genrec.tools.itemknn import ItemKNN
from genrec.tools.markov import Markov

BLOCK = 512
VECTORS = 64  # dimensions of the stand-in for item2vec


@dataclass(frozen=True)
class Channels:
    """names: C channels. rows: int32 [N, C, R], the nearest items best first, -1 padded; scores: float16 [N, C, R],
    from 0 to 1, 0 where padded. counts: training events per item, float32 [N]."""

    names: tuple[str, ...]
    rows: np.ndarray
    scores: np.ndarray
    counts: np.ndarray

    @cached_property
    def scale(self) -> np.ndarray:
        """The mean score of each channel's entries, float32 [C]: similarities of different channels have different
        units."""
        there = self.rows >= 0
        total = self.scores.astype(np.float32).sum(axis=(0, 2))
        return np.maximum(total / np.maximum(there.sum(axis=(0, 2)), 1), 1e-6).astype(np.float32)

    @cached_property
    def features(self) -> np.ndarray:
        """What a table says of an item on a channel, float32 [N, C, 5], each of mean 0 and deviation 1 per channel over
        the items that have a list: list length, best score, mean score, mean log count of what is listed, and the share
        of the list that no other channel of the item has. Zeros where there is no list."""
        c = self.rows.shape[1]
        there = self.rows >= 0
        length = there.sum(axis=2)
        some = np.maximum(length, 1)
        popular = np.where(there, np.log1p(self.counts)[np.maximum(self.rows, 0)], 0).sum(axis=2) / some
        score = self.scores.astype(np.float32)
        own = np.stack([(there[:, i] & ~self._elsewhere(i)).sum(axis=1) / some[:, i] for i in range(c)], axis=1)
        out = np.stack([length, score[:, :, 0], score.sum(axis=2) / some, popular, own], axis=2).astype(np.float32)
        full = length > 0
        for i in range(c):
            if full[:, i].any():
                part = out[full[:, i], i]
                out[:, i] = (out[:, i] - part.mean(axis=0)) / np.maximum(part.std(axis=0), 1e-3)
        out[~full] = 0.0
        return np.clip(out, -5, 5)

    def _elsewhere(self, channel: int) -> np.ndarray:
        """bool [N, R]: which entries of this channel's lists are also in another channel's list of the same item."""
        n = len(self.rows)
        found = np.zeros(self.rows[:, channel].shape, bool)
        size = n + 1
        key = np.arange(n)[:, None] * size + self.rows[:, channel]
        for other in range(self.rows.shape[1]):
            if other != channel:
                rows = self.rows[:, other]
                found |= np.isin(key, (np.arange(n)[:, None] * size + rows)[rows >= 0])
        return found & (self.rows[:, channel] >= 0)


def fit_channels(
    train: Sequences,
    catalog: Catalog,
    config: CAPTSConfig,
    work: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Channels:
    """The tables of these events. work: where the training of EBR's vectors keeps its checkpoint."""
    made = []
    for name in config.channels:
        if name in ("itemknn", "markov"):
            tool = (ItemKNN if name == "itemknn" else Markov)().fit(train, catalog)
            made.append(table_of_weights(tool.weights, config.neighbours))
        elif name == "content":
            made.append(table_of_vectors(Content().fit(train, catalog).matrix, config.neighbours))
        elif name == "ebr":
            settings = EBRConfig(prompt="none", steps=config.ebr_steps, patience=0, seed=config.seed)
            ebr = EBR(settings)
            ebr.work, ebr.say = work, say
            made.append(table_of_vectors(unit(ebr.fit(train, catalog).items), config.neighbours))
        else:
            vectors = behaviour_vectors(train, len(catalog), VECTORS)
            made.append(table_of_vectors(vectors, config.neighbours))
    rows, scores = (np.stack(part, axis=1) for part in zip(*made, strict=True))
    counts = np.bincount(train.items, minlength=len(catalog)).astype(np.float32)
    return Channels(config.channels, rows, scores, counts)


def table_of_weights(weights: sparse.csr_matrix, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """rows int32 [N, depth] and scores float16 [N, depth] of a sparse item-to-item matrix [N, N], positive weights
    only, best first, equals by row. Scores are divided by the largest of the matrix."""
    w = sparse.csr_matrix(weights)
    n, owner = w.shape[0], np.repeat(np.arange(w.shape[0]), np.diff(w.indptr))
    keep = (w.data > 0) & (w.indices != owner)
    owner, found, value = owner[keep], w.indices[keep], w.data[keep]
    order = np.lexsort((found, -value, owner))
    owner, found, value = owner[order], found[order], value[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner, side="left")
    keep = place < depth
    rows, scores = np.full((n, depth), -1, np.int32), np.zeros((n, depth), np.float16)
    rows[owner[keep], place[keep]] = found[keep]
    scores[owner[keep], place[keep]] = value[keep] / max(float(value.max(initial=0)), 1e-12)
    return rows, scores


def table_of_vectors(vectors: np.ndarray | sparse.csr_matrix, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by positive inner products of the rows of vectors [N, D]. Exact, N^2 products in blocks.

    Raises GenrecError for NaN or infinity.
    """
    n = vectors.shape[0]
    data = vectors.data if sparse.issparse(vectors) else vectors
    if not np.isfinite(data).all():
        raise GenrecError("an item vector holds NaN or infinity; a channel needs finite vectors")
    rows, scores = np.full((n, depth), -1, np.int32), np.zeros((n, depth), np.float16)
    k = min(depth, n - 1)
    for start in range(0, n if k > 0 else 0, BLOCK):
        part = vectors[start : start + BLOCK] @ vectors.T
        near = part.toarray() if sparse.issparse(part) else part
        near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
        best = np.sort(np.argpartition(-near, k - 1, axis=1)[:, :k], axis=1)
        value = np.take_along_axis(near, best, 1)
        order = np.argsort(-value, axis=1, kind="stable")
        best, value = np.take_along_axis(best, order, 1), np.take_along_axis(value, order, 1)
        rows[start : start + BLOCK, :k] = np.where(value > 0, best, -1)
        scores[start : start + BLOCK, :k] = np.clip(value, 0, 1)
    return rows, scores
