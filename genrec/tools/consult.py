"""What the tools say together: the items that their fusion proposes for a context, and who may say it where.

The thinker reads it as evidence, and the generator is taught by it. At a training position both must hear tools that
were *not fitted on that position*, or they learn to trust them more than a new request deserves: users are dealt into
folds, and the tools that speak about one fold are fitted on the others (`propose_apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from genrec.contracts import Evidence, UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import Tool, short_title
from genrec.tools.fusion import standardise

TOGETHER = "together"  # the name of the tools' fusion as a piece of evidence
CHUNK = 512
SILENCE = 1e-5  # standard deviations that a proposal must be above the lowest score
PROPOSED = 8  # items that the evidence of the fusion holds
SENTENCE = "Taken together, the tools propose {found}."


def propose(
    tools: Mapping[str, Tool],
    weights: Mapping[str, float],
    contexts: list[UserContext],
    depth: int,
    read: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best items by the weighted sum of the tools' standardised scores: see `best_of`.

    read: newest events that the tools look at (default: all); older ones still count as had.
    """
    asked = contexts if read is None else [_newest(context, read) for context in contexts]
    scores = {name: tool.score_all(asked) for name, tool in tools.items() if weights.get(name)}
    return best_of(scores, weights, contexts, depth)


def best_of(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float], contexts: list[UserContext], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 [B, depth], best first, -1 where there are no more, and their sums float32 [B, depth], -inf there.

    scores: each tool's own, float32 [B, N]. Items of the history are left out, and items that every tool scores lowest:
    about them no tool says anything.
    """
    rows = np.full((len(contexts), depth), -1, np.int32)
    sums = np.full((len(contexts), depth), -np.inf, np.float32)
    blocks = [np.float32(weights[name]) * standardise(block) for name, block in scores.items() if weights.get(name)]
    if not blocks:
        return rows, sums
    total = np.sum(blocks, axis=0)
    silence = np.sum([block.min(axis=1, keepdims=True) for block in blocks], axis=0)
    total[total <= silence + SILENCE] = -np.inf
    for b, context in enumerate(contexts):
        total[b, list(context.history)] = -np.inf
    k = min(depth, total.shape[1])
    best = np.argpartition(-total, k - 1, axis=1)[:, :k]
    found = np.take_along_axis(total, best, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    sums[:, :k] = np.take_along_axis(found, order, 1)
    rows[:, :k] = np.where(np.isfinite(sums[:, :k]), np.take_along_axis(best, order, 1), -1)
    return rows, sums


def propose_apart(
    train: Sequences,
    catalog: Catalog,
    tools: Mapping[str, type[Tool]],
    weights: Mapping[str, float],
    users: np.ndarray,
    context: Callable[[int], UserContext],
    depth: int,
    read: int | None = None,
    folds: int = 4,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `propose`, at len(users) positions, each by tools that were not fitted on its user.

    users: positions in `train` [P]; context: the p-th position's context. tools: classes to fit. Deterministic in seed.
    """
    rows = np.full((len(users), depth), -1, np.int32)
    sums = np.full((len(users), depth), -np.inf, np.float32)
    fold = np.random.default_rng(seed).integers(0, folds, len(train))
    done = 0
    for f in range(folds):
        mine = np.flatnonzero(fold[users] == f)
        if not len(mine):
            continue
        fitted = {name: tool().fit(train.keep(fold[train.user_of] != f), catalog) for name, tool in tools.items()}
        for start in range(0, len(mine), CHUNK):
            at = mine[start : start + CHUNK]
            rows[at], sums[at] = propose(fitted, weights, [context(int(p)) for p in at], depth, read)
            done += len(at)
            report(done, len(users))
    return rows, sums


def as_evidence(catalog: Catalog, rows: np.ndarray, sums: np.ndarray) -> list[Evidence]:
    """What `propose` found as one piece of evidence per context; one without items where it found none."""
    said = []
    for row, score in zip(rows, sums, strict=True):
        there = row >= 0
        found = "; ".join(short_title(catalog.title(int(r))) for r in row[there][:3])
        text = SENTENCE.format(found=found) if found else ""
        said.append(Evidence(TOGETHER, row[there], score[there], text))
    return said


def _newest(context: UserContext, n: int) -> UserContext:
    cut = slice(max(0, len(context.history) - n), None)
    return replace(context, history=context.history[cut], times=context.times[cut], weights=context.weights[cut])
