"""EASE: the linear item-to-item model with a closed form (Steck 2019, "Embarrassingly Shallow Autoencoders").

B = I - P / diag(P) with P = (X'X + lambda I)^-1 and a zero diagonal; X is users by items. The inverse is a dense
float32 Cholesky, so memory is 4 bytes x items^2 (0.6 GB for 12,000 items) and time grows with items^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import lapack

from genrec.data.dataset import Catalog, Sequences
from genrec.errors import GenrecError
from genrec.tools.base import ItemToItem, interaction_matrix


@dataclass(frozen=True)
class EASEConfig:
    """recency: weight per doubling of the steps back from the newest event. penalty: lambda. neighbours: weights
    kept per item, by magnitude. most_items: in a larger catalogue only the most popular items take part (the others
    score zero)."""

    recency: float = 0.65
    penalty: float = 100.0
    neighbours: int = 200
    most_items: int = 20_000


class EASE(ItemToItem):
    """Weight of i -> j: entry (i, j) of B; negative weights are kept."""

    name = "ease"
    sentence = "A linear model over everybody's histories goes from {seen} to {found}."
    config_type = EASEConfig
    fade = "doubling"
    config: EASEConfig

    def item_weights(self, train: Sequences, catalog: Catalog) -> sparse.csr_matrix:
        x = interaction_matrix(train, len(catalog))
        counts = np.asarray(x.sum(axis=0)).ravel()
        kept = np.sort(np.argsort(-counts, kind="stable")[: self.config.most_items])
        x = x[:, kept]
        dense = ease_weights(x, self.config.penalty)
        small = top_of_dense(dense, self.config.neighbours).tocoo()
        shape = (len(catalog), len(catalog))
        return sparse.csr_matrix((small.data, (kept[small.row], kept[small.col])), shape=shape, dtype=np.float32)


def ease_weights(x: sparse.csr_matrix, penalty: float) -> np.ndarray:
    """B, float32 [N, N], of the interaction matrix x [U, N]. Raises GenrecError when lambda is too small to invert."""
    gram = (x.T @ x).toarray(order="F").astype(np.float32, copy=False)
    gram[np.diag_indices_from(gram)] += np.float32(penalty)
    factor, bad = lapack.spotrf(gram, lower=1, overwrite_a=1)
    if not bad:
        inverse, bad = lapack.spotri(factor, lower=1, overwrite_c=1)
    if bad:
        raise GenrecError(f"EASE cannot invert its matrix with lambda = {penalty}: choose a larger one")
    mirror_lower(inverse)
    inverse /= -np.diag(inverse).copy()[None, :]
    np.fill_diagonal(inverse, 0.0)
    return inverse


def mirror_lower(a: np.ndarray, block: int = 1024) -> None:
    """Copies the lower triangle of a square matrix onto the upper one, in place and in blocks."""
    n = len(a)
    for s in range(0, n, block):
        e = min(s + block, n)
        square = a[s:e, s:e]
        square[:] = np.tril(square) + np.tril(square, -1).T
        a[s:e, e:] = a[e:, s:e].T


def top_of_dense(a: np.ndarray, k: int, block: int = 1024) -> sparse.csr_matrix:
    """The k entries of largest magnitude in every row of a dense matrix, as a sparse one."""
    n = a.shape[1]
    k = min(k, n)
    parts = []
    for s in range(0, len(a), block):
        rows = a[s : s + block]
        best = np.sort(np.argpartition(-np.abs(rows), k - 1, axis=1)[:, :k], axis=1)
        indptr = np.arange(len(rows) + 1) * k
        values = np.take_along_axis(rows, best, axis=1)
        parts.append(sparse.csr_matrix((values.ravel(), best.ravel(), indptr), shape=(len(rows), n)))
    return sparse.vstack(parts, format="csr")
