"""A world in which EBR has something to learn: items of four kinds, users who stay with one and walk through it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genrec.data.dataset import Catalog, Sequences

KINDS = ("tea", "bread", "cheese", "soap")
PER_KIND = 8
SMALL = {"clusters": 4, "width": 16, "content": 8, "layers": 1, "rows": 64, "negatives": 6, "dropout": 0.0}
SMALL |= {"learning_rate": 0.01}


def world_catalog(per_kind: int = PER_KIND) -> Catalog:
    titles = [f"{kind} number {i}" for kind in KINDS for i in range(per_kind)]
    table = {"item": [f"i{n}" for n in range(len(titles))], "title": titles}
    kinds = pa.array([[t.split()[0].title()] for t in titles], type=pa.list_(pa.string()))
    return Catalog(pa.table(table | {"category": kinds}))


def world_sequences(users: int = 60, length: int = 7, seed: int = 0) -> Sequences:
    """User u stays with kind u % 4 and goes from an item to the next one; days pass evenly for all users."""
    rng = np.random.default_rng(seed)
    rows, times = [], []
    for u in range(users):
        start, kind = rng.integers(PER_KIND), u % len(KINDS)
        rows += [kind * PER_KIND + (start + i) % PER_KIND for i in range(length)]
        times += [86400.0 * (10 * i + u / users) for i in range(length)]
    n = users * length
    offsets = np.arange(0, n + 1, length)
    ones, none = np.ones(n, np.float32), np.full(n, np.nan, np.float32)
    return Sequences([f"u{u}" for u in range(users)], offsets, np.array(rows, np.int32), np.array(times), ones, none)
