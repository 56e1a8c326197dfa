"""Item vectors without a neural network: from words, and from who chose what with what.

The paper clusters Word2Vec vectors of items. Ours are the truncated SVD of the positive pointwise mutual information
of items that stand near each other in a sequence, which is what skip-gram with negative sampling factorises (Levy and
Goldberg 2014): deterministic, no learning rate, seconds.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.content import Content


class ItemVectors:
    """The vectors of one catalogue and its training events, each made once: fits on the same events can share them."""

    def __init__(self, train: Sequences, catalog: Catalog) -> None:
        self.train, self.catalog = train, catalog
        self._made: dict[tuple[str, int], np.ndarray] = {}

    def behaviour(self, dimensions: int) -> np.ndarray:
        """See `behaviour_vectors`."""
        key = ("behaviour", dimensions)
        if key not in self._made:
            self._made[key] = behaviour_vectors(self.train, len(self.catalog), dimensions)
        return self._made[key]

    def content(self, dimensions: int) -> np.ndarray:
        """See `content_vectors`."""
        key = ("content", dimensions)
        if key not in self._made:
            self._made[key] = content_vectors(self.catalog, dimensions)
        return self._made[key]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a zero row stays zero."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def truncated(matrix: sparse.csr_matrix, dimensions: int, power: float = 0.5) -> np.ndarray:
    """U S^power of the truncated SVD, float32 [N, dimensions], zeros where the matrix has fewer. Deterministic."""
    n, m = matrix.shape
    k = min(dimensions, min(n, m) - 1)
    out = np.zeros((n, dimensions), np.float32)
    if k < 1 or not matrix.nnz:
        return out
    start = np.random.default_rng(0).normal(size=min(n, m))
    u, s, _ = svds(matrix.astype(np.float64), k=k, v0=start)
    order = np.argsort(-s)
    u, s = u[:, order], np.maximum(s[order], 0)
    signs = np.where(u[np.abs(u).argmax(axis=0), np.arange(k)] < 0, -1.0, 1.0)
    out[:, :k] = u * signs * s**power
    out[np.diff(matrix.indptr) == 0] = 0.0  # not the solver's rounding
    return out


def content_vectors(catalog: Catalog, dimensions: int) -> np.ndarray:
    """Unit rows, float32 [N, dimensions]: the SVD of the items' TF-IDF rows; zero for an item without words."""
    real = np.zeros(0, np.float32)
    nothing = Sequences([], np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0), real, real)
    matrix = Content().fit(nothing, catalog).matrix
    return unit(truncated(matrix, dimensions, power=1.0))


def behaviour_vectors(train: Sequences, items: int, dimensions: int, window: int = 5) -> np.ndarray:
    """Unit rows, float32 [items, dimensions]; zero for an item that stands beside no other. d steps apart count 1/d."""
    rows, columns, data = [], [], []
    user, item = train.user_of, train.items
    for step in range(1, window + 1):
        same = (user[step:] == user[:-step]) & (item[step:] != item[:-step])
        a, b = item[:-step][same], item[step:][same]
        rows += [a, b]
        columns += [b, a]
        data += [np.full(2 * len(a), 1 / step)]
    if not rows or not sum(map(len, rows)):
        return np.zeros((items, dimensions), np.float32)
    pairs = (np.concatenate(rows), np.concatenate(columns))
    near = sparse.csr_matrix((np.concatenate(data), pairs), shape=(items, items))
    near.sum_duplicates()
    total = np.asarray(near.sum(axis=1)).ravel()
    found = near.tocoo()
    information = np.log(found.data * total.sum() / (total[found.row] * total[found.col]))
    kept = information > 0
    matrix = sparse.csr_matrix((information[kept], (found.row[kept], found.col[kept])), shape=(items, items))
    return unit(truncated(matrix, dimensions))
