"""Popularity: how many training users have the item. The lowest floor, and the answer to an empty history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import Tool, interaction_matrix, short_title


@dataclass(frozen=True)
class PopularityConfig:
    """Nothing to choose."""


class Popularity(Tool):
    """Score = sum over users of the weight of their event with the item; the same for every context."""

    name = "popularity"
    sentence = "Many people chose {found}."
    config_type = PopularityConfig
    counts: np.ndarray

    def fit(self, train: Sequences, catalog: Catalog) -> Self:
        self.titles = [short_title(t) for t in catalog.titles]
        self.counts = np.asarray(interaction_matrix(train, len(catalog)).sum(axis=0), dtype=np.float32).ravel()
        return self

    def score_all(self, contexts: list[UserContext]) -> np.ndarray:
        """float32 [B, N], one row for all."""
        return np.tile(self.counts, (len(contexts), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.counts = arrays["counts"]
