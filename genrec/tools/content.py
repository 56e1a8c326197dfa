"""Content: TF-IDF over the words of title, fields and category path; works for items that nobody chose yet.

A request's query, where there is one, is looked up like an item, so the tool is also the floor of the search scenario.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import Tool, history_matrix, short_title

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class ContentConfig:
    """recency: weight per step back from the newest event. query: weight of the request's query, where the newest
    event has 1."""

    recency: float = 0.7
    query: float = 2.0


def words(text: str) -> list[str]:
    """The lower-case words of a text, in order; digits count as letters."""
    return WORD.findall(text.lower())


class Content(Tool):
    """Score = (history [B, N] @ T [N, V] + query) @ T', with T the items' TF-IDF rows of unit length.

    A word that stands c times has the value (1 + log c) x (log((1 + N) / (1 + items with it)) + 1).
    """

    name = "content"
    sentence = "Like {seen} in words and category: {found}."
    config_type = ContentConfig
    config: ContentConfig
    vocabulary: dict[str, int]
    idf: np.ndarray
    matrix: sparse.csr_matrix

    def fit(self, train: Sequences, catalog: Catalog) -> Self:
        self.titles = [short_title(t) for t in catalog.titles]
        documents = [words(text) for text in catalog.texts]
        held = Counter(word for document in documents for word in set(document))
        self.vocabulary = {word: v for v, word in enumerate(sorted(held))}
        share = (1 + len(documents)) / (1 + np.array([held[word] for word in self.vocabulary], dtype=np.float64))
        self.idf = (np.log(share) + 1).astype(np.float32)
        self.matrix = self._rows(documents)
        return self

    def _rows(self, documents: list[list[str]]) -> sparse.csr_matrix:
        """TF-IDF rows of unit length, float32 [len(documents), V]; all zero without a known word."""
        known = [[self.vocabulary[t] for t in d if t in self.vocabulary] for d in documents]
        indptr = np.concatenate([[0], np.cumsum([len(k) for k in known])]).astype(np.int64)
        indices = np.array([v for k in known for v in k], dtype=np.int64)
        m = sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), (len(known), len(self.idf)))
        m.sum_duplicates()
        m.data = (1 + np.log(m.data)) * self.idf[m.indices]
        norms = np.sqrt(np.asarray(m.multiply(m).sum(axis=1)).ravel())
        return (sparse.diags(1 / np.maximum(norms, 1e-12)) @ m).tocsr().astype(np.float32)

    def score_all(self, contexts: list[UserContext]) -> np.ndarray:
        """float32 [B, N]; all zero for an empty history without a query."""
        profile = history_matrix(contexts, self.matrix.shape[0], self.config.recency) @ self.matrix
        if any(c.query for c in contexts):
            profile = profile + self.config.query * self._rows([words(c.query or "") for c in contexts])
        scores = self.matrix @ profile.T.toarray()  # [N, B]: sparse times dense, the fastest order here
        return np.ascontiguousarray(scores.T, dtype=np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        m = self.matrix
        return {
            "data": m.data,
            "indices": m.indices.astype(np.int32),
            "indptr": m.indptr.astype(np.int64),
            "idf": self.idf,
            "vocabulary": np.frombuffer("\n".join(self.vocabulary).encode("utf-8"), dtype=np.uint8),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        known = arrays["vocabulary"].tobytes().decode("utf-8").split("\n")  # a word holds no line break
        self.vocabulary = {word: v for v, word in enumerate(known)}
        self.idf = arrays["idf"]
        shape = (len(arrays["indptr"]) - 1, len(self.idf))
        self.matrix = sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
