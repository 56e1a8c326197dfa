"""A stream with planted second-order structure, where depth is needed and one can see whether a ranker has it.

Every group of topics has a first and another first, a second and another second, and a third. Events come in rounds: a
block of four, in which each of the two firsts of a group is followed at once by one of its two seconds, then NOISE
events of no group, then THIRDS events of thirds, each of a group drawn evenly. Either the second follows the first and
the other second the other first, or they cross; a coin decides anew for every block, and another which of the two pairs
comes first. Labels, each as said with probability HIGH:

- follows, of a second: its own first stands right before it. First order: one layer of attention can tell.
- like, the main one, of a third: in the newest block of its group the second followed its own first. A then B makes C
  likely; A' then B does not.

Each of the four comes once in a block, and as often first as third, or second as fourth, whatever the label: only which
stands right before which says it. A state that was made when the second was scored holds that, as its own label asks
for it; a third that reads such states needs two layers. One layer sees what there was, and how far back in few steps. A
round is made so that no step of genrec.tools.ranking.attention (at 8, 16, 32 and 64 events) falls between the pairs of
a block that a third looks back to, nor does the end of a history of whole rounds; else it would tell the order.

`Asked` is the task over such samples: rankers are not told what was said of past events, as the second's own label
would tell them all; and thirds of validation and test ask only about blocks of their own part, as a user's vector
learns in training what was said of the block before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.ranking.samples import TRAIN, Samples
from genrec.tools.ranking.task import Task

HIGH = 0.95
NOISE, THIRDS = 7, 3
ROUND = 4 + NOISE + THIRDS
KINDS = ("first", "other-first", "second", "other-second", "third")
THIRD = KINDS.index("third")


class Asked(Task):
    """See the module."""

    @classmethod
    def make(cls, samples: Samples, split: str = "per-user") -> Self:
        task = super().make(samples, split)
        labels, names = samples.labels.copy(), samples.catalog.items
        kinds = [name.split("-")[:-1] for name in names]  # such as ["other", "second", "0"]
        newest: dict[tuple[int, str], int] = {}  # user and group -> position of the newest second
        for at, (user, item) in enumerate(
            zip(samples.sequences.user_of.tolist(), samples.sequences.items.tolist(), strict=True)
        ):
            *_, kind, group = ["", *kinds[item]]
            if kind == "second":
                newest[user, group] = at
            elif kind == "third" and task.part[at] != TRAIN:
                block = newest.get((user, group))
                if block is None or task.part[block] != task.part[at]:
                    labels[at, 0] = np.nan
        return cls(replace(samples, labels=labels), task.part)

    @cached_property
    def feedback(self) -> np.ndarray:
        return np.zeros_like(super().feedback)

    @cached_property
    def dense(self) -> np.ndarray:
        return np.zeros_like(super().dense)


def planted(users: int = 200, events: int = 140, groups: int = 2, per_topic: int = 2, seed: int = 0) -> Samples:
    """Samples with the labels "like" and "follows", NaN where an event has none; items are named kind, group and
    number. users * events exposures, whose rounds begin anywhere."""
    rng = np.random.default_rng(seed)
    noise, kinds = groups * len(KINDS), len(KINDS)
    names = [f"{kind}-{g}" for g in range(groups) for kind in KINDS] + ["noise"]
    topic = np.full((users, events), noise)
    labels = np.full((users, events, 2), np.nan, np.float32)
    for u in range(users):
        straight = np.full(groups, -1)  # of each group's newest block: 1, 0 crossed, -1 none yet
        for start in range(-int(rng.integers(ROUND)), events, ROUND):
            g, said = rng.integers(groups), rng.integers(2)
            straight[g] = said if start >= 0 else -1  # a block that is cut off shows nothing
            pairs = [(first, first if said else 1 - first) for first in rng.permutation(2).tolist()]
            block = [(g, kind, said) for first, second in pairs for kind in (first, 2 + second)]
            thirds = [(h, THIRD, straight[h]) for h in rng.integers(groups, size=THIRDS).tolist()]
            for place, (h, kind, truth) in enumerate([*block, *[(0, -1, -1)] * NOISE, *thirds], start):
                if not 0 <= place < events or kind < 0:
                    continue
                topic[u, place] = h * kinds + kind
                if kind >= 2 and truth >= 0 and start >= 0:
                    labels[u, place, 0 if kind == THIRD else 1] = truth == (rng.random() < HIGH)
    items = topic * per_topic + rng.integers(0, per_topic, topic.shape)
    sequences = Sequences(
        [f"u{u}" for u in range(users)],
        np.arange(users + 1, dtype=np.int64) * events,
        items.ravel().astype(np.int32),
        (1e9 + np.arange(events)[None] * 600.0 + np.arange(users)[:, None]).ravel(),
        np.ones(users * events, np.float32),
        np.full(users * events, np.nan, np.float32),
    )
    titles = [f"{name}-{k}" for name in names for k in range(per_topic)]
    categories = pa.array([[name] for name in names for _ in range(per_topic)], pa.list_(pa.string()))
    catalog = Catalog(pa.table({"item": titles, "title": titles, "category": categories}))
    return Samples("planted", catalog, sequences, labels.reshape(-1, 2), ("like", "follows"))
