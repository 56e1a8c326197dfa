"""Item-kNN: people who chose this also chose that, by cosine over training users (Sarwar et al. 2001)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import ItemToItem, interaction_matrix


@dataclass(frozen=True)
class ItemKNNConfig:
    """recency: weight per step back from the newest event. neighbours: weights kept per item.
    shrink: added to the cosine's denominator, so that pairs with few users count less."""

    recency: float = 0.65
    neighbours: int = 400
    shrink: float = 10.0


class ItemKNN(ItemToItem):
    """Weight of i -> j: co-occurrences / (norm of i x norm of j + shrink); the diagonal is zero."""

    name = "itemknn"
    sentence = "People who chose {seen} also chose {found}."
    config_type = ItemKNNConfig
    config: ItemKNNConfig

    def item_weights(self, train: Sequences, catalog: Catalog) -> sparse.csr_matrix:
        x = interaction_matrix(train, len(catalog))
        together = (x.T @ x).tocoo()
        norms = np.sqrt(together.diagonal())
        off = together.row != together.col
        rows, columns = together.row[off], together.col[off]
        data = together.data[off] / (norms[rows] * norms[columns] + self.config.shrink)
        return sparse.csr_matrix((data, (rows, columns)), shape=together.shape, dtype=np.float32)
