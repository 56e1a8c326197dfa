"""Who judges a training position: rankers, tastes and ratings fitted on other users than the one who is judged.

A reward that was fitted on the position it is given at would be the answer in disguise. So users are dealt into folds,
as for teaching (genrec.generator.teacher), and what judges a fold's requests is fitted on the others. Requests of the
validation and the test may be judged by one fitted on all training events, which hold no event that they want.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse
from scipy.sparse.linalg import svds

from genrec.alignment.rewards import RewardContext
from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.data.scenarios import favourite_from, tail_items
from genrec.errors import GenrecError
from genrec.io import atomic
from genrec.tokenizer.trie import Trie
from genrec.tools import Tool
from genrec.tools.base import interaction_matrix
from genrec.tools.fusion import standardise

if TYPE_CHECKING:
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM

FOLDS = 4
TASTE = 64  # dimensions of the space of who chose what
DOUBT = 10.0  # ratings at the mean that every item starts with
Fusion = Callable[[str], Mapping[str, float]]  # scenario -> weights of the tools


def folds_of(train: Sequences, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
    """int64 [U]: the fold of every user, equally many in each; 0 .. folds - 1. Raises GenrecError for fewer users."""
    if len(train) < folds:
        raise GenrecError(f"{len(train)} users cannot be judged by others in {folds} folds; alignment needs more users")
    return np.random.default_rng(seed).permutation(len(train)) % folds


def taste_vectors(train: Sequences, items: int, width: int = TASTE) -> np.ndarray:
    """float32 [N, width], unit vectors of a truncated singular value decomposition of users by items, each item's
    column scaled to length 1 first; zeros for an item without events."""
    x = interaction_matrix(train, items)
    scale = np.sqrt(np.asarray(x.multiply(x).sum(0)).ravel())
    x = sparse.csr_matrix(x @ sparse.diags(1 / np.maximum(scale, 1e-9)))
    k = min(width, min(x.shape) - 1)
    out: np.ndarray = np.zeros((items, width), np.float32)
    if k < 1 or not x.nnz:
        return out
    _, values, vectors = svds(x, k=k, v0=np.ones(min(x.shape)))
    out[:, :k] = vectors.T * values
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.where(norms > 1e-6, out / np.maximum(norms, 1e-6), 0.0).astype(np.float32)


def satisfactions(train: Sequences, items: int) -> np.ndarray:
    """float32 [N]: the share of an item's ratings that make it a favourite, drawn to the mean as by DOUBT ratings;
    zeros where nothing is rated."""
    rated = ~np.isnan(train.ratings)
    if not rated.any():
        return np.zeros(items, np.float32)
    liked = train.ratings[rated] >= favourite_from(train)
    count = np.bincount(train.items[rated], minlength=items)
    good = np.bincount(train.items[rated], weights=liked, minlength=items)
    return ((good + DOUBT * liked.mean()) / (count + DOUBT)).astype(np.float32)


@dataclass(frozen=True)
class Judge:
    """What was fitted on some users: tools by name, taste float32 [N, K], satisfaction float32 [N]; ranker: it says how
    satisfied one user will be; None where the item alone says it."""

    tools: dict[str, Tool]
    taste: np.ndarray
    satisfaction: np.ndarray
    ranker: MARM | SARM | None = None

    @classmethod
    def fit(
        cls,
        train: Sequences,
        catalog: Catalog,
        tools: Mapping[str, type[Tool]],
        ranker: MARM | SARM | None = None,
    ) -> Judge:
        """ranker: fitted on the same users, as `genrec.tools.rankers.train_ranker` does with `apart`."""
        fitted = {name: tool().fit(train, catalog) for name, tool in tools.items()}
        return cls(fitted, taste_vectors(train, len(catalog)), satisfactions(train, len(catalog)), ranker)

    def save(self, folder: Path) -> None:
        """Each tool in a folder of its own; judge.safetensors last."""
        for name, tool in self.tools.items():
            tool.save(folder / name)
        if self.ranker is not None:
            self.ranker.save(folder / "ranker")
        with atomic(folder / "judge.safetensors") as path:
            save_file({"taste": self.taste, "satisfaction": self.satisfaction}, path)

    @classmethod
    def load(cls, folder: Path, tools: Mapping[str, type[Tool]]) -> Judge:
        from genrec.tools.rankers import open_tool

        found = load_file(folder / "judge.safetensors")
        ranker = open_tool(folder / "ranker") if (folder / "ranker").is_dir() else None
        return cls({n: t.load(folder / n) for n, t in tools.items()}, found["taste"], found["satisfaction"], ranker)

    def scores(self, contexts: Sequence[UserContext], fusion: Fusion) -> np.ndarray:
        """The ranker: standardised scores of the tools, weighted by the fusion of each request's scenario, [B, N]."""
        total: np.ndarray = np.zeros((len(contexts), len(self.taste)), np.float32)
        for name, tool in self.tools.items():
            weight = np.array([fusion(c.scenario).get(name, 0.0) for c in contexts], np.float32)
            heard = np.flatnonzero(weight)
            if len(heard):
                scores = standardise(tool.score_all([contexts[i] for i in heard]))
                total[heard] += weight[heard, None] * scores
        return total


