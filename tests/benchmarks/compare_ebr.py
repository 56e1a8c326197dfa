"""Divide-and-conquer EBR against one user vector: which part of it is worth what?

    python tests/benchmarks/compare_ebr.py fit --data amazon14:FOLDER --work ebr-arms --seeds 0 1 2
    python tests/benchmarks/compare_ebr.py table --data amazon14:FOLDER --work ebr-arms --out ebr-beauty

`fit` trains every arm of every seed and ranks the test requests once; a killed run goes on with the same command, an
arm at its checkpoint. All arms see the same input (identifiers and words), have the same width, batch and epochs, and
as many negatives per position, except SASRec's own loss with one. Rows of the table:

- SASRec, 1 negative: one vector, binary cross-entropy. SASRec, softmax: one vector, sampled softmax, matched negatives.
- SASRec, hard: half of the negatives are from the target's cluster. SASRec, quota merge: the softmax arm's vector, its
  list filled by the clusters' shares.
- EBR, no prompt / prefix / Hadamard: lists by quota merge, M_k = M p_k. "by probability": the same fit, no quotas.
- EBR, random clusters: the control that must lose. EBR, oracle intent: the true cluster is known, a ceiling.

"in cluster" ranks the wanted item among the unseen items of its own (k-means) cluster only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from genrec.data import EvalSet, load_dataset
from genrec.errors import GenrecError
from genrec.evaluation import metrics
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.protocol import seen_index, slices
from genrec.evaluation.report import Comparison, Report, Row, provenance, save
from genrec.io import atomic, read_json, write_json
from genrec.tools.ebr import EBR, Controls, EBRConfig
from genrec.tools.ebr.clusters import Clusters, divide
from genrec.tools.ebr.merge import apportion, sharpened
from training.fit import SPLITS

ONE = {"single": True, "prompt": "none"}
ARMS: dict[str, dict[str, Any]] = {
    "bce": ONE | {"negatives_from": "catalogue", "loss": "bce"},
    "softmax": ONE | {"negatives_from": "catalogue"},
    "hard": ONE | {"negatives_from": "mixed"},
    "none": {"prompt": "none"},
    "prefix": {"prompt": "prefix"},
    "hadamard": {"prompt": "hadamard"},
    "random": {"prompt": "hadamard", "divide": "random"},
}
OURS, MATCHED = "EBR, Hadamard", "SASRec, softmax"
SYSTEMS = {  # row of the table -> (arm, how its list is made)
    "SASRec, 1 negative": ("bce", "global"),
    MATCHED: ("softmax", "global"),
    "SASRec, hard": ("hard", "global"),
    "SASRec, quota merge": ("softmax", "quota"),
    "EBR, no prompt": ("none", "quota"),
    "EBR, no prompt, by probability": ("none", "global"),
    "EBR, prefix": ("prefix", "quota"),
    OURS: ("hadamard", "quota"),
    "EBR, Hadamard, by probability": ("hadamard", "global"),
    "EBR, random clusters": ("random", "quota"),
    "EBR, oracle intent": ("hadamard", "oracle"),
}
COMPARED = [(OURS, other) for other in (MATCHED, "EBR, no prompt", "EBR, prefix", "EBR, random clusters")]
COMPARED += [(name, MATCHED) for name in ("EBR, Hadamard, by probability", "EBR, no prompt", "SASRec, quota merge")]
COMPARED += [("EBR, no prompt, by probability", MATCHED), (MATCHED, "SASRec, 1 negative")]
CUTS = (20, 100, 500)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
CURVE, LIST = 2000, 100  # requests and list length of the alpha curve
CHUNK = 256


def above_of(scores: np.ndarray, own: np.ndarray, clusters: Clusters) -> np.ndarray:
    """How many items of each cluster score higher than the wanted one, int64 [B, K]. scores: [B, N], -inf for seen."""
    higher = scores[:, clusters.order] > own[:, None]
    return np.add.reduceat(higher, clusters.offsets[:-1], axis=1, dtype=np.int64)


def measure(ebr: EBR, requests: EvalSet, common: Clusters, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Per request: rank in the ranking by probability; in the quota lists of 10, 20, 100 and 500 items, and in those of
    the oracle; in the own cluster of `common`. inf where the item is not in the list; a seen wanted item is a miss."""
    out: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(requests), CHUNK):
        part = requests.take(np.arange(start, min(start + CHUNK, len(requests))))
        log_p, inside = ebr.parts(ebr.user_vectors(part.contexts))
        scores = ebr.scores(log_p, inside)
        at = np.arange(len(part))
        own = scores[at, part.targets].copy()
        scores[seen_index(part.contexts)] = -np.inf
        missed = ~np.isfinite(scores[at, part.targets])
        above = above_of(scores, own, ebr.clusters)
        left = np.add.reduceat(np.isfinite(scores[:, ebr.clusters.order]), ebr.clusters.offsets[:-1], axis=1, dtype=int)
        home = ebr.clusters.of[part.targets]
        known = np.full(log_p.shape, -np.inf)
        known[at, home] = 0.0
        found = {"global": above.sum(axis=1).astype(float)}
        found["inside"] = above_of(scores, own, common)[at, common.of[part.targets]].astype(float)
        for m in (10, *CUTS):
            for name, shares in (("quota", sharpened(log_p, ebr.config.alpha)), ("oracle", np.exp(known))):
                counts = apportion(m, shares, left)
                rank = np.minimum(above, counts).sum(axis=1).astype(float)
                found[f"{name}{m}"] = np.where(above[at, home] < counts[at, home], rank, np.inf)
        for name, ranks in found.items():
            out.setdefault(name, []).append(np.where(missed, np.inf, ranks))
        if start % (CHUNK * 16) == 0:
            say(f"{start + len(part):,} of {len(requests):,} requests ranked")
    return {name: np.concatenate(parts) for name, parts in out.items()}


