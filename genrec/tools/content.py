"""Content: TF-IDF over title, the further text fields and the category path; works for items that nobody chose yet."""

from __future__ import annotations

import itertools
import json
import re
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
    """recency: weight per step back from the newest event. smallest_df: a term must occur in so many items.
    query: weight of the request's query, where there is one, beside the newest event's 1."""

    recency: float = 0.6
    smallest_df: int = 2
    query: float = 2.0


def terms(text: str) -> list[str]:
    """The lower-case words of a text and its pairs of neighbouring words."""
    words = WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


class Content(Tool):
    """Score = cosine-like similarity of TF-IDF rows: (history [B, N] @ T [N, V] + query) @ T'."""

    name = "content"
    sentence = "Like {seen} in words and category: {found}."
    config_type = ContentConfig
    config: ContentConfig
    vocabulary: dict[str, int]
    idf: np.ndarray
    matrix: sparse.csr_matrix

    def fit(self, train: Sequences, catalog: Catalog) -> Self:
        self.titles = [short_title(t) for t in catalog.titles]
        documents = [terms(text) for text in catalog.texts]
        df: dict[str, int] = {}
        for document in documents:
            for term in set(document):
                df[term] = df.get(term, 0) + 1
        kept = sorted(t for t, n in df.items() if n >= self.config.smallest_df)
        self.vocabulary = {term: v for v, term in enumerate(kept)}
        n = len(documents)
        self.idf = np.array([np.log((1 + n) / (1 + df[t])) + 1 for t in kept], dtype=np.float32)
        self.matrix = self._rows(documents)
        return self

    def _rows(self, documents: list[list[str]]) -> sparse.csr_matrix:
        """TF-IDF rows of unit length, float32 [len(documents), V]; all zero without a known term."""
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
            profile = profile + self.config.query * self._rows([terms(c.query or "") for c in contexts])
        scores = self.matrix @ profile.T.toarray()  # [N, B]: sparse times dense, the fastest order here
        return np.ascontiguousarray(scores.T, dtype=np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        words = json.dumps(list(self.vocabulary), ensure_ascii=False).encode("utf-8")
        m = self.matrix
        return {
            "data": m.data,
            "indices": m.indices.astype(np.int32),
            "indptr": m.indptr.astype(np.int64),
            "idf": self.idf,
            "vocabulary": np.frombuffer(words, dtype=np.uint8),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        words = json.loads(arrays["vocabulary"].tobytes().decode("utf-8"))
        self.vocabulary = {term: v for v, term in enumerate(words)}
        self.idf = arrays["idf"]
        shape = (len(arrays["indptr"]) - 1, len(words))
        self.matrix = sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