@dataclass(frozen=True)
class Bench:
    """The judges of all folds over one catalogue. text: float32 unit vectors [N, D]; fusion: the tools' weights."""

    judges: tuple[Judge, ...]
    trie: Trie
    text: np.ndarray
    fusion: Fusion
    tail: np.ndarray

    @classmethod
    def of(cls, judges: Sequence[Judge], trie: Trie, embeddings: np.ndarray, fusion: Fusion, train: Sequences) -> Bench:
        """embeddings: float [N, D] of any length; train: what decides head and tail."""
        text = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
        return cls(tuple(judges), trie, text.astype(np.float32), fusion, tail_items(train, len(embeddings)))

    @cached_property
    def taste(self) -> np.ndarray:
        return np.stack([j.taste for j in self.judges])

    @cached_property
    def satisfaction(self) -> np.ndarray:
        return np.stack([j.satisfaction for j in self.judges])

    def context(
        self,
        contexts: Sequence[UserContext],
        targets: np.ndarray,
        fold: np.ndarray,
        allowed: np.ndarray,
        queries: np.ndarray | None = None,
    ) -> RewardContext:
        """What B requests are judged by. targets: int rows [B]; fold: int [B], whose judge; allowed: bool [B, N];
        queries: float [B, D], NaN rows for none."""
        scores: np.ndarray = np.zeros(allowed.shape, np.float32)
        for f in np.unique(fold):
            mine = np.flatnonzero(fold == f)
            scores[mine] = self.judges[f].scores([contexts[i] for i in mine], self.fusion)
        if queries is None:
            queries = np.full((len(contexts), self.text.shape[1]), np.nan, np.float32)
        return RewardContext(
            [c.scenario for c in contexts],
            np.asarray(targets, np.int64),
            allowed,
            self.trie.path.numpy(),
            self.text,
            self.taste,
            self.satisfaction,
            np.asarray(fold, np.int64),
            scores,
            self.tail,
            queries,
            np.array([-1 if c.trigger is None else c.trigger for c in contexts], np.int64),
            None if self.judges[0].ranker is None else partial(self._liked, contexts, np.asarray(fold)),
        )

    def _liked(self, contexts: Sequence[UserContext], fold: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The chance that each request's user likes rows [B, G], by the ranker of its fold, float32; 0 at -1."""
        out: np.ndarray = np.zeros(rows.shape, np.float32)
        for f in np.unique(fold):
            mine, ranker = np.flatnonzero(fold == f), self.judges[f].ranker
            assert ranker is not None  # all judges have one, or none
            scores = ranker.score([contexts[i] for i in mine], rows[mine])
            out[mine] = np.where(np.isfinite(scores), scores, 0)
        return out
