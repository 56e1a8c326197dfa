"""One number per tool is chosen on validation: how fast the past fades. It is used at scoring only, so nothing is refitted."""

from __future__ import annotations

from dataclasses import replace

from genrec.data.dataset import EvalSet
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import rank_all
from genrec.tools.base import Tool

RECENCIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def tune_recency(tool: Tool, validation: EvalSet, k: int = 10, seed: int = 0) -> float | None:
    """Sets `tool.config.recency` to the value of RECENCIES with the best mean NDCG@k and returns it.

    On equal quality the larger one is taken. None, and nothing changed, for a tool without a recency or no request.
    """
    if not hasattr(tool.config, "recency") or not len(validation):
        return None
    quality = {}
    for recency in RECENCIES:
        tool.config = replace(tool.config, recency=recency)
        quality[recency] = float(ndcg(rank_all(tool.name, tool.score_all, validation, k, seed).ranks, k).mean())
    best = max(RECENCIES, key=lambda r: (quality[r], r))
    tool.config = replace(tool.config, recency=best)
    return best