def alpha_curve(ebr: EBR, requests: EvalSet, items: int) -> list[dict[str, float]]:
    """Per alpha: mean entropy of the lists' clusters in bits, recall, and share of the catalogue in some list."""
    sample, curve = requests.sample(CURVE, seed=3), []
    for alpha in ALPHAS:
        lists = [e.items for e in ebr.retrieve(sample.contexts, LIST, Controls(alpha=alpha))]
        entropy = []
        for rows in lists:
            p = np.bincount(ebr.clusters.of[rows], minlength=len(ebr.clusters)) / max(1, len(rows))
            entropy.append(float(-(p[p > 0] * np.log2(p[p > 0])).sum()))
        hits = [float(t in rows) for t, rows in zip(sample.targets, lists, strict=True)]
        point = {"alpha": alpha, "entropy": float(np.mean(entropy)), f"recall@{LIST}": float(np.mean(hits))}
        curve.append(point | {"coverage": len(np.unique(np.concatenate(lists))) / items})
    return curve


def fit(args: argparse.Namespace) -> None:
    dataset = load_dataset(args.data)
    split = SPLITS[args.protocol](dataset)
    for seed in args.seeds:
        for arm in args.arms:
            folder = args.work / f"{arm}.{seed}"
            if (folder / "done.json").is_file():
                print(f"{folder.name}: done before", flush=True)
                continue
            changes = ARMS[arm] | {"seed": seed} | json.loads(args.settings)
            ebr = EBR(EBRConfig(**changes))
            ebr.work = folder / "work"
            ebr.say = lambda line, name=folder.name: print(f"{name}: {line}", flush=True)  # type: ignore[misc]
            clock = (time.perf_counter(), time.process_time())
            ebr.fit(split.train, dataset.catalog)
            spent = {"seconds": time.perf_counter() - clock[0], "cpu_seconds": time.process_time() - clock[1]}
            ebr.save(folder / "tool")
            common = divide(split.train, dataset.catalog, EBRConfig(clusters=ebr.config.clusters, seed=seed))
            for name, ranks in measure(ebr, split.test, common, ebr.say).items():
                with atomic(folder / f"{name}.npy") as path, path.open("wb") as file:
                    np.save(file, ranks)
            about = spent | {"settings": changes, "steps": ebr.learned.steps, "held_out": ebr.learned.best}
            if arm == "hadamard":
                about["curve"] = alpha_curve(ebr, split.test, len(dataset.catalog))
            write_json(folder / "done.json", about)
            print(f"{folder.name}: {spent['cpu_seconds']:.0f} s of processor time", flush=True)


