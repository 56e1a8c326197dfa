"""What the tools would propose at every training position, for the generator to learn from.

Ours, not the papers': a part of the training targets is drawn from the fused proposals of cheap tools
(distillation), and a part of the positions is trained with the proposals as the prior that steers the beam
(prior.py). The tools that speak at a position are *not fitted on it*: users are dealt into folds, and the tools
for one fold are fitted on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.generator.prior import DEPTH, best_items
from genrec.tools import Tool
from genrec.tools.fusion import standardise

READ = 50  # newest events a teacher reads
CHUNK = 512


def teach(
    train: Sequences,
    catalog: Catalog,
    tools: Mapping[str, type[Tool]],
    weights: Mapping[str, float],
    folds: int = 4,
    depth: int = DEPTH,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """For every training event the rows that the tools propose from the events before it, best first, and their
    fused scores: int32 and float16 [M, depth]; -1 where there are none (a user's first event, a shorter list).
    Items seen before are left out.

    tools: classes to fit; weights: of their standardised scores. Deterministic in seed.
    """
    items = np.full((train.events, depth), -1, np.int32)
    scores = np.zeros((train.events, depth), np.float16)
    fold = np.random.default_rng(seed).integers(0, folds, len(train))
    done = 0
    for f in range(folds):
        fitted = {name: tool().fit(train.keep(fold[train.user_of] != f), catalog) for name, tool in tools.items()}
        events = np.flatnonzero(fold[train.user_of] == f)
        events = events[events > train.offsets[:-1][train.user_of[events]]]
        for start in range(0, len(events), CHUNK):
            chunk = events[start : start + CHUNK]
            contexts = [_before(train, int(e)) for e in chunk]
            total = sum(np.float32(weights[n]) * standardise(t.score_all(contexts)) for n, t in fitted.items())
            for row, e in enumerate(chunk):
                total[row, train.items[train.offsets[train.user_of[e]] : e]] = -np.inf
            best, values = best_items(total, depth)
            items[chunk, : best.shape[1]] = best
            scores[chunk, : best.shape[1]] = np.where(best >= 0, values, 0)
            done += len(chunk)
            report(done, train.events)
    return items, scores


def _before(train: Sequences, event: int) -> UserContext:
    """The user's newest events before a given one."""
    start = max(int(train.offsets[train.user_of[event]]), event - READ)
    return UserContext(tuple(train.items[start:event].tolist()), weights=tuple(train.weights[start:event].tolist()))
