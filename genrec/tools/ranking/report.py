"""Tables of rankers on one task: AUC and GAUC per label and exposure bucket, and paired differences with what they
could have shown. JSON-ready.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genrec.evaluation import auc as measures
from genrec.evaluation.intervals import Interval
from genrec.tools.ranking.task import Task

EDGES = (10, 50, 200)  # training events of an item; ours


def measured(
    task: Task, positions: np.ndarray, scores: np.ndarray, edges: Sequence[int] = EDGES, resamples: int = 1000
) -> dict[str, Any]:
    """label -> {"auc", "gauc", "gauc by exposure": {bucket: ...}} of scores [R, B, T] of R runs on exposures [B]; each
    a mean with its interval, and users and samples behind it."""
    out: dict[str, Any] = {}
    for t, name, at, y, users in _labels(task, positions):
        own = scores[:, at, t]
        counts = task.exposures[task.samples.sequences.items[positions[at]]]
        slices = {k: mask for k, mask in measures.buckets(counts, edges).items() if mask.any()}
        out[name] = {
            "auc": plain(measures.auc_interval(y, own, users, resamples)) if len(y) else None,
            "gauc": plain(measures.gauc_interval(y, own, users, resamples)) | _sizes(y, users),
            "gauc by exposure": {
                k: plain(measures.gauc_interval(y[m], own[:, m], users[m], resamples)) | _sizes(y[m], users[m])
                for k, m in slices.items()
            },
        }
    return out


def compared(
    task: Task, positions: np.ndarray, a: np.ndarray, b: np.ndarray, edges: Sequence[int] = EDGES, resamples: int = 1000
) -> dict[str, Any]:
    """label -> differences a - b of scores [R, B, T], paired over the same users, each with `detectable`: the smallest
    true difference that this comparison finds in 80 % of cases."""
    out: dict[str, Any] = {}
    for t, name, at, y, users in _labels(task, positions):
        one, two = a[:, at, t], b[:, at, t]
        counts = task.exposures[task.samples.sequences.items[positions[at]]]
        slices = {k: mask for k, mask in measures.buckets(counts, edges).items() if mask.any()}

        def gauc(m: np.ndarray | slice, y: Any = y, one: Any = one, two: Any = two, users: Any = users) -> Interval:
            return measures.gauc_difference(y[m], one[:, m], two[:, m], users[m], resamples)

        out[name] = {
            "auc": plain(measures.auc_difference(y, one, two, users, resamples), True),
            "gauc": plain(gauc(slice(None)), True),
            "gauc by exposure": {k: plain(gauc(m), True) for k, m in slices.items()},
        }
    return out


def plain(interval: Interval, difference: bool = False) -> dict[str, float | None]:
    """JSON-ready, null where there is no bound; a difference with what it could have detected."""
    found = dict(vars(interval)) | ({"detectable": measures.detectable(interval)} if difference else {})
    return {k: round(v, 5) if math.isfinite(v) else None for k, v in found.items()}


def markdown(results: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """results: system -> `measured`; differences: "a - b" -> `compared`."""
    out = ["| system | label | AUC | GAUC | GAUC by training events of the item |", "|---|---|---|---|---|"]
    for system, labels in results.items():
        for label, found in labels.items():
            rest = "; ".join(f"{k}: {cell(v)}" for k, v in found["gauc by exposure"].items())
            out.append(f"| {system} | {label} | {cell(found['auc'])} | {cell(found['gauc'])} | {rest} |")
    if differences:
        out += [
            "",
            "| pair | label | AUC | GAUC | detectable GAUC | GAUC by training events of the item |",
            "|---|---|---|---|---|---|",
        ]
    for pair, labels in differences.items():
        for label, found in labels.items():
            rest = "; ".join(f"{k}: {cell(v, '+')}" for k, v in found["gauc by exposure"].items())
            least = found["gauc"]["detectable"]
            shown = "" if least is None else f"{least:.4f}"
            out.append(
                f"| {pair} | {label} | {cell(found['auc'], '+')} | {cell(found['gauc'], '+')} | {shown} | {rest} |"
            )
    return "\n".join(out) + "\n"


def cell(found: Mapping[str, float | None] | None, sign: str = "") -> str:
    """A mean with its interval, as a table shows it."""
    if found is None or found["mean"] is None:
        return ""
    bounds = "" if found["low"] is None else f" [{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"
    return f"{found['mean']:{sign}.4f}{bounds}"


def _labels(task: Task, positions: np.ndarray) -> list[tuple[int, str, np.ndarray, np.ndarray, np.ndarray]]:
    """(number, name, places among the positions with a known label, labels, users) of each label."""
    users = task.samples.sequences.user_of[positions]
    out = []
    for t, name in enumerate(task.samples.names):
        y = task.samples.labels[positions, t]
        at = np.flatnonzero(~np.isnan(y))
        out.append((t, name, at, y[at].astype(bool), users[at]))
    return out


def _sizes(labels: np.ndarray, users: np.ndarray) -> dict[str, int]:
    """Users with both kinds of labels, and their samples."""
    both = [u for u in np.unique(users) if 0 < labels[users == u].mean() < 1]
    return {"users": len(both), "samples": int(np.isin(users, both).sum())}
