"""What the ranking experiments share: the task, one file per finished arm and seed, tables over them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrec.errors import GenrecError
from genrec.evaluation.report import provenance
from genrec.io import atomic, write_json, write_text
from genrec.tools.ranking.planted import planted
from genrec.tools.ranking.report import cell, compared, markdown, measured
from genrec.tools.ranking.samples import TEST, load_samples
from genrec.tools.ranking.task import Task
from genrec.tools.ranking.train import positions_of

PLANTED = "planted"
PLANTED_SIZES = {"users": 400, "events": 100, "topics": 4, "per_topic": 2}


@dataclass(frozen=True)
class Found:
    """One finished arm: scores [B, T] on the test exposures, and what else it said."""

    scores: np.ndarray
    about: dict[str, Any]


def task_of(data: str, labels: Sequence[str], split: str, seed: int = 0) -> Task:
    """The task of a data source, or of a planted stream of this seed."""
    samples = planted(**PLANTED_SIZES, seed=seed) if data == PLANTED else load_samples(data, labels)
    return Task.make(samples, split)


def run_arms(work: Path, arms: Sequence[str], seeds: Sequence[int], job: Callable[[str, int], Found]) -> None:
    """Runs every arm that has no file yet, seed by seed, and says what it costs. Kill it and start it again."""
    for seed in seeds:
        for arm in arms:
            path = work / f"{arm}.{seed}.npz"
            if path.exists():
                continue
            clock = time.perf_counter()
            found = job(arm, seed)
            seconds = round(time.perf_counter() - clock, 1)
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.savez(file, scores=found.scores, about=np.array(json.dumps(found.about | {"seconds": seconds})))
            print(f"{arm}, seed {seed}: {seconds} s, {found.about.get('validation', '')}", flush=True)


def finished(work: Path, arms: Sequence[str]) -> dict[str, dict[int, Found]]:
    """arm -> seed -> what was found, of the arms that are there."""
    out: dict[str, dict[int, Found]] = {}
    for arm in arms:
        for path in sorted(work.glob(f"{arm}.[0-9]*.npz")):
            with np.load(path) as file:
                seed = int(path.name.removesuffix(".npz").rpartition(".")[2])
                out.setdefault(arm, {})[seed] = Found(file["scores"], json.loads(str(file["about"])))
    if not out:
        raise GenrecError(f"{work} holds no finished arm: run this script's `run` first")
    return out


def write_table(
    task: Task,
    positions: np.ndarray,
    found: dict[str, dict[int, Found]],
    pairs: Sequence[tuple[str, str]],
    out: Path,
    title: str,
    split: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """report.json, report.md and gauc.png over the seeds that all arms have."""
    clock = time.perf_counter()
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    if not seeds:
        raise GenrecError("no seed is finished for all arms")
    stacked = {arm: np.stack([runs[s].scores for s in seeds]) for arm, runs in found.items()}
    results = {arm: measured(task, positions, scores) for arm, scores in stacked.items()}
    differences = {
        f"{a} - {b}": compared(task, positions, stacked[a], stacked[b])
        for a, b in pairs
        if a in stacked and b in stacked
    }
    seconds = {arm: [runs[s].about["seconds"] for s in seeds] for arm, runs in found.items()}
    s = task.samples.sequences
    protocol = (
        f"{split}: {len(positions):,} test exposures of {len(np.unique(s.user_of[positions])):,} users; item counts "
        "from training events before the exposure; means over seeds, 95 % intervals from a bootstrap over users"
    )
    about = provenance(protocol, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    arms = {arm: {str(s): runs[s].about for s in seeds} for arm, runs in found.items()}
    report = {
        "title": title, "results": results, "differences": differences, "seconds": seconds, "arms": arms,
        "about": about | (extra or {}),
    }  # fmt: skip
    write_json(out / "report.json", report)
    lines = [f"## {title}", "", markdown(results, differences)]
    lines += [f"- seconds per fit: {', '.join(f'{arm} {np.mean(v):.0f}' for arm, v in seconds.items())}"]
    lines += [f"- {key}: `{value}`" for key, value in report["about"].items()]
    write_text(out / "report.md", "\n".join(lines) + "\n")
    plot_bars(results, task.samples.names[0], out / "gauc.png", title)
    for pair, labels in differences.items():
        main = labels[task.samples.names[0]]
        print(f"{pair}: GAUC {cell(main['gauc'], '+')}, AUC {cell(main['auc'], '+')}")
    return report


def plot_bars(results: dict[str, Any], label: str, path: Path, title: str) -> None:
    """GAUC of the main label with its intervals."""
    figure, axes = new_figure(8, 0.9 + 0.32 * len(results))
    for place, found in enumerate(results.values()):
        value = found[label]["gauc"]
        if value["mean"] is None:  # no user has both kinds
            continue
        sides = [[value["mean"] - (value["low"] or value["mean"])], [(value["high"] or value["mean"]) - value["mean"]]]
        axes.errorbar(value["mean"], place, xerr=sides, fmt="o", capsize=3, color="C0")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel(f"GAUC of {label}, 95 % interval over users")
    axes.set_title(title, loc="left", fontsize=10)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def test_positions(task: Task) -> np.ndarray:
    return positions_of(task, TEST)


def common_flags(one: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    one.add_argument("--data", required=True, help=f"a data source, or {PLANTED}")
    one.add_argument("--label", action="append", default=[], help="as of genrec rank; may be repeated")
    one.add_argument("--split", default="per-user", choices=("per-user", "by-time"))
    one.add_argument("--work", type=Path, required=True, help="where finished arms are kept")
    one.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
