"""Consult and generate: the shortlist of items for each request, with what every part says of each.

The shortlist joins the beam of the generator with the best items of the tools' own fusion; the generator's
exact log-probability is computed for all of it (`score_items`), so no item is judged by half the parts.

Fusion is a weighted sum: tools' scores standardised over the catalogue (mean 0, standard deviation 1 per request),
rankers' over the shortlist, which is all that they judge, and the generator's log-probability in nats. It reads as a
product of experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genrec.contracts import Ranker, UserContext
from genrec.tools import Tool
from genrec.tools.fusion import standardise

if TYPE_CHECKING:
    from genrec.generator.model import GeneratorModel

GENERATOR = "generator"
POPULARITY = "popularity"
PIECE = 1000  # candidates of a request that a ranker judges at once


@dataclass(frozen=True)
class Shortlist:
    """rows: int64 [B, M], -1 where padded; parts: name -> float32 [B, M], what is fused; raw: tool ->
    float32 [B, N], the tools' own scores of the catalogue; beam, beam_scores: [B, W], the generator's own
    list; seconds: wall time per stage."""

    rows: np.ndarray
    parts: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]
    beam: np.ndarray
    beam_scores: np.ndarray
    seconds: dict[str, float]

    def fuse(self, weights: Mapping[str, float]) -> np.ndarray:
        """Fused scores float32 [B, M]; -inf where padded."""
        total = np.zeros(self.rows.shape, np.float32)
        for name, weight in weights.items():
            if weight and name in self.parts:
                total += np.float32(weight) * self.parts[name]
        return np.where(self.rows < 0, -np.inf, total)

    def order(self, weights: Mapping[str, float]) -> np.ndarray:
        """The places of `rows`, int64 [B, M], best fused score first, equals by row, padding last."""
        return np.lexsort((self.rows, -self.fuse(weights)), axis=1)


def allowed_items(
    contexts: list[UserContext], items: int, allow: np.ndarray | None = None, deny: np.ndarray | None = None
) -> np.ndarray:
    """bool [B, N]: not yet seen, and inside `allow` and outside `deny` (rows) where they are given."""
    allowed = np.ones((len(contexts), items), bool)
    if allow is not None:
        allowed[:] = False
        allowed[:, allow] = True
    if deny is not None:
        allowed[:, deny] = False
    for i, context in enumerate(contexts):
        allowed[i, list(context.history)] = False
        if context.trigger is not None:
            allowed[i, context.trigger] = False
    return allowed


def shortlist(
    contexts: list[UserContext],
    tools: Mapping[str, Tool],
    floor_weights: Mapping[str, float],
    model: GeneratorModel | None,
    allowed: np.ndarray,
    instructions: np.ndarray | None = None,
    width: int = 50,
    most: int = 100,
    rankers: Mapping[str, Ranker] | None = None,
) -> Shortlist:
    """The shortlist of B requests. allowed: bool [B, N]; instructions: float [B, text_dim], NaN rows for none;
    width: beams; most: items taken from the tools' fusion. model None leaves the generator out. rankers: by name, those
    that judge the shortlist."""
    clock = time.perf_counter()
    seconds: dict[str, float] = {}
    raw = {name: tool.score_all(contexts) for name, tool in tools.items()}
    standard = {name: standardise(scores) for name, scores in raw.items()}
    best: np.ndarray = np.zeros((len(contexts), 0), np.int64)
    if standard:
        floors = np.zeros(allowed.shape, np.float32)
        for name, weight in floor_weights.items():
            floors += np.float32(weight) * standard.get(name, np.float32(0))
        silent: np.ndarray = np.logical_not(floors.any(axis=1))
        if POPULARITY in standard:  # who has no history hears what everybody likes
            floors[silent] = standard[POPULARITY][silent]
            silent = np.logical_not(floors.any(axis=1))
        masked = np.where(allowed & ~silent[:, None], floors, -np.inf)
        k = min(most, masked.shape[1])
        best = np.argpartition(-masked, k - 1, axis=1)[:, :k]
        best = np.where(np.isfinite(np.take_along_axis(masked, best, 1)), best, -1)
    seconds["tools"] = time.perf_counter() - clock
    beam = np.zeros((len(contexts), 0), np.int64)
    beam_scores = np.zeros((len(contexts), 0), np.float32)
    clock = time.perf_counter()
    if model is None:
        rows, parts = best, {}
    else:
        import torch

        from genrec.generator.search import beam_search, make_history, make_request, score_items

        device = model.device
        history = make_history(contexts, model.config.max_history).to(device)
        request = make_request(model, contexts, instructions).to(device)
        found = beam_search(model, history, request, width, torch.from_numpy(allowed).to(device))
        beam, beam_scores = found.items.cpu().numpy(), found.scores.cpu().numpy()
        rows = _join(beam, best)
        likelihood = score_items(model, history, request, torch.from_numpy(rows).to(device)).cpu().numpy()
        parts = {GENERATOR: np.where(rows < 0, 0, likelihood).astype(np.float32)}
        seconds["generator"] = time.perf_counter() - clock
    at = np.maximum(rows, 0)
    parts |= {name: np.take_along_axis(scores, at, 1).astype(np.float32) for name, scores in standard.items()}
    clock = time.perf_counter()
    parts |= {name: _among(_judged(ranker, contexts, rows)) for name, ranker in (rankers or {}).items()}
    seconds |= {"rankers": time.perf_counter() - clock} if rankers else {}
    return Shortlist(rows, parts, raw, beam, beam_scores, seconds)


def _judged(ranker: Ranker, contexts: list[UserContext], rows: np.ndarray) -> np.ndarray:
    """A ranker's scores of rows [B, M], -inf where padded, a piece at a time."""
    pieces = [ranker.score(contexts, rows[:, i : i + PIECE]) for i in range(0, rows.shape[1], PIECE)]
    return np.concatenate(pieces, axis=1) if pieces else np.zeros(rows.shape, np.float32)


def _among(scores: np.ndarray) -> np.ndarray:
    """Scores [B, M], -inf where padded, as float32 of mean 0 and standard deviation 1 over each row; 0 where padded,
    and where all of a row are equal."""
    there = np.isfinite(scores)
    count = np.maximum(there.sum(1, keepdims=True), 1)
    values = np.where(there, scores, 0).astype(np.float64)
    centred = np.where(there, values - values.sum(1, keepdims=True) / count, 0)
    spread = np.sqrt((centred**2).sum(1, keepdims=True) / count)
    return np.asarray(np.where(spread > 1e-9, centred / np.maximum(spread, 1e-9), 0), np.float32)


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row-wise union of two row lists, -1 padded: second's items that are not in first, after first's."""
    both = np.concatenate([first, second], 1)
    order = np.argsort(both, axis=1, kind="stable")
    ranked = np.take_along_axis(both, order, 1)
    repeated = np.zeros(both.shape, bool)
    repeated[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    out = both.copy()
    np.put_along_axis(out, order, np.where(repeated, -1, ranked), 1)
    return out
