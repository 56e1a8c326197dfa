"""Semantic IDs: residual k-means codes of an item's embedding, unique within the catalogue.

Source: RQ-KMeans as in OneRec and OxygenREC (2512.22386, section on semantic IDs; 3 levels there, 8192
codes each). The papers do not disclose how collisions are resolved.

Our policy, *unique by assignment*: levels 1..L-1 take the nearest centroid of the residual. Items that
share those codes form a group, and the last level gives each of them a different code, chosen together so
that the summed distance to the last codebook is smallest (Hungarian assignment). An ID therefore never
needs an extra disambiguating digit.

*Overflow*: with K codes a level, at most K ** (levels below) items fit under a prefix. Where more are near it, as
with thousands of equal titles, the nearest stay (equally near ones: the lower row) and each of the others takes, at
that level, the nearest code that still has room below it, so it keeps the codes before. Only a catalogue of more than
K ** L items cannot be told apart, an error that names the cure. A new item walks down the same way, to the nearest
code with room at every level; existing IDs never change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from genrec.errors import GenrecError
from genrec.io import atomic, read_json, write_json
from genrec.tokenizer.trie import Trie

FORMAT = 1


@dataclass(frozen=True)
class TokenizerConfig:
    """levels: codes per ID (the paper has 3). codes: codebook size per level (the paper has 8192; a
    catalogue of some thousand items needs far fewer). iterations: k-means rounds. seed: k-means start."""

    levels: int = 3
    codes: int = 128
    iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise GenrecError(f"levels is {self.levels}; a semantic ID needs at least 2")
        if self.codes < 2:
            raise GenrecError(f"codes is {self.codes}; a codebook needs at least 2")


@dataclass(frozen=True)
class SemanticIDs:
    """codes: int32 [N, L]; codebooks: float32 [L, K, D]."""

    codes: np.ndarray
    codebooks: np.ndarray
    config: TokenizerConfig

    @classmethod
    def fit(cls, embeddings: np.ndarray, config: TokenizerConfig) -> SemanticIDs:
        """Codebooks and IDs for item embeddings, float [N, D]. Deterministic for a given config and machine."""
        import faiss

        residual = np.array(embeddings, np.float32, order="C")
        n = len(residual)
        if n == 0:
            raise GenrecError("the catalogue is empty: there is nothing to give semantic IDs to")
        if not np.isfinite(residual).all():
            bad = int(np.flatnonzero(~np.isfinite(residual).all(1))[0])
            raise GenrecError(f"the embedding of catalogue row {bad} holds NaN or infinity")
        k = min(config.codes, n)
        if n > k**config.levels:
            raise GenrecError(_too_many(n, k, config.levels))
        codes = np.zeros((n, config.levels), np.int32)
        books = np.zeros((config.levels, k, residual.shape[1]), np.float32)
        for level in range(config.levels):
            kmeans = faiss.Kmeans(
                residual.shape[1], k, niter=config.iterations, seed=config.seed + level, min_points_per_centroid=1
            )
            kmeans.train(residual)
            books[level] = kmeans.centroids
            if level < config.levels - 1:
                codes[:, level] = kmeans.index.search(residual, 1)[1][:, 0]
                _spread(codes[:, : level + 1], residual, books[level], k ** (config.levels - 1 - level))
                residual -= books[level][codes[:, level]]
        codes[:, -1] = _assign_last(codes[:, :-1], residual, books[-1])
        return cls(codes, books, config)

    @cached_property
    def trie(self) -> Trie:
        return Trie.build(self.codes)

    def reconstruct(self) -> np.ndarray:
        """The embedding that each ID stands for, the sum of its codewords: float32 [N, D]."""
        parts = [book[codes] for book, codes in zip(self.codebooks, self.codes.T, strict=True)]
        return np.sum(parts, axis=0)

    def extend(self, embeddings: np.ndarray) -> SemanticIDs:
        """IDs for new items [M, D] after the existing ones, which keep theirs. No retraining."""
        levels, k = self.codes.shape[1], self.codebooks.shape[1]
        taken: Counter[tuple[int, ...]] = Counter()  # items below each prefix
        for row in self.codes.tolist():
            taken.update(tuple(row[:length]) for length in range(levels + 1))
        new = np.zeros((len(embeddings), levels), np.int32)
        for i, vector in enumerate(np.array(embeddings, np.float32)):
            if taken[()] == k**levels:
                raise GenrecError(_too_many(taken[()] + 1, k, levels))
            residual = vector
            prefix: tuple[int, ...] = ()
            taken[prefix] += 1
            for level, book in enumerate(self.codebooks):
                nearest = np.argsort(_distances(residual[None], book)[0], kind="stable").tolist()
                prefix = (*prefix, next(c for c in nearest if taken[*prefix, c] < k ** (levels - 1 - level)))
                taken[prefix] += 1
                residual = residual - book[prefix[-1]]
            new[i] = prefix
        return SemanticIDs(np.concatenate([self.codes, new]), self.codebooks, self.config)

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        with atomic(folder / "semantic_ids.safetensors") as path:
            save_file({"codes": self.codes, "codebooks": self.codebooks}, path)
        write_json(folder / "tokenizer.json", {"format": FORMAT, **asdict(self.config)})

    @classmethod
    def load(cls, folder: Path) -> SemanticIDs:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        meta = read_json(folder / "tokenizer.json")
        if meta.pop("format", None) != FORMAT:
            raise GenrecError(f"{folder / 'tokenizer.json'} is of another format than {FORMAT}; fit the bundle again")
        try:
            arrays = load_file(folder / "semantic_ids.safetensors")
        except (OSError, SafetensorError) as error:
            raise GenrecError(f"{folder / 'semantic_ids.safetensors'} cannot be read ({error})") from None
        return cls(arrays["codes"], arrays["codebooks"], TokenizerConfig(**meta))


def _distances(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Squared distances [n, K], up to a constant per row."""
    return (book**2).sum(1)[None] - 2 * x @ book.T


