"""Does MARM's depth rank better than a long DIN? On real data, on a planted stream, and as a law of cache size.

    python tests/benchmarks/compare_marm.py run --data ml-100k --work marm-ml --seeds 0 1 2
    python tests/benchmarks/compare_marm.py table --data ml-100k --work marm-ml --out docs/results/marm-ml-100k
    python tests/benchmarks/compare_marm.py run --data FOLDER --label like=label --label long_view --label is_follow \
        --label is_comment --work marm-kuairand
    python tests/benchmarks/compare_marm.py run --data planted --work marm-planted --epochs 7
    python tests/benchmarks/compare_marm.py grid --work marm-grid --seeds 0 1 2
    python tests/benchmarks/compare_marm.py law --work marm-grid --out docs/results/marm-law

Arms: `rates` (logistic regression on rates), `mmoe` (identifiers, no history), `din` (DIN's activation unit over the
same n events), `marm-1` (target attention over the same n: a long DIN too, and MARM with nothing cached), `marm-2` to
`marm-4`, `transformer-3` (the ceiling: exact states, gradients through all layers), `marm-3-fresh` (marm-3 whose cache
is made anew with the final weights before the test: what staleness costs there), `marm-3-shuffled` (each request reads
another user's states: a control that must lose what depth brings).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from ranking_arms import (
    PLANTED,
    Found,
    common_flags,
    finished,
    new_figure,
    run_arms,
    save_figure,
    task_of,
    test_positions,
    write_table,
)
from scipy.optimize import curve_fit

from genrec.errors import GenrecError
from genrec.evaluation.auc import auc
from genrec.evaluation.report import provenance
from genrec.io import write_json, write_text
from genrec.tools.marm import MARM
from genrec.tools.marm.cache import StateCache
from genrec.tools.marm.memory import CachedStates, cache_for
from genrec.tools.ranking.samples import VALIDATION
from genrec.tools.ranking.task import Batch, Task
from genrec.tools.ranking.tool import Profile
from genrec.tools.ranking.train import (
    TrainConfig,
    make_ranker,
    predict,
    predict_sequences,
    train,
    train_sequences,
)

ARMS = (
    "rates", "mmoe", "din", "marm-1", "marm-2", "marm-3", "marm-4", "transformer-3", "marm-3-fresh", "marm-3-shuffled",
)  # fmt: skip
PAIRS = (
    ("marm-2", "din"), ("marm-3", "din"), ("marm-2", "marm-1"), ("marm-3", "marm-1"), ("marm-4", "marm-1"),
    ("marm-3", "marm-3-shuffled"), ("marm-3-shuffled", "marm-1"), ("marm-3-fresh", "marm-3"),
    ("transformer-3", "marm-1"), ("marm-3", "transformer-3"), ("marm-1", "mmoe"), ("mmoe", "rates"),
)  # fmt: skip
GRID = {"L": (1, 2, 3, 4), "n": (5, 10, 20, 50), "d": (8, 16)}


class Shuffled(CachedStates):
    """Reads the states of the next request of the batch: real states, of somebody else."""

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states, present = super().read(batch)
        return states.roll(1, 0), present


def job(task: Task, arm: str, config: TrainConfig, sizes: dict[str, Any]) -> Found:
    """Fits one arm and scores the test exposures."""
    kind, layers = (arm, 1) if "-" not in arm else ("attention", int(arm.split("-")[1]))
    model = make_ranker(task, kind, config.seed, layers=layers, **sizes)
    at, about = test_positions(task), {"settings": vars(config) | sizes}
    if arm.startswith("transformer"):
        values = train_sequences(model, task, config)
        scores = predict_sequences(model, task)[at]
        return Found(scores, about | {"validation": [round(v, 4) for v in values]})
    memory = None
    if layers > 1:
        cache = StateCache(cache_for(model.config, task.users))
        made = Shuffled if arm.endswith("shuffled") else CachedStates
        memory = made(cache, task.samples.sequences.users)
    values = train(model, task, config, memory)
    about["validation"] = [round(v, 4) for v in values]
    if memory is not None:
        tool = MARM(model, Profile.of(task), memory)
        about["staleness"] = tool.staleness(task, VALIDATION)
        about["cache bytes"] = {"states": memory.cache.config.state_bytes, "all": memory.cache.config.total_bytes}
        if arm.endswith("fresh"):
            tool.refresh(task, VALIDATION)
    return Found(predict(model, task, at, config, memory), about)


def run(args: argparse.Namespace) -> None:
    tasks: dict[int, Task] = {}

    def one(arm: str, seed: int) -> Found:
        data_seed = seed if args.data == PLANTED else 0
        if data_seed not in tasks:
            tasks[data_seed] = task_of(args.data, args.label, args.split, data_seed)
        config, sizes = settings(args, seed)
        return job(tasks[data_seed], arm, config, sizes)

    run_arms(args.work, args.arms, args.seeds, one)


def settings(args: argparse.Namespace, seed: int) -> tuple[TrainConfig, dict[str, Any]]:
    """Training and sizes: on real data the defaults; on the planted stream small ones, and no dropout."""
    if args.data == PLANTED:
        config = TrainConfig(
            epochs=args.epochs or 7, batch=64, learning_rate=5e-3, weight_decay=0, patience=9, seed=seed
        )
        return config, {"d": 16, "n": 20, "dropout": 0.0, "unknown": 0.0}
    config = TrainConfig(seed=seed) if args.epochs is None else TrainConfig(epochs=args.epochs, seed=seed)
    return config, {"d": args.d, "n": args.n}


def table(args: argparse.Namespace) -> None:
    found = finished(args.work, args.arms)
    if args.data == PLANTED:
        planted_table(args, found)
        return
    task = task_of(args.data, args.label, args.split)
    title = f"{task.samples.name}: MARM and what it is compared with"
    write_table(task, test_positions(task), found, PAIRS, args.out, title, args.split)


def planted_table(args: argparse.Namespace, found: dict[str, dict[int, Found]]) -> None:
    """Each seed has a stream of its own: AUC per stream, mean and range."""
    clock = time.perf_counter()
    rows = {}
    for arm, runs in found.items():
        values = []
        for seed, one in sorted(runs.items()):
            task = task_of(PLANTED, (), args.split, seed)
            values.append(auc(task.samples.labels[test_positions(task), 0], one.scores[:, 0]))
        rows[arm] = {"auc": [round(v, 4) for v in values], "mean": round(float(np.mean(values)), 4)}
    gain = [b - a for a, b in zip(rows["marm-1"]["auc"], rows["marm-3"]["auc"], strict=True)]
    about = provenance("planted stream, one per seed, per-user test", {}, time.perf_counter() - clock)
    arms = {arm: {str(seed): one.about for seed, one in runs.items()} for arm, runs in found.items()}
    report = {"rows": rows, "marm-3 minus marm-1": gain, "arms": arms, "about": about}
    write_json(args.out / "report.json", report)
    lines = ["| arm | AUC by seed | mean |", "|---|---|---|"]
    lines += [f"| {arm} | {', '.join(f'{v:.4f}' for v in r['auc'])} | {r['mean']:.4f} |" for arm, r in rows.items()]
    lines += ["", f"marm-3 minus marm-1 by seed: {', '.join(f'{g:+.4f}' for g in gain)}"]
    lines += [f"- {key}: `{value}`" for key, value in about.items()]
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def grid(args: argparse.Namespace) -> None:
    """Every cell of L x n x d on the planted stream, one fit per seed."""
    tasks: dict[int, Task] = {}

    def one(arm: str, seed: int) -> Found:
        tasks.setdefault(seed, task_of(PLANTED, (), "per-user", seed))
        layers, n, d = (int(x[1:]) for x in arm.split("_"))
        config = TrainConfig(epochs=args.epochs, batch=64, learning_rate=5e-3, weight_decay=0, patience=9, seed=seed)
        return job(tasks[seed], f"marm-{layers}", config, {"d": d, "n": n, "dropout": 0.0, "unknown": 0.0})

    run_arms(args.work, cells(), args.seeds, one)


def cells() -> list[str]:
    return [f"L{layers}_n{n}_d{d}" for layers in GRID["L"] for n in GRID["n"] for d in GRID["d"]]


def law(args: argparse.Namespace) -> None:
    """AUC = a - b (L n d)^-c over the cells: fit, R2, and the error on cells that were left out."""
    clock = time.perf_counter()
    found = finished(args.work, cells())
    tasks: dict[int, Task] = {}
    sizes, values, names = [], [], []
    for cell, runs in found.items():
        layers, n, d = (int(x[1:]) for x in cell.split("_"))
        each = []
        for seed, one in runs.items():
            tasks.setdefault(seed, task_of(PLANTED, (), "per-user", seed))
            each.append(auc(tasks[seed].samples.labels[test_positions(tasks[seed]), 0], one.scores[:, 0]))
        sizes.append(layers * n * d)
        values.append(float(np.mean(each)))
        names.append(cell)
    x, y = np.array(sizes, float), np.array(values)
    whole = power_law(x, y)
    held = np.random.default_rng(0).permutation(len(x)) % 5  # five folds
    errors = np.zeros(len(x))
    for fold in range(5):
        errors[held == fold] = y[held == fold] - curve(x[held == fold], *power_law(x[held != fold], y[held != fold]))
    fitted = curve(x, *whole)
    r2 = float(1 - ((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    report = {
        "law": "AUC = a - b (L n d)^-c",
        "a, b, c": [round(float(p), 5) for p in whole],
        "r2": round(r2, 4),
        "held-out rmse": round(float(np.sqrt((errors**2).mean())), 5),
        "held-out rmse of the mean": round(float(y.std()), 5),
        "cells": dict(zip(names, [round(v, 4) for v in values], strict=True)),
        "about": provenance("planted stream", {}, time.perf_counter() - clock),
    }
    write_json(args.out / "law.json", report)
    figure, axes = new_figure(7, 4.5)
    for layers in GRID["L"]:
        at = np.array([name.startswith(f"L{layers}_") for name in names])
        axes.scatter(x[at], y[at], label=f"L = {layers}")
    line = np.geomspace(x.min(), x.max(), 100)
    axes.plot(line, curve(line, *whole), color="black", lw=1, label=f"power law, R2 {r2:.2f}")
    axes.set_xscale("log")
    axes.set_xlabel("cache size L n d")
    axes.set_ylabel("AUC on the planted stream")
    axes.legend(frameon=False)
    save_figure(figure, args.out / "law.png")
    print({k: v for k, v in report.items() if k not in ("about", "cells")})


def curve(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    return a - b * x ** (-c)


def power_law(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    bounds = ([0.0, 0.0, 0.01], [1.0, 100.0, 3.0])
    return np.asarray(curve_fit(curve, x, y, p0=(min(0.99, y.max()), 1.0, 0.3), bounds=bounds, maxfev=20_000)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="fit the arms")
    common_flags(one, ARMS)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--epochs", type=int, help="passes (default: that of TrainConfig; 7 on the planted stream)")
    one.add_argument("--n", type=int, default=100, help="events of history, on real data")
    one.add_argument("--d", type=int, default=32, help="width, on real data")
    one.set_defaults(run=run)
    one = commands.add_parser("table", help="the table over finished arms")
    common_flags(one, ARMS)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=table)
    one = commands.add_parser("grid", help="fit the cells of the law")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--epochs", type=int, default=7)
    one.set_defaults(run=grid)
    one = commands.add_parser("law", help="fit the power law over finished cells")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=law)
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        args.run(args)
    except GenrecError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
