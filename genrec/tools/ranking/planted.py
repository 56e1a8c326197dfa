"""A stream with planted second-order structure, where depth is needed and one can see whether a ranker has it.

Every group of topics has a first and another first, a second and another second, and a third. Events come in rounds: a
block of four, in which each of the two firsts of a group is followed at once by one of its two seconds, then NOISE
events of no group, then THIRDS events of thirds, each of a group drawn evenly. Either the second follows the first and
the other second the other first, or they cross; a coin decides anew for every block, and another which of the two pairs
comes first. Labels, each as said with probability HIGH:

- follows, of a second: its own first stands right before it. First order: one layer of attention can tell.
- like, the main one, of a third: in the newest block of its group the second followed its own first. A then B makes C
  likely; A' then B does not.

How often, how recently and how near each other the four were says nothing of a block, nor does who the user is: only
which stood before which. A state that was made when the second was scored holds that, as its label asks for it; a third
that reads such states needs two layers. One layer sees what there was and how far back, and distances in few steps
beyond the newest four events: it can tell the order of a block only where a step lies between the two pairs.

Rankers are not told what was said of past events (`Untold`): the second's own label would tell them all.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from genrec.data.dataset import Catalog, Sequences
from genrec.tools.ranking.samples import Samples
from genrec.tools.ranking.task import Task

HIGH = 0.95
NOISE, THIRDS = 4, 4
KINDS = ("first", "other-first", "second", "other-second", "third")
THIRD = KINDS.index("third")


class Untold(Task):
    """A task whose rankers do not learn what was said of past events: feedback and rates are all zero."""

    @cached_property
    def feedback(self) -> np.ndarray:
        return np.zeros_like(super().feedback)

    @cached_property
    def dense(self) -> np.ndarray:
        return np.zeros_like(super().dense)


def planted(users: int = 200, events: int = 120, groups: int = 2, per_topic: int = 2, seed: int = 0) -> Samples:
    """Samples with the labels "like" and "follows", NaN where an event has none; items are named kind, group and
    number. users * events exposures, whose rounds begin anywhere."""
    rng = np.random.default_rng(seed)
    noise, kinds = groups * len(KINDS), len(KINDS)
    names = [f"{kind}-{g}" for g in range(groups) for kind in KINDS] + ["noise"]
    topic = np.full((users, events), noise)
    labels = np.full((users, events, 2), np.nan, np.float32)
    size = 4 + NOISE + THIRDS
    for u in range(users):
        straight = np.full(groups, -1)  # of each group's newest block: 1, 0 crossed, -1 none yet
        for start in range(-int(rng.integers(size)), events, size):
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
