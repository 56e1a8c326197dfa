"""Tables of rankers on one task: AUC and GAUC per label and exposure bucket, and paired differences with what they
could have shown. JSON-ready.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from genrec.evaluation import auc as measures
from genrec.evaluation.intervals import Interval
from genrec.tools.ranking.task import Task

EDGES = (50, 200)  # training events of an item; ours. Below the first: low exposure


@dataclass(frozen=True)
class Part:
    """One label in one slice of the exposures: labels bool [B], scores [R, B], users [B] and groups [B] (see
    genrec.evaluation.auc.gauc_interval)."""

    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    groups: np.ndarray
    resamples: int

    @cached_property
    def draws(self) -> measures.Draws:
        """Of the AUC: drawn once, for all comparisons."""
        return measures.auc_draws(self.labels, self.scores, self.users, self.resamples)

    @property
    def gauc(self) -> Interval:
        return measures.gauc_interval(self.labels, self.scores, self.users, self.resamples, groups=self.groups)

    def gauc_less(self, other: Part) -> Interval:
        return measures.gauc_difference(
            self.labels, self.scores, other.scores, self.users, self.resamples, groups=self.groups
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Users with both kinds of labels, and their samples."""
        own = measures.user_aucs(self.labels, np.zeros(len(self.labels)), self.groups)
        there = ~np.isnan(own)
        return {"users": len(np.unique(self.users[there])), "samples": int(there.sum())}


@dataclass(frozen=True)
class Scored:
    """Scores [R, B, T] of R runs of one system on exposures [B] of a task. edges: of the exposure buckets (none: no
    buckets); groups: int [B], see `Part`; None: the users. With groups, whose scores may come from several models, an
    AUC across them has no meaning and is left out."""

    task: Task
    positions: np.ndarray
    scores: np.ndarray
    edges: Sequence[int] = EDGES
    resamples: int = 1000
    groups: np.ndarray | None = None

    @cached_property
    def parts(self) -> dict[str, tuple[Part, dict[str, Part]]]:
        """label -> the whole, and each bucket with exposures."""
        samples = self.task.samples
        users = samples.sequences.user_of[self.positions]
        groups = users if self.groups is None else self.groups
        counts = self.task.exposures[samples.sequences.items[self.positions]]
        slices = measures.buckets(counts, self.edges) if len(self.edges) else {}
        out = {}
        for t, name in enumerate(samples.names):
            y = samples.labels[self.positions, t]

            def part(mask: np.ndarray, y: np.ndarray = y, t: int = t) -> Part:
                at = np.flatnonzero(~np.isnan(y) & mask)
                return Part(y[at].astype(bool), self.scores[:, at, t], users[at], groups[at], self.resamples)

            found = {k: part(mask) for k, mask in slices.items()}
            out[name] = part(np.ones(len(y), bool)), {k: p for k, p in found.items() if len(p.labels)}
        return out

    def measured(self) -> dict[str, Any]:
        """label -> {"auc", "gauc", "by run": {"auc", "gauc"}, "auc by exposure", "gauc by exposure": {bucket: ...}};
        each a mean with its interval, a GAUC with the users and samples behind it."""
        return {
            name: {
                "auc": plain(whole.draws.interval()) if len(whole.labels) and self.groups is None else None,
                "gauc": plain(whole.gauc) | whole.sizes,
                "by run": {
                    "auc": [_rounded(measures.auc(whole.labels, s)) for s in whole.scores if self.groups is None],
                    "gauc": [_rounded(measures.gauc(whole.labels, s, whole.groups)) for s in whole.scores],
                },
                "auc by exposure": {k: plain(p.draws.interval()) for k, p in slices.items() if self.groups is None},
                "gauc by exposure": {k: plain(p.gauc) | p.sizes for k, p in slices.items()},
            }
            for name, (whole, slices) in self.parts.items()
        }

    def compared(self, other: Scored) -> dict[str, Any]:
        """label -> differences to another system on the same exposures, paired over the same users, each with
        `detectable`: the smallest true difference that this comparison finds in 80 % of cases. The intervals are those
        of users; what training adds by chance shows in "by run", the GAUC's difference in each run."""
        out: dict[str, Any] = {}
        for name, (a, mine) in self.parts.items():
            b, others = other.parts[name]
            out[name] = {
                "auc": plain((a.draws - b.draws).interval(), True) if self.groups is None else None,
                "gauc": plain(a.gauc_less(b), True),
                "by run": [
                    _rounded(measures.gauc(a.labels, x, a.groups) - measures.gauc(b.labels, y, b.groups))
                    for x, y in zip(a.scores, b.scores, strict=True)
                ],
                "auc by exposure": {
                    k: plain((p.draws - others[k].draws).interval(), True)
                    for k, p in mine.items()
                    if self.groups is None
                },
                "gauc by exposure": {k: plain(p.gauc_less(others[k]), True) for k, p in mine.items()},
            }
        return out


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def plain(interval: Interval, difference: bool = False) -> dict[str, float | None]:
    """JSON-ready, null where there is no bound; a difference with what it could have detected."""
    found = dict(vars(interval)) | ({"detectable": measures.detectable(interval)} if difference else {})
    return {k: round(v, 5) if math.isfinite(v) else None for k, v in found.items()}


def markdown(results: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """results: system -> `Scored.measured`; differences: "a - b" -> `Scored.compared`. In a difference ± stands before
    the smallest one that would have been found. One that does not have its sign in every run is chance."""
    out = [
        "| system | label | AUC | GAUC | GAUC of each run | AUC by training events of the item | GAUC by the same |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, labels in results.items():
        for label, found in labels.items():
            each = ", ".join("" if v is None else f"{v:.4f}" for v in found["by run"]["gauc"])
            rest = " | ".join(_buckets(found[f"{kind} by exposure"]) for kind in ("auc", "gauc"))
            out.append(f"| {system} | {label} | {cell(found['auc'])} | {cell(found['gauc'])} | {each} | {rest} |")
    if differences:
        head = "| pair | label | AUC | GAUC | each run | AUC by training events of the item | GAUC by the same |"
        out += ["", head, "|---|---|---|---|---|---|---|"]
    for pair, labels in differences.items():
        for label, found in labels.items():
            rest = " | ".join(_buckets(found[f"{kind} by exposure"], "+") for kind in ("auc", "gauc"))
            each = ", ".join("" if v is None else f"{v:+.4f}" for v in found["by run"])
            whole = f"{cell(found['auc'], '+')} | {cell(found['gauc'], '+')}"
            out.append(f"| {pair} | {label} | {whole} | {each} | {rest} |")
    return "\n".join(out) + "\n"


def _buckets(found: Mapping[str, Mapping[str, float | None]], sign: str = "") -> str:
    return "; ".join(f"{k}: {cell(v, sign)}" for k, v in found.items())


def cell(found: Mapping[str, float | None] | None, sign: str = "") -> str:
    """A mean with its interval, as a table shows it; ± before what a difference could have detected."""
    if found is None or found["mean"] is None:
        return ""
    bounds = "" if found["low"] is None else f" [{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"
    least = found.get("detectable")
    return f"{found['mean']:{sign}.4f}{bounds}" + ("" if least is None else f" ±{least:.4f}")
