"""Divide-and-conquer EBR against one user vector: which part of it is worth what?

    python tests/benchmarks/compare_ebr.py fit --data amazon14:FOLDER --work ebr-arms --seeds 0 1 2
    python tests/benchmarks/compare_ebr.py table --data amazon14:FOLDER --work ebr-arms --out ebr-beauty

`fit` trains every arm of every seed and ranks the test requests once; a killed run goes on with the same command, an
arm at its checkpoint. All arms see the same input (identifiers and words), have the same width and steps, and as many
negatives per position, except SASRec's own loss with one. Everything is chosen on validation requests: the weights by
Recall@100 of the ranking by probability, measured every `check` steps to the end; then, for lists by quota, alpha by
their Recall@100. With 512 negatives the softmax is nearly whole: `--negatives 16` shows what kind they should be.

A step has as many sequences in every arm, which is what costs time. But a sequence with a prompt learns only the
positions in its cluster (on Amazon Beauty a step has a quarter of them, and the same steps a quarter of the epochs).
Arms called `few` have batches so small that they learn as many positions a step, and as many epochs, as the Hadamard
arm; so has the one with random clusters. A prompt is worth what Hadamard has over both kinds. Rows of the table:

- SASRec, 1 negative: one vector, binary cross-entropy. SASRec, softmax: one vector, sampled softmax, as many negatives
  per position; SASRec, few, all negatives: as many in a step as all clusters have together.
- SASRec, hard: half of the negatives are from the target's cluster (not tuned; that cluster then counts twice).
  SASRec, quota merge: the softmax arm's vector, its list filled by the clusters' shares.
- EBR, no prompt / prefix / Hadamard: lists by quota merge, M_k = M p_k^alpha / sum p^alpha. "by probability": the same
  fit, no quotas: under the model's own probabilities no list of M has a higher expected recall, so a quota can win only
  where the model is wrong. It buys control, not recall.
- EBR, random clusters: the control that must lose. EBR, oracle intent: the true cluster is known, a ceiling.

"in cluster" ranks the wanted item among the unseen items of its own (k-means) cluster only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from command import run_command
from kept import check, claim, differing, fingerprint

from genrec.contracts import UserContext
from genrec.data import Catalog, EvalSet, Sequences, load_dataset
from genrec.errors import GenrecError
from genrec.evaluation import metrics
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.protocol import seen_index, slices
from genrec.evaluation.report import Comparison, Report, Row, provenance, save
from genrec.io import atomic, read_json, write_json
from genrec.tools.ebr import EBR, Controls, EBRConfig
from genrec.tools.ebr.clusters import Clusters, divide
from genrec.tools.ebr.merge import apportion, sharpened
from genrec.tools.ebr.tool import by_length
from genrec.tools.ebr.train import Batches
from genrec.tools.ebr.vectors import ItemVectors
from training.fit import SPLITS

ONE = {"single": True, "prompt": "none"}
ARMS: dict[str, dict[str, Any]] = {
    "bce": ONE | {"negatives_from": "catalogue", "loss": "bce"},
    "softmax": ONE | {"negatives_from": "catalogue"},
    "softmax-few": ONE | {"negatives_from": "catalogue"},
    "softmax-many": ONE | {"negatives_from": "catalogue"},
    "hard": ONE | {"negatives_from": "mixed"},
    "none": {"prompt": "none"},
    "none-few": {"prompt": "none"},
    "prefix": {"prompt": "prefix"},
    "hadamard": {"prompt": "hadamard"},
    "random": {"prompt": "hadamard", "divide": "random"},
}
MANY = "softmax-many"  # as many negatives in a step as all clusters have together
LIKE_HADAMARD = ("softmax-few", MANY, "none-few", "random")  # as many learned positions a step as the Hadamard arm
OURS, FREE, MATCHED = "EBR, Hadamard", "EBR, Hadamard, by probability", "SASRec, softmax"
SYSTEMS = {  # row of the table -> (arm, how its list is made)
    "SASRec, 1 negative": ("bce", "global"),
    MATCHED: ("softmax", "global"),
    "SASRec, softmax, few": ("softmax-few", "global"),
    "SASRec, few, all negatives": (MANY, "global"),
    "SASRec, hard": ("hard", "global"),
    "SASRec, quota merge": ("softmax", "quota"),
    "EBR, no prompt": ("none", "quota"),
    "EBR, no prompt, by probability": ("none", "global"),
    "EBR, no prompt, few": ("none-few", "quota"),
    "EBR, no prompt, few, by probability": ("none-few", "global"),
    "EBR, prefix": ("prefix", "quota"),
    "EBR, prefix, by probability": ("prefix", "global"),
    OURS: ("hadamard", "quota"),
    FREE: ("hadamard", "global"),
    "EBR, random clusters": ("random", "quota"),
    "EBR, random clusters, by probability": ("random", "global"),
    "EBR, oracle intent": ("hadamard", "oracle"),
}
SINGLE = (MATCHED, "SASRec, softmax, few", "SASRec, few, all negatives")
QUOTA = ("EBR, no prompt", "EBR, no prompt, few", "EBR, prefix", "EBR, random clusters")
COMPARED = [(OURS, other) for other in (*SINGLE, FREE, *QUOTA)]
COMPARED += [(FREE, other) for other in (*SINGLE, *(f"{name}, by probability" for name in QUOTA))]
COMPARED += [(name, MATCHED) for name in ("EBR, no prompt", "EBR, no prompt, by probability", "SASRec, quota merge")]
COMPARED += [(MATCHED, "SASRec, 1 negative")]
CUTS = (20, 100, 500)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
CURVE, LIST = 1000, 100  # requests and list length of the alpha curve
WATCHED, CHOSEN = 2000, 8000  # validation requests that choose the weights, and alpha
CHUNK = 256


def encoded(ebr: EBR, contexts: list[UserContext]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions, log p of the clusters and log softmax inside them, a chunk of requests of like length at a time."""
    for at in by_length([len(c.history) for c in contexts], CHUNK):
        yield at, *ebr.parts(ebr.user_vectors([contexts[i] for i in at]))


