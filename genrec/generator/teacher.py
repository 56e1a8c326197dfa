"""What the tools would propose at every training position, for the generator to learn from.

Ours, not the papers': a part of the training targets is drawn from the fused proposals of cheap tools
(distillation). The tools that speak at a position are *not fitted on it*: users are dealt into folds, and the
tools for one fold are fitted on the others. At serving the generator works without any tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools import Tool
from genrec.tools.fusion import standardise

DEPTH = 32  # proposals per position
READ = 50  # newest events a teacher reads
CHUNK = 512
SILENCE = 1e-5  # standard deviations that a proposal must be above the lowest score


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
    """int32 [M, depth]: for every training event, the rows that the tools propose from the events before it,
    best first; -1 where there are none (a user's first event, a shorter list). Items seen before are left out, and
    items that every tool scores lowest: about them no tool says anything.

    tools: classes to fit; weights: of their standardised scores. Deterministic in seed.
    """
    out = np.full((train.events, depth), -1, np.int32)
    fold = np.random.default_rng(seed).integers(0, folds, len(train))
    done, positions = 0, train.events - int((train.lengths > 0).sum())
    for f in range(folds):
        fitted = {name: tool().fit(train.keep(fold[train.user_of] != f), catalog) for name, tool in tools.items()}
        events = np.flatnonzero(fold[train.user_of] == f)
        events = events[events > train.offsets[:-1][train.user_of[events]]]
        for start in range(0, len(events), CHUNK):
            chunk = events[start : start + CHUNK]
            contexts = [_before(train, int(e)) for e in chunk]
            blocks = [np.float32(weights[n]) * standardise(t.score_all(contexts)) for n, t in fitted.items()]
            total = np.sum(blocks, axis=0)
            silence = np.sum([block.min(axis=1, keepdims=True) for block in blocks], axis=0)
            total[total <= silence + SILENCE] = -np.inf
            for row, e in enumerate(chunk):
                total[row, train.items[train.offsets[train.user_of[e]] : e]] = -np.inf
            k = min(depth, total.shape[1])
            best = np.argpartition(-total, k - 1, axis=1)[:, :k]
            scores = np.take_along_axis(total, best, 1)
            order = np.argsort(-scores, axis=1, kind="stable")
            best, scores = np.take_along_axis(best, order, 1), np.take_along_axis(scores, order, 1)
            out[chunk, :k] = np.where(np.isfinite(scores), best, -1)
            done += len(chunk)
            report(done, positions)
    return out


def _before(train: Sequences, event: int) -> UserContext:
    """The user's newest events before a given one."""
    start = max(int(train.offsets[train.user_of[event]]), event - READ)
    return UserContext(tuple(train.items[start:event].tolist()), weights=tuple(train.weights[start:event].tolist()))
