"""A catalogue and sequences that fit on a page, for the tests of the tools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools.ranking.samples import Samples

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


def rated(users: int, events: int, topics: int, per_topic: int, seed: int = 0) -> Samples:
    """Samples with the one label "like" (a b right after its a makes c likely); items are named topic-number."""
    rng = np.random.default_rng(seed)
    rule = np.stack([np.roll(np.arange(topics), 1), np.roll(np.arange(topics), 2)], axis=1)  # (a, b) of each topic
    topic = rng.integers(0, topics, (users, events))
    chained = rng.random((users, events)) < 0.5
    before = np.zeros(topics, np.int64)
    before[rule[:, 1]] = rule[:, 0]  # the a whose b this topic is
    for i in range(1, events):  # half of all b stand after their a
        topic[:, i - 1] = np.where(chained[:, i] & (i % 2 == 1), before[topic[:, i]], topic[:, i - 1])
    met = np.zeros((users, topics), bool)  # of each topic b: whether its newest event stood right after its a
    liked = np.zeros((users, events), bool)
    everyone = np.arange(users)
    for i in range(events):
        now = topic[:, i]
        chance = np.where(met[everyone, rule[now, 1]], 0.9, 0.1)
        liked[:, i] = rng.random(users) < chance
        met[everyone, now] = (topic[:, i - 1] == before[now]) if i else False
    items = topic * per_topic + rng.integers(0, per_topic, topic.shape)
    names = [f"{t}-{k}" for t in range(topics) for k in range(per_topic)]
    kinds = pa.array([[f"topic {n.split('-')[0]}"] for n in names], pa.list_(pa.string()))
    sequences = Sequences(
        [f"u{u}" for u in everyone],
        np.arange(users + 1, dtype=np.int64) * events,
        items.ravel().astype(np.int32),
        (1e9 + np.arange(events)[None] * 600.0 + everyone[:, None]).ravel(),
        np.ones(users * events, np.float32),
        liked.ravel().astype(np.float32) * 4 + 1,
    )
    catalog = Catalog(pa.table({"item": names, "title": [f"Item {n}" for n in names], "category": kinds}))
    return Samples("rated", catalog, sequences, liked.reshape(-1, 1).astype(np.float32), ("like",))