def above_of(scores: np.ndarray, own: np.ndarray, clusters: Clusters) -> np.ndarray:
    """How many items of each cluster score higher than the wanted one, int64 [B, K]. scores: [B, N], -inf for seen."""
    higher = scores[:, clusters.order] > own[:, None]
    return np.add.reduceat(higher, clusters.offsets[:-1], axis=1, dtype=np.int64)


def seen_out(scores: np.ndarray, part: EvalSet) -> tuple[np.ndarray, np.ndarray]:
    """Sets seen items to -inf in place; the wanted items' scores, and which requests want a seen one, [B]."""
    at = np.arange(len(part))
    own = scores[at, part.targets].copy()
    scores[seen_index(part.contexts)] = -np.inf
    return own, ~np.isfinite(scores[at, part.targets])


def left_in(scores: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Unseen items of each cluster, int64 [B, K]."""
    return np.add.reduceat(np.isfinite(scores[:, clusters.order]), clusters.offsets[:-1], axis=1, dtype=np.int64)


def ranks_of(
    ebr: EBR, part: EvalSet, log_p: np.ndarray, inside: np.ndarray, common: Clusters, alpha: float
) -> dict[str, np.ndarray]:
    """See `measure`."""
    at, clusters = np.arange(len(part)), ebr.clusters
    scores = ebr.scores(log_p, inside, 1.0)
    own, missed = seen_out(scores, part)
    above, left, home = above_of(scores, own, clusters), left_in(scores, clusters), clusters.of[part.targets]
    found = {"global": above.sum(axis=1).astype(float)}
    found["inside"] = above_of(scores, own, common)[at, common.of[part.targets]].astype(float)
    known = np.zeros(log_p.shape)
    known[at, home] = 1.0
    shares = sharpened(log_p, alpha)
    ways = {"oracle": (known, above), "quota": (shares, above)}
    if alpha != 1.0:  # the list is ordered by the scores of its alpha
        shift = np.log(np.maximum(shares, 1e-30)) - np.log(np.maximum(sharpened(log_p, 1.0), 1e-30))
        scores += shift[:, clusters.of]
        ways["quota"] = (shares, above_of(scores, own + shift[at, home], clusters))
    for m in (10, *CUTS):
        for name, (share, higher) in ways.items():
            counts = apportion(m, share, left)
            rank = np.minimum(higher, counts).sum(axis=1).astype(float)
            found[f"{name}{m}"] = np.where(above[at, home] < counts[at, home], rank, np.inf)
    return {name: np.where(missed, np.inf, ranks) for name, ranks in found.items()}


def measure(ebr: EBR, requests: EvalSet, common: Clusters, alpha: float) -> dict[str, np.ndarray]:
    """Per request: rank in the ranking by probability; in the quota lists of 10, 20, 100 and 500 items at alpha, and in
    those of the oracle; in the own cluster of `common`. inf where the item is not in the list; a seen wanted item is a
    miss."""
    out: dict[str, np.ndarray] = {}
    for at, log_p, inside in encoded(ebr, requests.contexts):
        for name, ranks in ranks_of(ebr, requests.take(at), log_p, inside, common, alpha).items():
            out.setdefault(name, np.full(len(requests), np.inf))[at] = ranks
    return out


def recall(ebr: EBR, requests: EvalSet) -> float:
    """Recall@LIST of the ranking by probability, which chooses the weights of every arm."""
    hits = 0
    for at, log_p, inside in encoded(ebr, requests.contexts):
        scores = ebr.scores(log_p, inside, 1.0)
        own, missed = seen_out(scores, requests.take(at))
        hits += int((~missed & ((scores > own[:, None]).sum(axis=1) < LIST)).sum())
    return hits / max(1, len(requests))


def choose_alpha(ebr: EBR, requests: EvalSet) -> tuple[float, list[float]]:
    """The alpha of the quota lists with the best Recall@LIST (of equals, nearest to 1), and the recall of each."""
    hits = np.zeros(len(ALPHAS))
    for at, log_p, inside in encoded(ebr, requests.contexts):
        part, b = requests.take(at), np.arange(len(at))
        own, missed = seen_out(inside, part)
        home = ebr.clusters.of[part.targets]
        above, left = above_of(inside, own, ebr.clusters)[b, home], left_in(inside, ebr.clusters)
        for i, alpha in enumerate(ALPHAS):
            hits[i] += (~missed & (above < apportion(LIST, sharpened(log_p, alpha), left)[b, home])).sum()
    best = max(range(len(ALPHAS)), key=lambda i: (hits[i], -abs(ALPHAS[i] - 1)))
    return ALPHAS[best], (hits / max(1, len(requests))).tolist()


def alpha_curve(ebr: EBR, requests: EvalSet, items: int) -> list[dict[str, float]]:
    """Per alpha: mean entropy of the lists' clusters in bits, recall, and share of the catalogue in some list."""
    sample, by_quota = requests.sample(CURVE, seed=3), ebr.steered(Controls(merge="quota"))
    lists: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] * len(sample) for _ in ALPHAS]
    for at, log_p, inside in encoded(ebr, sample.contexts):
        for mine, alpha in zip(lists, ALPHAS, strict=True):
            for i, row in zip(at, ebr.scores(log_p, inside, alpha), strict=True):
                mine[i] = by_quota.evidence(sample.contexts[i], row, LIST).items
    curve = []
    for alpha, mine in zip(ALPHAS, lists, strict=True):
        entropy = []
        for rows in mine:
            p = np.bincount(ebr.clusters.of[rows], minlength=len(ebr.clusters)) / max(1, len(rows))
            entropy.append(float(-(p[p > 0] * np.log2(p[p > 0])).sum()))
        hits = [float(t in rows) for t, rows in zip(sample.targets, mine, strict=True)]
        point = {"alpha": alpha, "entropy": float(np.mean(entropy)), f"recall@{LIST}": float(np.mean(hits))}
        curve.append(point | {"coverage": len(np.unique(np.concatenate(mine))) / items})
    return curve


