"""Does MARM's depth rank better than a long DIN? On real data, on a planted stream, and as a law of cache size.

    python tests/benchmarks/compare_marm.py run --data ml-100k --work marm-ml --seeds 0 1 2
    python tests/benchmarks/compare_marm.py table --data ml-100k --work marm-ml --out docs/results/marm-ml-100k
    python tests/benchmarks/compare_marm.py run --data FOLDER --label like=label --label long_view --label is_follow \
        --label is_comment --work marm-kuairand
    python tests/benchmarks/compare_marm.py run --data planted --work marm-planted
    python tests/benchmarks/compare_marm.py grid --work marm-grid --seeds 0 1 2
    python tests/benchmarks/compare_marm.py law --work marm-grid --out docs/results/marm-law

Arms: `rates` (logistic regression on rates), `mmoe` (identifiers, no history), `din` (DIN's activation unit over the
same n events), `marm-1` (target attention over the same n: a long DIN too, and MARM with nothing cached), `marm-2` to
`marm-4`, `transformer-3` (exact states, gradients through all layers; whole users a step), `marm-3-fresh` (marm-3
whose cache is made anew with the final weights before the test: what staleness costs there), `marm-3-shuffled` (each
request reads another user's states: a control that must lose what depth brings). marm-3 and marm-3-fresh are one fit.

Laws: a - b (L n d)^-c, and one in which L, n and d count apart; both are judged on cells that were left out, at random
and the largest ones.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from command import run_command
from ranking_arms import (
    PLANTED,
    PLANTED_SIZES,
    Found,
    asked_for,
    common_flags,
    common_seeds,
    finished,
    new_figure,
    run_arms,
    save_figure,
    stacked,
    task_of,
    test_positions,
    write_table,
)
from scipy.optimize import OptimizeWarning, curve_fit

from genrec.device import fastest_device
from genrec.errors import GenrecError
from genrec.evaluation.auc import auc
from genrec.evaluation.report import provenance
from genrec.io import write_json, write_text
from genrec.tools.marm import MARM
from genrec.tools.marm.cache import StateCache
from genrec.tools.marm.memory import CachedStates, cache_for
from genrec.tools.ranking.planted import NOISE, THIRDS
from genrec.tools.ranking.samples import TEST, VALIDATION
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
    ("marm-1", "din"), ("marm-2", "din"), ("marm-3", "din"),
    ("marm-2", "marm-1"), ("marm-3", "marm-1"), ("marm-4", "marm-1"),
    ("marm-3", "marm-3-shuffled"), ("marm-3-shuffled", "marm-1"), ("marm-3-fresh", "marm-3"),
    ("transformer-3", "marm-1"), ("marm-3", "transformer-3"), ("marm-1", "mmoe"), ("mmoe", "rates"),
)  # fmt: skip
STREAM = {"stream": PLANTED_SIZES | {"noise": NOISE, "thirds": THIRDS}}
PASSES, PATIENCE = 16, 6  # on the planted stream, where an arm may stand at chance for some passes and then rise
GRID = {"L": (1, 2, 3, 4), "n": (14, 28, 42, 70), "d": (8, 16)}  # n: whole rounds of the planted stream


class Shuffled(CachedStates):
    """Reads the states of the next request of the batch: real states, of somebody else; none where it is alone."""

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states, present = super().read(batch)
        if len(batch) == 1:
            return states, torch.zeros_like(present)
        return states.roll(1, 0), present.roll(1, 0)


def job(task: Task, arm: str, config: TrainConfig, sizes: dict[str, Any]) -> dict[str, Found]:
    """Fits one arm and scores the test exposures; marm-3 and marm-3-fresh come from one fit."""
    arm = arm.removesuffix("-fresh")
    kind, layers = (arm, 1) if "-" not in arm else ("attention", int(arm.split("-")[1]))
    model = make_ranker(task, kind, config.seed, layers=layers, **sizes).to(fastest_device())
    at, about = test_positions(task), {"settings": vars(config) | sizes}
    every = np.flatnonzero(task.part == TEST)  # also those without the main label leave a state
    asked = np.isin(every, at)
    if arm.startswith("transformer"):
        about["validation"] = [round(v, 4) for v in train_sequences(model, task, config)]
        return {arm: Found(predict_sequences(model, task)[at], about)}
    memory = None
    if layers > 1:
        cache = StateCache(cache_for(model.config, task.users))
        made = Shuffled if arm.endswith("shuffled") else CachedStates
        memory = made(cache, task.samples.sequences.users)
    about["validation"] = [round(v, 4) for v in train(model, task, config, memory)]
    if memory is None:
        return {arm: Found(predict(model, task, every, config)[asked], about)}
    tool = MARM(model, Profile.of(task), memory)
    if made is CachedStates:  # another user's states are not stale, but not this one's
        about["staleness"] = tool.staleness(task, VALIDATION)
    about["cache bytes"] = {"states": memory.cache.config.state_bytes, "all": memory.cache.config.total_bytes}
    trained = memory.snapshot()
    found = {arm: Found(predict(model, task, every, config, memory)[asked], about)}
    if arm == "marm-3":
        memory.restore(trained)
        tool.refresh(task, VALIDATION)
        scores = predict(model, task, every, config, memory)[asked]
        error = float(np.abs(scores - predict_sequences(model, task)[at]).max())
        found["marm-3-fresh"] = Found(scores, about | {"float16 error": round(error, 6)})
    return found


def run(args: argparse.Namespace) -> None:
    tasks: dict[int, Task] = {}

    def one(arm: str, seed: int) -> dict[str, Found]:
        data_seed = seed if args.data == PLANTED else 0
        if data_seed not in tasks:
            tasks[data_seed] = task_of(args.data, args.label, args.split, data_seed)
        config, sizes = settings(args, seed)
        return job(tasks[data_seed], arm, config, sizes)

    made = asked_for(args) | identity(*settings(args, 0)) | (STREAM if args.data == PLANTED else {})
    run_arms(args.work, args.arms, args.seeds, one, made)


def identity(config: TrainConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if k != "seed"} | sizes


def settings(args: argparse.Namespace, seed: int) -> tuple[TrainConfig, dict[str, Any]]:
    """Training and sizes: on real data the defaults; on the planted stream small ones, and no dropout."""
    if args.data == PLANTED:
        return planted_settings(args.epochs or PASSES, seed, 16, 42)
    config = TrainConfig(seed=seed) if args.epochs is None else TrainConfig(epochs=args.epochs, seed=seed)
    return config, {"d": args.d, "n": args.n}


def planted_settings(epochs: int, seed: int, d: int, n: int) -> tuple[TrainConfig, dict[str, Any]]:
    config = TrainConfig(
        epochs, batch=200, learning_rate=5e-3, weight_decay=0, patience=PATIENCE, average=0, inside=False, seed=seed
    )  # fmt: skip
    return config, {"d": d, "n": n, "dropout": 0.0, "unknown": 0.0, "blank": 0.0}


def table(args: argparse.Namespace) -> None:
    found = finished(args.work, args.arms, asked_for(args))
    if args.data == PLANTED:
        planted_table(args, found)
        return
    task = task_of(args.data, args.label, args.split)
    title = f"{task.samples.name}: MARM and what it is compared with"
    notes = []
    for arm, runs in found.items():
        about = [one.about for _, one in sorted(runs.items())]
        if "float16 error" in about[0]:
            worst = max(a["float16 error"] for a in about)
            notes.append(f"{arm}: largest difference of a logit from exact states, float16 cache: {worst:.2g}")
        elif "staleness" in about[0]:
            stale = [min(a["staleness"]["cosine"]) for a in about]
            notes.append(f"{arm}: least cosine of a level's cached states to fresh ones: {min(stale):.4f}")
    write_table(stacked(found, task, test_positions(task)), found, PAIRS, args.out, title, args.split, notes)


def planted_table(args: argparse.Namespace, found: dict[str, dict[int, Found]]) -> None:
    """Each seed has a stream of its own: AUC per stream, mean and range."""
    clock = time.perf_counter()
    if missing := [arm for arm in ("marm-1", "marm-3") if arm not in found]:
        raise GenrecError(f"{args.work} holds no finished {missing[0]}, which the table compares: run it first")
    seeds = common_seeds(found)
    rows = {}
    for arm, runs in found.items():
        values = []
        for seed in seeds:
            task = task_of(PLANTED, (), args.split, seed)
            values.append(auc(task.samples.labels[test_positions(task), 0], runs[seed].scores[:, 0]))
        rows[arm] = {"auc": [round(v, 4) for v in values], "mean": round(float(np.mean(values)), 4)}
    gain = [round(b - a, 4) for a, b in zip(rows["marm-1"]["auc"], rows["marm-3"]["auc"], strict=True)]
    about = provenance("planted stream, one per seed, per-user test", {}, time.perf_counter() - clock)
    arms = {arm: {str(seed): runs[seed].about for seed in seeds} for arm, runs in found.items()}
    report = {"seeds": seeds, "rows": rows, "marm-3 minus marm-1": gain, "arms": arms, "about": about}
    write_json(args.out / "report.json", report)
    lines = [f"| arm | AUC of seeds {', '.join(map(str, seeds))} | mean |", "|---|---|---|"]
    lines += [f"| {arm} | {', '.join(f'{v:.4f}' for v in r['auc'])} | {r['mean']:.4f} |" for arm, r in rows.items()]
    lines += ["", f"marm-3 minus marm-1 by seed: {', '.join(f'{g:+.4f}' for g in gain)}"]
    lines += [f"- {key}: `{value}`" for key, value in about.items()]
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def grid(args: argparse.Namespace) -> None:
    """Every cell of L x n x d on the planted stream, one fit per seed."""
    tasks: dict[int, Task] = {}

    def one(arm: str, seed: int) -> dict[str, Found]:
        if seed not in tasks:
            tasks[seed] = task_of(PLANTED, (), "per-user", seed)
        layers, n, d = sizes_of(arm)
        return {arm: job(tasks[seed], f"marm-{layers}", *planted_settings(args.epochs, seed, d, n))[f"marm-{layers}"]}

    config, _ = planted_settings(args.epochs, 0, 8, 5)
    run_arms(args.work, cells(), args.seeds, one, identity(config, {"data": PLANTED} | STREAM))


def cells() -> list[str]:
    return [f"L{layers}_n{n}_d{d}" for layers in GRID["L"] for n in GRID["n"] for d in GRID["d"]]


def sizes_of(cell: str) -> list[int]:
    """L, n and d of a cell's name."""
    return [int(x[1:]) for x in cell.split("_")]


