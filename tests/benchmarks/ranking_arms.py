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
from genrec.evaluation.report import machine, provenance
from genrec.io import atomic, write_json, write_text
from genrec.tools.ranking.planted import Asked, planted
from genrec.tools.ranking.report import Scored, cell, markdown
from genrec.tools.ranking.samples import TEST, load_samples
from genrec.tools.ranking.task import Task
from genrec.tools.ranking.train import positions_of

PLANTED = "planted"
# Two groups: a round shows one of them, so the newest block of a third's group stands some 25 events back in the mean.
PLANTED_SIZES = {"users": 200, "events": 280, "groups": 2, "per_topic": 2}


@dataclass(frozen=True)
class Found:
    """One finished arm: scores [B, T] on the test exposures, and what else it said."""

    scores: np.ndarray
    about: dict[str, Any]


def task_of(data: str, labels: Sequence[str], split: str, seed: int = 0) -> Task:
    """The task of a data source, or of a planted stream of this seed."""
    if data == PLANTED:
        return Asked.make(planted(**PLANTED_SIZES, seed=seed), split)
    return Task.make(load_samples(data, labels), split)


def run_arms(
    work: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    job: Callable[[str, int], dict[str, Found]],
    identity: dict[str, Any],
) -> None:
    """Runs every arm that has no file yet, seed by seed, and says what it costs; a job may bring the files of further
    arms. Kill it and start it again. identity: what the files are made with, without the seed; JSON-ready. Raises
    GenrecError where a file was made with another."""
    for seed in seeds:
        for arm in arms:
            if (path := work / f"{arm}.{seed}.npz").exists():
                _checked(path, _read(path), identity)
                continue
            clock = time.perf_counter()
            made = job(arm, seed)
            seconds = round(time.perf_counter() - clock, 1)
            for name, found in made.items():
                about = found.about | {"seconds": seconds, "identity": identity, "made on": machine()}
                with atomic(work / f"{name}.{seed}.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, scores=found.scores, about=np.array(json.dumps(about)))
            print(f"{arm}, seed {seed}: {seconds} s, {made[arm].about.get('validation', '')}", flush=True)


def finished(work: Path, arms: Sequence[str], identity: dict[str, Any]) -> dict[str, dict[int, Found]]:
    """arm -> seed -> what was found, of the arms that are there. Raises GenrecError where one was made with something
    else than `identity`, a part of that of `run_arms`, or than another of them."""
    out: dict[str, dict[int, Found]] = {}
    identity = dict(identity)
    for arm in arms:
        for path in sorted(work.glob(f"{arm}.[0-9]*.npz")):
            found = _read(path)
            _checked(path, found, identity)
            identity = found.about.get("identity", identity)
            out.setdefault(arm, {})[int(path.name.removesuffix(".npz").rpartition(".")[2])] = found
    if not out:
        raise GenrecError(f"{work} holds no finished arm: run this script's `run` first")
    return out


def _read(path: Path) -> Found:
    with np.load(path) as file:
        return Found(file["scores"], json.loads(str(file["about"])))


def _checked(path: Path, found: Found, identity: dict[str, Any]) -> None:
    made = found.about.get("identity", {})
    for name, value in json.loads(json.dumps(identity)).items():
        if made.get(name) != value:
            raise GenrecError(
                f"{path} was made with {name} {made.get(name)}, not {value}; remove it or choose another --work"
            )


def common_seeds(found: dict[str, dict[int, Found]]) -> list[int]:
    """The seeds that all arms have. Raises GenrecError where there is none."""
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    if not seeds:
        raise GenrecError("no seed is finished for all arms")
    return seeds


def stacked(found: dict[str, dict[int, Found]], task: Task, positions: np.ndarray) -> dict[str, Scored]:
    """Each arm's scores over the seeds that all arms have, with what is computed once for all its comparisons."""
    seeds = common_seeds(found)
    return {arm: Scored(task, positions, np.stack([runs[s].scores for s in seeds])) for arm, runs in found.items()}


def write_table(
    systems: dict[str, Scored],
    found: dict[str, dict[int, Found]],
    pairs: Sequence[tuple[str, str]],
    out: Path,
    title: str,
    split: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """report.json, report.md and gauc.png. notes: further lines of the report."""
    clock = time.perf_counter()
    seeds = common_seeds(found)
    first = next(iter(systems.values()))
    task, positions = first.task, first.positions
    results = {arm: one.measured() for arm, one in systems.items()}
    differences = {f"{a} - {b}": systems[a].compared(systems[b]) for a, b in pairs if a in systems and b in systems}
    seconds = {arm: [runs[s].about["seconds"] for s in seeds] for arm, runs in found.items()}
    s = task.samples.sequences
    protocol = (
        f"{split}: {len(positions):,} test exposures of {len(np.unique(s.user_of[positions])):,} users; item counts "
        "from training events before the exposure; means over seeds, 95 % intervals from a bootstrap over users"
    )
    about = provenance(protocol, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    cut = [f"{arm}.{s}" for arm, runs in found.items() for s in seeds if cut_short(runs[s].about)]
    if cut:
        notes = [*notes, f"best in the last pass that they were allowed, so perhaps not finished: {', '.join(cut)}"]
    arms = {arm: {str(s): runs[s].about for s in seeds} for arm, runs in found.items()}
    every = [one.get("made on") for runs in arms.values() for one in runs.values()]
    about["arms_made_on"] = [one for i, one in enumerate(every) if one and one not in every[:i]]
    report = {
        "title": title, "results": results, "differences": differences, "seconds": seconds, "arms": arms,
        "notes": list(notes), "about": about,
    }  # fmt: skip
    write_json(out / "report.json", report)
    lines = [f"## {title}", "", markdown(results, differences), *(f"- {note}" for note in notes)]
    lines += [f"- seconds per fit: {', '.join(f'{arm} {np.mean(v):.0f}' for arm, v in seconds.items())}"]
    lines += [f"- {key}: `{value}`" for key, value in about.items()]
    write_text(out / "report.md", "\n".join(lines) + "\n")
    plot_bars(results, task.samples.names[0], out / "gauc.png", title)
    for pair, labels in differences.items():
        main = labels[task.samples.names[0]]
        low = next(iter(main["gauc by exposure"].items()), None)
        rest = "" if low is None else f", GAUC of items with {low[0]} training events {cell(low[1], '+')}"
        print(f"{pair}: GAUC {cell(main['gauc'], '+')}, AUC {cell(main['auc'], '+')}{rest}")
    return report


def cut_short(about: dict[str, Any]) -> bool:
    """Whether a fit ended at its limit of passes, with the last one the best."""
    values, most = about.get("validation", []), about.get("settings", {}).get("epochs", 0)
    return bool(values) and len(values) >= most and int(np.argmax(values)) == len(values) - 1


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


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """What `run` and `table` must agree on."""
    return {"data": args.data, "labels": list(args.label), "split": args.split}


def common_flags(one: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    one.add_argument("--data", required=True, help=f"a data source, or {PLANTED}")
    one.add_argument("--label", action="append", default=[], help="as of genrec rank; may be repeated")
    one.add_argument("--split", default="per-user", choices=("per-user", "by-time"))
    one.add_argument("--work", type=Path, required=True, help="where finished arms are kept")
    one.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