def config_of(arm: str, seed: int, args: argparse.Namespace) -> EBRConfig:
    """The settings of an arm: its own, and what all share. No run ends early, so all have as many steps."""
    asked = {"negatives": args.negatives, "clusters": args.clusters}
    shared = json.loads(args.settings) | {name: value for name, value in asked.items() if value is not None}
    try:
        return EBRConfig(**({"patience": 0} | shared | ARMS[arm] | {"seed": seed}))
    except TypeError as error:
        raise GenrecError(f"--settings {args.settings}: {error}") from None


def epoch_of(config: EBRConfig, train: Sequences, catalog: Catalog, vectors: ItemVectors) -> int:
    """Training sequences of an epoch, those with a prompt and those without; together they learn each position once."""
    return len(Batches(train, divide(train, catalog, config, vectors), config).rows_of(0))


def fit(args: argparse.Namespace) -> None:
    dataset = load_dataset(args.data)
    split = SPLITS[args.protocol](dataset)
    about = {"data": fingerprint(dataset), "protocol": args.protocol}
    vectors = ItemVectors(split.train, dataset.catalog)
    watched, chosen = split.validation.sample(WATCHED, seed=5), split.validation.sample(CHOSEN, seed=6)
    for seed in args.seeds:
        for arm in args.arms:
            folder, config = args.work / f"{arm}.{seed}", config_of(arm, seed, args)
            if claim(folder, about | {"settings": asdict(config)}):
                print(f"{folder.name}: done before", flush=True)
                continue
            epoch = epoch_of(config, split.train, dataset.catalog, vectors)
            if arm in LIKE_HADAMARD:
                its = epoch_of(config_of("hadamard", seed, args), split.train, dataset.catalog, vectors)
                config = replace(config, rows=max(1, round(config.rows * epoch / its)))
            if arm == MANY:
                config = replace(config, negatives=config.negatives * config.clusters)
            ebr = EBR(config)
            ebr.work, ebr.vectors = folder / "work", vectors
            ebr.say = lambda line, name=folder.name: print(f"{name}: {line}", flush=True)  # type: ignore[misc]
            ebr.judge = lambda tool: recall(tool, watched)
            clock = time.process_time()
            ebr.fit(split.train, dataset.catalog)
            done: dict[str, Any] = {"cpu_seconds": time.process_time() - clock, "learned": asdict(ebr.learned)}
            done |= {"rows": config.rows, "epochs": ebr.learned.steps * config.rows / epoch}
            ebr.save(folder / "tool")
            done["alpha"], done["recall_of_alphas"] = choose_alpha(ebr, chosen)
            common = divide(split.train, dataset.catalog, EBRConfig(clusters=config.clusters, seed=seed), vectors)
            for name, ranks in measure(ebr, split.test, common, done["alpha"]).items():
                with atomic(folder / f"{name}.npy") as path, path.open("wb") as file:
                    np.save(file, ranks)
            if arm == "hadamard":
                done["curve"] = alpha_curve(ebr, split.test, len(dataset.catalog))
            done["all_cpu_seconds"] = time.process_time() - clock
            write_json(folder / "done.json", done)
            print(f"{folder.name}: {done['all_cpu_seconds']:.0f} s of processor time", flush=True)


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
    shared = shared_settings(there)
    identity = {"data": fingerprint(dataset), "protocol": args.protocol}
    check([folder for fs in there.values() for folder in fs], identity)
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
    about["settings"] = shared
    about["arms"] = {
        arm: {
            "settings": ARMS[arm],
            "alpha": [f["alpha"] for f in found],
            "steps": [f["learned"]["steps"] for f in found],
            "rows": [f["rows"] for f in found],
            "epochs": [round(f["epochs"], 1) for f in found],
            "best_step": [f["learned"]["best_step"] for f in found],
            "validation": [f["learned"]["best"] for f in found],
            "cpu_seconds": [round(f["cpu_seconds"], 1) for f in found],
            "ms_per_step": [round(1000 * f["learned"]["step_seconds"], 1) for f in found],
        }
        for arm, found in costs.items()
    }
    per_seed = {
        name: {m: [float(v.mean()) for v in np.split(x, len(args.seeds))] for m, x in found.items()}
        for name, found in values.items()
    }
    about["per_seed"] = {
        name: {m: [round(v, 5) for v in found[m]] for m in ("NDCG@10", f"Recall@{LIST}")}
        for name, found in per_seed.items()
    }
    about["verdicts"] = verdicts([p for p in pairs if p.slice == "all"], rows, per_seed)
    curves = [f["curve"] for f in costs.get("hadamard", [])]
    if curves:
        about["alpha"] = [mean_of([c[i] for c in curves]) for i in range(len(ALPHAS))]
        falls = all(a["entropy"] >= b["entropy"] for c in curves for a, b in pairwise(c))
        about["verdicts"]["cluster entropy falls as alpha rises"] = "in every seed" if falls else "not in every seed"
        plot_alpha(about["alpha"], args.out / "alpha.png")
    plots = ("NDCG@10", "Recall@100")
    save(Report(f"{dataset.name}: divide and conquer or one vector", tuple(rows), tuple(pairs), about), args.out, plots)
    for name, verdict in about["verdicts"].items():
        print(f"{name}: {verdict}")


