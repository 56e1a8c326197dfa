"""Semantic IDs: residual k-means codes of an item's embedding, unique within the catalogue.

Source: RQ-KMeans as in OneRec and OxygenREC (2512.22386, section on semantic IDs; 3 levels there, 8192
codes each). The papers do not disclose how collisions are resolved.

Our policy, *unique by assignment*: levels 1..L-1 take the nearest centroid of the residual. Items that
share those codes form a group, and the last level gives each of them a different code, chosen together so
that the summed distance to the last codebook is smallest (Hungarian assignment). An ID therefore never
needs an extra disambiguating digit. A group larger than the codebook is an error that names the cure.
A new item takes the free code nearest to its residual; existing IDs never change.
"""

from __future__ import annotations

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
        residual = np.array(embeddings, np.float32)
        new = np.zeros((len(residual), self.codes.shape[1]), np.int32)
        for level, book in enumerate(self.codebooks[:-1]):
            new[:, level] = _distances(residual, book).argmin(1)
            residual -= book[new[:, level]]
        taken: dict[tuple[int, ...], set[int]] = {}
        for row in self.codes:
            taken.setdefault(tuple(row[:-1]), set()).add(int(row[-1]))
        distance = _distances(residual, self.codebooks[-1])
        for i, prefix in enumerate(map(tuple, new[:, :-1])):
            used = taken.setdefault(prefix, set())
            free = [int(c) for c in np.argsort(distance[i], kind="stable") if int(c) not in used]
            if not free:
                raise GenrecError(_group_too_large(prefix, len(used) + 1, self.codebooks.shape[1]))
            new[i, -1] = free[0]
            used.add(free[0])
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


def _group_too_large(prefix: tuple[int, ...], size: int, codes: int) -> str:
    return (
        f"{size} items share the semantic-ID prefix {tuple(int(c) for c in prefix)}, more than the {codes} codes of "
        f"the last level; use more codes or one more level"
    )


def _assign_last(prefixes: np.ndarray, residual: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Different last codes for the items of each prefix, nearest overall: int32 [N]."""
    from scipy.optimize import linear_sum_assignment

    _, group = np.unique(prefixes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    bounds = np.flatnonzero(np.diff(group[order], prepend=-1, append=group.max() + 1))
    last = np.zeros(len(prefixes), np.int32)
    for start, end in pairwise(bounds):
        rows = order[start:end]
        if len(rows) > len(book):
            raise GenrecError(_group_too_large(tuple(prefixes[rows[0]]), len(rows), len(book)))
        who, which = linear_sum_assignment(_distances(residual[rows], book))
        last[rows[who]] = which
    return last
