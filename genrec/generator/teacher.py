"""What the tools would propose at every training position, for the generator to learn from.

Ours, not the papers': a part of the training targets is drawn from the fused proposals of cheap tools
(distillation). The tools that speak at a position are *not fitted on it* (see genrec.tools.consult). At serving the
generator works without any tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools import Tool
from genrec.tools.consult import propose_apart

DEPTH = 32  # proposals per position
READ = 50  # newest events a teacher reads


def teach(
    train: Sequences,
    catalog: Catalog,
    tools: Mapping[str, type[Tool]],
    weights: Mapping[str, float],
    folds: int = 4,
    depth: int = DEPTH,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """int32 [M, depth]: for every training event, the rows that the tools propose from the events before it, best
    first; -1 where there are none (a user's first event, a shorter list).

    tools: classes to fit; weights: of their standardised scores. Deterministic in seed.
    """
    first = train.offsets[:-1][train.user_of]
    events = np.flatnonzero(np.arange(train.events) > first)

    def before(position: int) -> UserContext:
        event = int(events[position])
        past = slice(int(first[event]), event)
        return UserContext(tuple(train.items[past].tolist()), weights=tuple(train.weights[past].tolist()))

    out = np.full((train.events, depth), -1, np.int32)
    users = train.user_of[events]
    out[events], _ = propose_apart(
        train, catalog, tools, weights, users, before, depth, READ, folds=folds, seed=seed, report=report
    )
    return out