def shared_settings(there: dict[str, list[Path]]) -> dict[str, Any]:
    """The settings that no arm sets for itself. Raises GenrecError where arms differ in one of them, or the seeds of an
    arm in any."""
    found = {f: read_json(f / "identity.json")["settings"] for folders in there.values() for f in folders}
    for own, groups in (({"seed"}, list(there.values())), ({"seed"}.union(*ARMS.values()), [list(found)])):
        for folders in groups:
            kept = [{name: v for name, v in found[f].items() if name not in own} for f in folders]
            for folder, settings in zip(folders, kept, strict=True):
                if changed := differing(kept[0], settings):
                    raise GenrecError(f"{folder} was made with other {', '.join(changed)} than {folders[0]}")
    return kept[0]


def mean_of(points: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([p[key] for p in points])), 5) for key in points[0]}


def verdicts(pairs: list[Comparison], rows: list[Row], per_seed: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """The targets of the issue, in words. The intervals are those of users; a difference counts where every seed has
    it too."""
    out = {}
    for pair in pairs:
        if pair.system in (OURS, FREE) and pair.baseline not in (OURS, *QUOTA[2:]):
            for metric in ("Recall@100", "in cluster @10"):
                i = pair.differences[metric]
                mine, theirs = (per_seed[n][metric] for n in (pair.system, pair.baseline))
                signs = {float(np.sign(a - b)) for a, b in zip(mine, theirs, strict=True)}
                word = "above" if i.low > 0 else "below" if i.high < 0 else "not told apart"
                if len(signs) > 1 and word != "not told apart":
                    word += ", but not in every seed"
                out[f"{pair.system} - {pair.baseline}, {metric}"] = (
                    f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}], {word}"
                )
    for row in rows:
        if row.slice == "all" and row.system in (OURS, FREE):
            reached = row.metrics["HR@10"].mean >= 0.08 and row.metrics["NDCG@10"].mean >= 0.048
            out[f"{row.system}: HR@10 >= .0800 and NDCG@10 >= .0480"] = "reached" if reached else "not reached"
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
            one.add_argument("--negatives", type=int, help="of every arm but the first (default: 512)")
            one.add_argument("--clusters", type=int, help="of every arm (default: 10)")
            one.add_argument("--settings", default="{}", help="JSON: further fields of EBRConfig that all arms share")
        else:
            one.add_argument("--out", type=Path, required=True)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
