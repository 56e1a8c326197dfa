"""CAPTS against rules, PinnerSage, PDN and the oracle: which way of choosing triggers finds most of what comes later?

    python tests/benchmarks/compare_capts.py fit --data amazon14:FOLDER --work capts-arms --seeds 0 1 2
    python tests/benchmarks/compare_capts.py table --data amazon14:FOLDER --work capts-arms --out capts-beauty

The clock splits the events 60/20/20: tables for the replay are of the first slice, the replay looks ahead into the
second, and final tables are of both. A test request is a user with `--least` events and more before the last slice and
something new in it; all of that is wanted. The replay's window is as long as that slice, unless --settings say
otherwise; then the test's is as long as the replay's. Every policy routes the same quota of (trigger, channel) pairs
over the same tables, and fetches K items in all, K / quota a pair: an item that two pairs bring costs twice and counts
once. Where all events weigh the same and are rated (MovieLens), a rating over the mean is the event's weight, so that
the policy `feedback` and the control have feedback; on Amazon they have none, and `feedback` is `recent`.

Arms beside the policies: `on-trigger feedback`, the same network trained on feedback on the trigger itself (isolates
the Value Attribution Module); `independent`, the same values without shared routing (isolates the routing). The oracle
knows the future and is solved exactly. `fit` ranks everything once and keeps what it finds; a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from command import run_command
from kept import check, claim, fingerprint

from genrec.contracts import UserContext
from genrec.data import Catalog, Dataset, Sequences, load_dataset
from genrec.errors import GenrecError
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.report import Comparison, Report, Row, provenance, save
from genrec.io import atomic, read_json, write_json
from genrec.tools.capts import CAPTS, CAPTSConfig
from genrec.tools.capts.channels import Channels
from genrec.tools.capts.policies import pair_scores, retrieved
from genrec.tools.capts.requests import DAY, Replay, Triggers, triggers_of, unseen
from genrec.tools.capts.routing import best_cover, best_set, overlaps, total

TEST = 0.2  # share of the events, by the clock
RULES = ("recent", "feedback", "pinnersage")
POLICIES = ("learned", "independent", "pdn", *RULES)
OURS, CONTROL, ORACLE = "learned", "on-trigger feedback", "oracle"
CUTS = (50, 100, 500)
AT = 100  # K of the per-channel numbers
BINS = 10
CURVE = 1000  # users of the quota curve
CHUNK = 256
SMALL, SOLVED = 32, 100  # pairs at most, and requests, that greed is compared on with the exact best set


class Shared(CAPTS):
    """CAPTS whose tables are fitted once for the arms of a seed."""

    def __init__(self, config: CAPTSConfig, kept: dict[str, Channels]) -> None:
        super().__init__(config)
        self.kept = kept

    def _tables(self, train: Sequences, catalog: Catalog, name: str) -> Channels:
        if name not in self.kept:
            self.kept[name] = super()._tables(train, catalog, name)
        return self.kept[name]


def load(source: str) -> Dataset:
    """The data set, with ratings as weights where there is no other feedback."""
    dataset = load_dataset(source)
    s = dataset.sequences
    if np.ptp(s.weights) or np.isnan(s.ratings).all():
        return dataset
    weights = np.nan_to_num(s.ratings / np.nanmean(s.ratings), nan=1.0).astype(np.float32)
    return replace(dataset, sequences=replace(s, weights=weights))


def cut_of(dataset: Dataset) -> float:
    return float(np.quantile(dataset.sequences.times, 1 - TEST, method="higher"))


def train_of(dataset: Dataset) -> Sequences:
    """What any policy may know."""
    return dataset.sequences.keep(dataset.sequences.times < cut_of(dataset))


def window_of(dataset: Dataset) -> float:
    """Days from the cut to the end."""
    return float(np.ceil((dataset.sequences.times.max() - cut_of(dataset) + 1) / DAY))


def test_requests(
    dataset: Dataset, least: int, window: float
) -> tuple[list[UserContext], list[np.ndarray], np.ndarray]:
    """Contexts of everything before the cut, what is new in the `window` days after it, and user positions."""
    s, cut = dataset.sequences, cut_of(dataset)
    contexts, wanted, users = [], [], []
    for u in range(len(s)):
        mine = slice(int(s.offsets[u]), int(s.offsets[u + 1]))
        n, until = np.searchsorted(s.times[mine], [cut, cut + window * DAY]).tolist()
        new = np.setdiff1d(s.items[mine][n:until], s.items[mine][:n])
        if n >= least and len(new):
            contexts.append(s.context(u, n))
            wanted.append(new.astype(np.int64))
            users.append(u)
    return contexts, wanted, np.array(users)


def describe(found: list[np.ndarray], pairs: list[tuple[int, int]], channels: int, wanted: np.ndarray) -> list[float]:
    """Mean Jaccard overlap of the channels' result sets, unique hits, and each channel's recall."""
    nothing = np.zeros(0, np.int64)
    of = [[f for f, (_, channel) in zip(found, pairs, strict=True) if channel == c] for c in range(channels)]
    sets = [np.unique(np.concatenate([nothing, *mine])) for mine in of]
    overlap = [
        len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        for i, a in enumerate(sets)
        for b in sets[i + 1 :]
        if len(a) and len(b)
    ]
    hits = np.stack([np.isin(wanted, s) for s in sets])
    unique = float((hits & (hits.sum(axis=0) == 1)).sum())
    return [float(np.mean(overlap)) if overlap else 0.0, unique, *hits.mean(axis=1).tolist()]


def measure(tool: CAPTS, contexts: list[UserContext], wanted: list[np.ndarray], oracle: bool = False) -> np.ndarray:
    """float64 [B, 3 + 2 + C]: union recall at CUTS, overlap and unique hits at AT, recall of each channel at AT."""
    rows, c, quota = [], len(tool.channels.names), tool.config.quota
    for start in range(0, len(contexts), CHUNK):
        part = contexts[start : start + CHUNK]
        if oracle:
            triggers = triggers_of(part, tool.config)
        else:
            triggers, _, found = tool.route(part)
        for b in range(len(part)):
            mine, new, seen = triggers.rows[b], wanted[start + b], triggers.seen[b]
            values = []
            for k in CUTS:
                if oracle:
                    lists = unseen(tool.channels, mine[mine >= 0], seen, k // quota + 1)
                    pairs = best_cover(lists, new, quota, k)
                else:
                    pairs = found[b].pairs
                brought = retrieved(pairs, mine, tool.channels, seen, k, quota)
                values.append(float(np.isin(new, np.concatenate([np.zeros(0, int), *brought])).mean()))
                if k == AT:
                    about = describe(brought, pairs, c, new)
            rows.append(values + about)
    return np.array(rows)


def calibration(tool: CAPTS, contexts: list[UserContext], wanted: list[np.ndarray]) -> dict[str, Any]:
    """Per channel: mean value and share of true labels in BINS equal bins of the test's pairs."""
    futures = np.full((len(contexts), max(map(len, wanted))), -1)
    for b, new in enumerate(wanted):
        futures[b, : len(new)] = new
    test = Replay(contexts, futures, np.ones(futures.shape, np.float32), np.arange(len(contexts)))
    triggers = triggers_of(contexts, tool.config)
    label, _, there = tool.labels(test, triggers, tool.channels)
    said = np.zeros(label.shape, np.float32)
    for at in np.array_split(np.arange(len(contexts)), -(-len(contexts) // CHUNK)):
        values = tool.values(Triggers(triggers.rows[at], triggers.about[at]))
        if values is None:
            return {}
        said[at] = values.value
    out = {}
    for c, name in enumerate(tool.channels.names):
        p, y = said[..., c][there[..., c]], label[..., c][there[..., c]]
        parts = [part for part in np.array_split(np.argsort(p), BINS) if len(part)]
        out[name] = [[float(p[x].mean()), float(y[x].mean())] for x in parts]
    return out


def greed(tool: CAPTS, contexts: list[UserContext]) -> dict[str, float]:
    """What greedy routing is worth beside the exact best set, over the first SOLVED requests of at most SMALL pairs."""
    config, shares = tool.config, []
    most = SMALL // len(tool.channels.names)
    some = [c for c in contexts if len(set(c.history)) <= most][:SOLVED]
    triggers, values, found = tool.route(some)
    scores = pair_scores(triggers, values, tool.channels, tool.content, config).astype(np.float64)
    for b, lists in enumerate(triggers.lists(tool.channels, config.depth)):
        n, c = int((triggers.rows[b] >= 0).sum()), lists.shape[1]
        overlap, flat = overlaps(lists[:n].reshape(n * c, -1)), scores[b, :n].ravel()
        best = best_set(scores[b, :n], lists[:n], config.quota, config.discount, config.least, config.most)
        greedy, exact = (
            total(flat, overlap, [h * c + x for h, x in pairs], config.discount) for pairs in (found[b].pairs, best)
        )
        shares.append(greedy / exact if exact > 0 else 1.0)
    if not shares:
        return {"requests": 0}
    mean, least = float(np.mean(shares)), float(np.min(shares))
    return {"requests": len(shares), "greedy / exact, mean": mean, "greedy / exact, least": least}


def fit(args: argparse.Namespace) -> None:
    dataset = load(args.data)
    train, settings = train_of(dataset), {"window": window_of(dataset)} | json.loads(args.settings)
    try:
        config = CAPTSConfig(**settings)
    except TypeError as error:
        raise GenrecError(f"--settings {args.settings}: {error}") from None
    contexts, wanted, users = test_requests(dataset, args.least, config.window)
    if len(users) < 2:
        raise GenrecError(
            f"{dataset.name} has {len(users)} users with {args.least} events before the cut and new ones after"
        )
    print(f"{len(users):,} users, {sum(map(len, wanted)):,} wanted items", flush=True)
    identity = {"data": fingerprint(dataset), "least": args.least, "quotas": args.quotas}
    for seed in args.seeds:
        folder, config = args.work / f"capts.{seed}", replace(config, seed=seed)
        if claim(folder, identity | {"settings": asdict(config) | {"channels": list(config.channels)}}):
            print(f"{folder.name}: done before", flush=True)
            continue
        kept: dict[str, Channels] = {}
        spent, tools = {}, {}
        control = replace(config, supervision="trigger", uniqueness=0.0, eta=0.0)
        for name, settled in ((OURS, config), (CONTROL, control)):
            tool = Shared(settled, kept)
            tool.work = folder / "work" / ("tables" if name == OURS else "control")
            tool.say = lambda line, who=f"{seed} {name}": print(f"{who}: {line}", flush=True)  # type: ignore[misc]
            start = time.process_time()
            tools[name] = tool.fit(train, dataset.catalog)
            spent[name] = round(time.process_time() - start, 1)
        for name in (*POLICIES, CONTROL, ORACLE):
            tool = tools[CONTROL] if name == CONTROL else tools[OURS].steered(policy=name if name in POLICIES else OURS)
            start = time.process_time()
            found = measure(tool, contexts, wanted, oracle=name == ORACLE)
            spent[f"{name}, test"] = round(time.process_time() - start, 1)
            with atomic(folder / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, found)
        curve, some = {}, np.sort(np.random.default_rng(0).permutation(len(contexts))[:CURVE])
        sample = [contexts[i] for i in some], [wanted[i] for i in some]
        for quota in args.quotas:
            for name in (OURS, *RULES):
                tool = tools[OURS].steered(policy=name, quota=quota)
                curve[f"{name}.{quota}"] = float(measure(tool, *sample)[:, CUTS.index(AT)].mean())
        about = {"cpu_seconds": spent, "quota_curve": curve, "greed": greed(tools[OURS], contexts)}
        about |= {"calibration": calibration(tools[OURS], contexts, wanted)}
        write_json(folder / "done.json", about)


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    dataset = load(args.data)
    folders = [args.work / f"capts.{s}" for s in args.seeds]
    if missing := [f.name for f in folders if not (f / "done.json").is_file()]:
        raise GenrecError(f"{args.work} lacks {missing[0]}; run fit first")
    settings = {k: v for k, v in read_json(folders[0] / "identity.json")["settings"].items() if k != "seed"}
    for seed, folder in zip(args.seeds, folders, strict=True):
        same = {"data": fingerprint(dataset), "least": args.least, "settings": settings | {"seed": seed}}
        check([folder], same)
    _, _, users = test_requests(dataset, args.least, settings["window"])
    done = [read_json(f / "done.json") for f in folders]
    names = [f"union-recall@{k}" for k in CUTS] + [f"overlap@{AT}", f"unique hits@{AT}"]
    names += [f"{c} recall@{AT}" for c in settings["channels"]]
    clustered = np.tile(users, len(folders))
    values = {n: np.concatenate([np.load(f / f"{n}.npy") for f in folders]) for n in (*POLICIES, CONTROL, ORACLE)}
    rows = [
        Row(name, "all", len(users), len(users), dict(zip(names, bootstrap(found, clustered), strict=True)))
        for name, found in values.items()
    ]
    best = max(RULES, key=lambda n: values[n][:, 0].mean())
    asked = [(OURS, best), (OURS, "recent"), (OURS, CONTROL), (OURS, "independent"), (OURS, "pdn"), (ORACLE, best)]
    pairs = [
        Comparison(a, b, "all", len(users), dict(zip(names, paired(values[a], values[b], clustered), strict=True)))
        for a, b in dict.fromkeys(asked)
    ]
    about = provenance(
        f"by the clock 60/20/20; users with {args.least} events before, a new one in {settings['window']:g} days",
        {f"fit {i}": s for i, s in enumerate(args.seeds)},
        time.perf_counter() - clock,
    )
    base = values[best][:, 0].mean()
    ours, ceiling = (pairs[i].differences[names[0]] for i in (0, -1))
    overlap = pairs[0].differences[f"overlap@{AT}"]
    about["verdicts"] = {
        "best rule": best,
        "oracle above the best rule, relative": round(ceiling.mean / base, 4),
        "ours above the best rule, relative": [round(x / base, 4) for x in (ours.mean, ours.low, ours.high)],
        "5 % reached": bool(ours.mean >= 0.05 * base and ours.low > 0),
        "overlap, ours and best rule": [round(float(values[n][:, len(CUTS)].mean()), 4) for n in (OURS, best)],
        "overlap, ours - best rule": [round(x, 4) for x in (overlap.mean, overlap.low, overlap.high)],
        "overlap lower": bool(overlap.high < 0),
    }
    about["costs"] = [d["cpu_seconds"] for d in done]
    about["settings"], about["greed"] = settings, [d["greed"] for d in done]
    keys = done[0]["quota_curve"]
    about["quota_curve"] = {k: round(float(np.mean([d["quota_curve"][k] for d in done])), 5) for k in keys}
    about["calibration"] = done[0]["calibration"]
    if about["calibration"]:
        plot_calibration(about["calibration"], args.out / "calibration.png")
    report = Report(f"{dataset.name}: which triggers ask which channels", tuple(rows), tuple(pairs), about)
    save(report, args.out, (names[0], names[1]))
    print(json.dumps(about["verdicts"], indent=1))


def plot_calibration(curves: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
    most = max(max(p) for points in curves.values() for p in points)
    axes.plot([0, most], [0, most], color="grey", lw=1, ls="--")
    axes.set_xlabel("calibrated value, mean of a bin")
    axes.set_ylabel("share of pairs that brought something")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("fit", fit), ("table", table)):
        one = commands.add_parser(name)
        one.add_argument("--data", required=True)
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        one.add_argument("--least", type=int, default=5, help="events before the last slice (default: 5)")
        one.add_argument("--work", type=Path, required=True)
        one.set_defaults(run=run)
        if name == "fit":
            one.add_argument("--settings", default="{}", help="JSON: fields of CAPTSConfig that all arms share")
            one.add_argument("--quotas", type=int, nargs="*", default=[5, 10, 20, 40], help="of the quota curve")
        else:
            one.add_argument("--out", type=Path, required=True)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
