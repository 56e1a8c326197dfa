"""Does the list do what was typed? Title searches, and instructions that name a category.

    python tests/benchmarks/measure_steering.py --bundle bundles/ml-100k-0 bundles/ml-100k-1 bundles/ml-100k-2 \
        --out docs/results/steering-ml-100k

Several bundles are fits of the same data with other seeds: every number is their mean, and the requests of a user in
all fits are one cluster of the interval.

Titles: every catalogue title is searched for by its words (genrec.data.scenarios.queries: at most three, so several
items may share them), without a history; found means among the first ten. Categories: for each one with at least LEAST
items and USERS test users, "CATEGORY" is typed for users whose next item is of it and for as many others; the share of
the category in the first ten stands beside the default's (nothing typed, a stored instruction left aside), and for the
former NDCG@10 of the item they wanted beside the default's. Each for the fused list and for the generator alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from genrec import Recommender
from genrec.bundle import Bundle
from genrec.candidates import GENERATOR
from genrec.contracts import UserContext
from genrec.data.scenarios import queries
from genrec.device import fastest_device
from genrec.evaluation.intervals import Interval, bootstrap
from genrec.evaluation.report import provenance
from genrec.io import write_json, write_text
from training.fit import SPLITS

LEAST, USERS, MOST, K, BATCH = 20, 20, 100, 10, 64
PARTS = {"fused": None, "generator alone": {GENERATOR: 1.0}}


def lists(
    recommender: Recommender, contexts: Sequence[UserContext], texts: Sequence[str | None], part: str
) -> np.ndarray:
    """The first K rows of each request, int64 [B, K], -1 padded."""
    out = np.full((len(contexts), K), -1)
    for start in range(0, len(contexts), BATCH):
        piece = slice(start, start + BATCH)
        traces = recommender.recommend_batch(contexts[piece], K, list(texts[piece]), weights=PARTS[part])
        for b, trace in enumerate(traces, start=start):
            rows = [item.row for item in trace.recommended]
            out[b, : len(rows)] = rows
    return out


def titles(fits: Sequence[Recommender]) -> dict[str, object]:
    asked = [(row, text) for row, text in enumerate(queries(fits[0].bundle.dataset.catalog)) if text]
    wanted, each = np.array([row for row, _ in asked]), {}
    for part in PARTS:
        hits = []
        for recommender in fits:
            context = recommender.context(history=[])
            best = lists(recommender, [context] * len(asked), [text for _, text in asked], part)
            hits.append(round(float((best == wanted[:, None]).any(1).mean()), 4))
        each[part] = hits
        print(part, hits, flush=True)
    return {
        "titles": len(asked),
        "distinct queries": len({text for _, text in asked}),
        "found in the first ten": {part: round(float(np.mean(hits)), 4) for part, hits in each.items()},
        "by fit": each,
    }


def categories(fits: Sequence[Recommender], seed: int) -> list[dict[str, object]]:
    bundle = fits[0].bundle
    catalog, test = bundle.dataset.catalog, SPLITS[bundle.config["protocol"]](bundle.dataset).test
    names = [set(path) for path in catalog.categories]
    rng = np.random.default_rng(seed)
    first = np.unique(test.users, return_index=True)[1]
    every = sorted({name for path in names for name in path})
    out = []
    for name in every:
        of = np.array([name in path for path in names])
        wanting, others = first[of[test.targets[first]]], first[~of[test.targets[first]]]
        if of.sum() < LEAST or of.mean() > 0.5 or min(len(wanting), len(others)) < USERS:
            continue
        n = min(len(wanting), len(others), MOST)
        chosen = np.concatenate([rng.permutation(wanting)[:n], rng.permutation(others)[:n]])
        contexts = [replace(test.contexts[i], user=None) for i in chosen]
        row: dict[str, object] = {"category": name, "items": int(of.sum()), "users": 2 * n}
        for part in PARTS:
            shares, gains = [], []
            for texts in ([None] * len(contexts), [name] * len(contexts)):
                every_fit = np.stack([lists(recommender, contexts, texts, part) for recommender in fits])
                shares.append((of[every_fit] & (every_fit >= 0)).sum(2) / K)  # [fits, 2 n]
                place = every_fit[:, :n] == test.targets[chosen[:n]][:, None]
                gains.append(np.where(place.any(2), 1 / np.log2(place.argmax(2) + 2), 0.0).ravel())
            change = bootstrap((gains[1] - gains[0])[:, None], np.tile(np.arange(n), len(fits)))[0]
            row[part] = {
                "default share": round(float(shares[0].mean()), 4),
                "steered share": round(float(shares[1].mean()), 4),
                "steered share by fit": [round(float(x), 4) for x in shares[1].mean(1)],
                "default NDCG@10": round(float(gains[0].mean()), 4),
                "steered NDCG@10": round(float(gains[1].mean()), 4),
                "NDCG@10 change": _interval(change),
            }
        out.append(row)
        print(row, flush=True)
    return out


def _interval(found: Interval) -> list[float]:
    return [round(float(x), 4) for x in (found.mean, found.low, found.high)]


def reached(row: dict, part: str) -> bool:
    """The goal for one category: three times the default share where that is at most .2, else .9; a share of nothing
    reaches none."""
    default, steered = row[part]["default share"], row[part]["steered share"]
    return steered > 0 and steered >= (3 * default if default <= 0.2 else 0.9) - 1e-9


def markdown(result: dict) -> str:
    lines = ["# Steering", "", f"{result['about']['command']}, commit {result['about']['commit']}", ""]
    found = result["titles"]["found in the first ten"]
    lines += [f"Titles found by their words among the first ten, of {result['titles']['titles']:,}: "]
    lines += [", ".join(f"{part} {share:.1%}" for part, share in found.items()), ""]
    lines += [
        "| category | users | part | share, default | share, steered | goal | NDCG@10, default | steered | change |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in result["categories"]:
        for part in PARTS:
            r = row[part]
            mean, low, high = r["NDCG@10 change"]
            shares = f"{r['default share']:.2f} | {r['steered share']:.2f}"
            goal = "reached" if reached(row, part) else "missed"
            relevance = f"{r['default NDCG@10']:.3f} | {r['steered NDCG@10']:.3f}"
            lines.append(
                f"| {row['category']} | {row['users']} | {part} | {shares} | {goal} | {relevance} | "
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clock, fits = time.perf_counter(), []
    for path in args.bundle:
        fits.append(Recommender(Bundle.load(path, device=fastest_device())))
        if any(fits[0].bundle.config[name] != fits[-1].bundle.config[name] for name in ("data", "inputs", "protocol")):
            raise SystemExit(f"{path} was fitted on other data, or with another protocol, than {args.bundle[0]}")
    result: dict = {"titles": titles(fits)}
    result["categories"] = categories(fits, args.seed)
    seeds = {f"fit {i}": fit.bundle.config["seed"] for i, fit in enumerate(fits)}
    result["about"] = provenance("see the script", seeds | {"users": args.seed}, time.perf_counter() - clock)
    write_json(args.out / "steering.json", result)
    write_text(args.out / "steering.md", markdown(result))


if __name__ == "__main__":
    main()
