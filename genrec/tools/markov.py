"""Directed Markov: what people chose in the next few steps after this item, counted over training sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import ItemToItem


@dataclass(frozen=True)
class MarkovConfig:
    """recency: weight per doubling of the steps back from the newest event. window: how many steps ahead a
    transition reaches; d steps ahead count 1 / d. damping: 0 takes the counts as they are, 1 makes them probabilities,
    between is between. neighbours: weights kept per item."""

    recency: float = 0.45
    window: int = 3
    damping: float = 0.5
    neighbours: int = 400


class Markov(ItemToItem):
    """Weight of i -> j: weighted count of "j up to `window` steps after i", over (count of i) ** damping."""

    name = "markov"
    sentence = "Soon after {seen}, people went on to {found}."
    config_type = MarkovConfig
    fade = "doubling"
    config: MarkovConfig

    def item_weights(self, train: Sequences, catalog: Catalog) -> sparse.csr_matrix:
        n = len(catalog)
        user, items, weights = train.user_of, train.items, train.weights
        rows, columns, data = [], [], []
        for step in range(1, self.config.window + 1):
            same = user[step:] == user[:-step]
            rows.append(items[:-step][same])
            columns.append(items[step:][same])
            data.append((weights[:-step] * weights[step:])[same] / step)
        i, j, v = np.concatenate(rows), np.concatenate(columns), np.concatenate(data)
        counts = np.bincount(items, weights=weights, minlength=n)
        move = i != j
        m = sparse.csr_matrix((v[move], (i[move], j[move])), shape=(n, n), dtype=np.float32)
        m.sum_duplicates()
        scale = sparse.diags(1.0 / np.maximum(counts, 1.0) ** self.config.damping)
        return (scale @ m).tocsr().astype(np.float32)