def law(args: argparse.Namespace) -> None:
    """The two laws over the cells: fits, R2, and the errors on cells that were left out."""
    clock = time.perf_counter()
    found = finished(args.work, cells(), {"data": PLANTED})
    tasks: dict[int, Task] = {}
    means, seeds = {}, common_seeds(found)
    for cell, runs in found.items():
        each = []
        for seed in seeds:
            one = runs[seed]
            if seed not in tasks:
                tasks[seed] = task_of(PLANTED, (), "per-user", seed)
            each.append(auc(tasks[seed].samples.labels[test_positions(tasks[seed]), 0], one.scores[:, 0]))
        means[cell] = float(np.mean(each))
    sizes, y = np.array([sizes_of(cell) for cell in means], float), np.array(list(means.values()))
    if len(y) < len(SEPARABLE[2]):
        raise GenrecError(f"{args.work} holds {len(y)} cells; a law needs at least {len(SEPARABLE[2])}: run `grid`")
    laws = {name: judged(one, sizes, y) for name, one in (("product", PRODUCT), ("separable", SEPARABLE))}
    about = provenance("planted stream", {}, time.perf_counter() - clock)
    cells_ = {cell: round(v, 4) for cell, v in means.items()}
    write_json(args.out / "law.json", {"laws": laws, "cells": cells_, "about": about})
    figure, axes = new_figure(7, 4.5)
    x = sizes.prod(1)
    for layers in np.unique(sizes[:, 0]):
        at = sizes[:, 0] == layers
        axes.scatter(x[at], y[at], label=f"L = {layers:.0f}")
    line = np.geomspace(x.min(), x.max(), 100)
    axes.plot(
        line, product(np.stack([line, line**0, line**0], 1), *laws["product"]["parameters"]), color="black", lw=1,
        label=f"a - b (L n d)^-c, R2 {laws['product']['r2']:.2f}",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("cache size L n d")
    axes.set_ylabel("AUC on the planted stream")
    axes.legend(frameon=False)
    save_figure(figure, args.out / "law.png")
    print("\n".join(f"{name}: {found}" for name, found in laws.items()))


def product(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    return a - b * x.prod(1) ** (-c)


def separable(x: np.ndarray, a: float, *bc: float) -> np.ndarray:
    b, c = np.array(bc[:3]), np.array(bc[3:])
    return np.asarray(a - (b * x ** (-c)).sum(1))


Law = tuple[str, Callable[..., np.ndarray], list[float], list[float], list[float]]  # its text, start, least and most
PRODUCT: Law = ("AUC = a - b (L n d)^-c", product, [0.9, 1.0, 0.3], [0, 0, 0.01], [1, 100, 3])
SEPARABLE: Law = (
    "AUC = a - b1 L^-c1 - b2 n^-c2 - b3 d^-c3",
    separable,
    [0.9, 0.1, 0.1, 0.1, 1, 1, 1],
    [0, 0, 0, 0, 0.01, 0.01, 0.01],
    [1.5, 5, 5, 5, 5, 5, 5],
)


def judged(law: Law, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """A law over cells x [K, 3] with AUC y [K]: R2 of the fit to all; root mean square errors on cells left out, in
    five random folds, and the largest fifth by L n d, each beside that of the mean of the others."""
    text, curve, start, least, most = law

    def fit(keep: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # the covariance, which is not used
            return np.asarray(curve_fit(curve, x[keep], y[keep], start, bounds=(least, most), maxfev=50_000)[0])

    def missed(folds: list[np.ndarray]) -> dict[str, float]:
        fitted = np.concatenate([y[out] - curve(x[out], *fit(~out)) for out in folds])
        flat = np.concatenate([y[out] - y[~out].mean() for out in folds])
        return {"law": rms(fitted), "mean": rms(flat)}

    def rms(errors: np.ndarray) -> float:
        return round(float(np.sqrt((errors**2).mean())), 5)

    whole = fit(np.ones(len(y), bool))
    fold = np.random.default_rng(0).permutation(len(y)) % 5
    size = x.prod(1)
    return {
        "law": text,
        "parameters": [round(float(p), 5) for p in whole],
        "r2": round(float(1 - ((y - curve(x, *whole)) ** 2).sum() / ((y - y.mean()) ** 2).sum()), 4),
        "held-out rmse, random folds": missed([fold == k for k in range(5)]),
        "held-out rmse, largest fifth": missed([size >= np.sort(size)[-max(1, len(y) // 5)]]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="fit the arms")
    common_flags(one, ARMS)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument(
        "--epochs", type=int, help=f"passes (default: that of TrainConfig; {PASSES} on the planted stream)"
    )
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
    one.add_argument("--epochs", type=int, default=PASSES)
    one.set_defaults(run=grid)
    one = commands.add_parser("law", help="fit the power laws over finished cells")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=law)
    torch.set_num_threads(1)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