def _too_many(items: int, codes: int, levels: int) -> str:
    return (
        f"{items:,} items cannot have different semantic IDs of {levels} levels with {codes} codes each "
        f"({codes**levels:,} IDs); use more codes or one more level"
    )


def _groups(prefixes: np.ndarray) -> Iterator[np.ndarray]:
    """The rows that share each prefix, ascending. prefixes: int [N, P]; without any code (P = 0) all share it."""
    _, group = np.unique(prefixes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    bounds = np.flatnonzero(np.diff(group[order], prepend=-1, append=group.max() + 1))
    for start, end in pairwise(bounds):
        yield order[start:end]


def _spread(codes: np.ndarray, residual: np.ndarray, book: np.ndarray, room: int) -> None:
    """Moves items out of overfull prefixes: changes the last column of codes [N, P] in place so that no prefix has
    more than `room` items; see the module's policy."""
    if max(len(rows) for rows in _groups(codes)) <= room:
        return
    for rows in _groups(codes[:, :-1]):
        held = np.bincount(codes[rows, -1], minlength=len(book))
        moved: list[np.ndarray] = []
        for code in np.flatnonzero(held > room):
            there = rows[codes[rows, -1] == code]
            near = np.argsort(((residual[there] - book[code]) ** 2).sum(1), kind="stable")
            moved.append(there[near[room:]])
            held[code] = room
        for row in np.concatenate(moved) if moved else ():
            nearest = np.argsort(_distances(residual[row : row + 1], book)[0], kind="stable")
            code = nearest[(held < room)[nearest].argmax()]
            codes[row, -1] = code
            held[code] += 1


def _assign_last(prefixes: np.ndarray, residual: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Different last codes for the items of each prefix, at most one per code, nearest overall: int32 [N]."""
    from scipy.optimize import linear_sum_assignment

    last = np.zeros(len(prefixes), np.int32)
    for rows in _groups(prefixes):
        who, which = linear_sum_assignment(_distances(residual[rows], book))
        last[rows[who]] = which
    return last