def values_of(folders: list[Path], kind: str) -> dict[str, np.ndarray]:
    """Metric -> one value per request, the seeds one after the other."""

    def ranks(name: str) -> np.ndarray:
        return np.concatenate([np.load(f / f"{name}.npy") for f in folders])

    first = ranks("global" if kind == "global" else f"{kind}10")
    out = {"HR@10": metrics.hit_rate(first, 10), "NDCG@10": metrics.ndcg(first, 10)}
    for m in CUTS:
        out[f"Recall@{m}"] = metrics.hit_rate(ranks("global" if kind == "global" else f"{kind}{m}"), m)
    inside = ranks("inside")
    return out | {f"in cluster @{m}": metrics.hit_rate(inside, m) for m in (10, 50)}


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    dataset = load_dataset(args.data)
    split = SPLITS[args.protocol](dataset)
    there = {arm: [args.work / f"{arm}.{s}" for s in args.seeds] for arm in ARMS}
    there = {arm: fs for arm, fs in there.items() if all((f / "done.json").is_file() for f in fs)}
    if not there:
        raise GenrecError(f"{args.work} holds no arm that is finished for seeds {args.seeds}; run fit first")
    requests = split.test.take(np.tile(np.arange(len(split.test)), len(args.seeds)))
    values = {name: values_of(there[arm], kind) for name, (arm, kind) in SYSTEMS.items() if arm in there}
    rows, pairs = [], []
    for part, mask in slices(requests).items():
        if not mask.any():
            continue
        count, users = int(mask.sum()) // len(args.seeds), requests.users[mask]
        for name, found in values.items():
            intervals = bootstrap(np.stack(list(found.values()), axis=1)[mask], users)
            row = dict(zip(found, intervals, strict=True))
            rows.append(Row(name, part, count, len(np.unique(users)), row))
        for name, base in COMPARED:
            if name in values and base in values:
                left, right = (np.stack(list(values[n].values()), axis=1)[mask] for n in (name, base))
                found = dict(zip(values[name], paired(left, right, users), strict=True))
                pairs.append(Comparison(name, base, part, count, found))
    about = provenance(split.note, {f"fit {i}": s for i, s in enumerate(args.seeds)}, time.perf_counter() - clock)
    costs = {arm: [read_json(f / "done.json") for f in fs] for arm, fs in there.items()}
    about["arms"] = {
        arm: {
            "settings": {k: v for k, v in found[0]["settings"].items() if k != "seed"},
            "cpu_seconds": [round(f["cpu_seconds"], 1) for f in found],
            "ms_per_step": [round(1000 * f["cpu_seconds"] / max(1, f["steps"]), 1) for f in found],
        }
        for arm, found in costs.items()
    }
    about["verdicts"] = verdicts([p for p in pairs if p.slice == "all"], rows)
    curves = [f["curve"] for f in costs.get("hadamard", [])]
    if curves:
        about["alpha"] = [mean_of([c[i] for c in curves]) for i in range(len(ALPHAS))]
        plot_alpha(about["alpha"], args.out / "alpha.png")
    plots = ("NDCG@10", "Recall@100")
    save(Report(f"{dataset.name}: divide and conquer or one vector", tuple(rows), tuple(pairs), about), args.out, plots)
    for name, verdict in about["verdicts"].items():
        print(f"{name}: {verdict}")


def mean_of(points: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([p[key] for p in points])), 5) for key in points[0]}


def verdicts(pairs: list[Comparison], rows: list[Row]) -> dict[str, str]:
    """The targets of the issue, in words."""
    out = {}
    for pair in pairs:
        if (pair.system, pair.baseline) in ((OURS, MATCHED), ("EBR, Hadamard, by probability", MATCHED)):
            for metric in ("Recall@100", "in cluster @10"):
                i = pair.differences[metric]
                word = "above" if i.low > 0 else "below" if i.high < 0 else "not told apart"
                out[f"{pair.system} - {pair.baseline}, {metric}"] = (
                    f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}], {word}"
                )
    for row in rows:
        if row.slice == "all" and row.system == "EBR, Hadamard, by probability":
            reached = row.metrics["HR@10"].mean >= 0.08 and row.metrics["NDCG@10"].mean >= 0.048
            out["HR@10 >= .0800 and NDCG@10 >= .0480"] = "reached" if reached else "not reached"
    return out


def plot_alpha(curve: list[dict[str, float]], path: Path) -> None:
    """Entropy, recall and coverage against alpha."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in curve[0] if n != "alpha"]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axes.plot([c["alpha"] for c in curve], [c[name] for c in curve], marker="o")
        axes.set_title(f"{name}, lists of {LIST}", loc="left", fontsize=10)
        axes.set_xlabel("alpha")
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("fit", fit), ("table", table)):
        one = commands.add_parser(name)
        one.add_argument("--data", required=True)
        one.add_argument("--protocol", default="leave-one-out", choices=SPLITS)
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        one.add_argument("--work", type=Path, required=True)
        one.set_defaults(run=run)
        if name == "fit":
            one.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
            one.add_argument("--settings", default="{}", help="JSON: fields of EBRConfig that all arms share")
        else:
            one.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        args.run(args)
    except GenrecError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
