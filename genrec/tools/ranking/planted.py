"""A stream with planted second-order structure, where depth is needed and one can see whether a ranker has it.

Items belong to topics; topic c has a rule (a, b). An item of c is liked with probability HIGH if the user's newest
event of topic b stands right after one of topic a, else with LOW: A then B makes C likely. Half of the b stand after
their a. How often, how recently and how liked a and b were says little: one layer of target attention sees which events
there were and how far back. That b stood after a is a fact about a pair in the past, which only a state made when b was
scored can hold.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.ranking.samples import Samples

HIGH, LOW = 0.9, 0.1


def planted(users: int = 200, events: int = 120, topics: int = 6, per_topic: int = 10, seed: int = 0) -> Samples:
    """Samples with the one label "like"; items are named topic-number."""
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
        chance = np.where(met[everyone, rule[now, 1]], HIGH, LOW)
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
    return Samples("planted", catalog, sequences, liked.reshape(-1, 1).astype(np.float32), ("like",))
