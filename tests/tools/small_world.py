"""A catalogue and sequences that fit on a page, for the tests of the tools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences

TITLES = ["Green tea", "Black tea", "Rye bread", "Wheat bread", "Goat cheese", "Blue cheese"]


def catalog(titles: list[str] = TITLES) -> Catalog:
    kinds = [[t.split()[-1].title()] if t.split() else [] for t in titles]
    table = pa.table(
        {
            "item": [f"i{n}" for n in range(len(titles))],
            "title": titles,
            "category": pa.array(kinds, type=pa.list_(pa.string())),
            "brand": ["Acme" if n % 2 else None for n in range(len(titles))],
        }
    )
    return Catalog(table, ("brand",))


def sequences(*histories: list[int], weights: list[list[float]] | None = None) -> Sequences:
    items = np.array([i for h in histories for i in h], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64)
    flat = [w for ws in weights for w in ws] if weights else [1.0] * len(items)
    return Sequences(
        [f"u{n}" for n in range(len(histories))],
        offsets,
        items,
        np.arange(len(items), dtype=np.float64),
        np.array(flat, dtype=np.float32),
        np.full(len(items), np.nan, dtype=np.float32),
    )


def contexts(*histories: list[int]) -> list[UserContext]:
    return [UserContext(history=tuple(h)) for h in histories]


TRAIN = sequences([0, 1, 2], [1, 0, 3], [2, 3, 4], [4, 5], [0, 2, 5], [3])
