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

Arms beside the policies. `mean label`: no network, the mean label in the replay of each place in the history on each
channel; the rules are blind to channels, so what CAPTS has over them may be that alone, and only what it has over this
arm is learned of a user. `on-trigger feedback`: the same network trained on feedback on the trigger itself (isolates
the Value Attribution Module; it is blind to channels too). `independent`: the same values, an equal share of the quota
for each channel. `no coordination`: the same values, best pairs first, no discount for overlap (what CAPTS has over it
is the coordination). The oracle knows the future and is solved exactly. `fit` ranks everything once and keeps what it
finds; a killed run goes on.

"fetched" is how many items a policy really got of K: short lists leave a part unspent, some 10 % at 500. "wasted" is
the share of the fetched that came twice. "overlap" (mean Jaccard of the channels' results) is 0 where one channel is
asked.
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
from genrec.tools.capts.policies import Route, pair_scores, retrieved
from genrec.tools.capts.requests import DAY, Replay, Triggers, triggers_of, unseen
from genrec.tools.capts.routing import best_cover, best_set, overlaps, route, total

TEST = 0.2  # share of the events, by the clock
RULES = ("recent", "feedback", "pinnersage")
POLICIES = ("learned", "independent", "pdn", *RULES)
OURS, CONTROL, ORACLE, PRIOR, GREEDY = "learned", "on-trigger feedback", "oracle", "mean label", "no coordination"
ARMS = (*POLICIES, GREEDY, PRIOR, CONTROL, ORACLE)
PLACES = 10  # in the history, newest first, that the mean label tells apart
CUTS = (50, 100, 500)
AT = 100  # K of the per-channel numbers
BINS = 10
CURVE = 1000  # users of the quota curve
CHUNK = 256
SMALL, SOLVED = 32, 100  # pairs at most, and requests, that greed is compared on with the exact best set


class Shared(CAPTS):
    """CAPTS whose tables are fitted once for the arms of a seed. rates: the replay's mean label, [PLACES, C]."""

    def __init__(self, config: CAPTSConfig, kept: dict[str, Channels]) -> None:
        super().__init__(config)
        self.kept = kept
        self.rates = np.zeros((PLACES, len(config.channels)))

    def labels(
        self, replay: Replay, triggers: Triggers, channels: Channels
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        label, unique, there = super().labels(replay, triggers, channels)
        if channels is self.kept.get("past"):
            place, shape = np.minimum(np.arange(label.shape[1]), PLACES - 1), self.rates.shape
            hits, count = np.zeros(shape), np.zeros(shape)
            np.add.at(hits, place, (label & there).sum(axis=0))
            np.add.at(count, place, there.sum(axis=0))
            self.rates = hits / np.maximum(count, 1)
        return label, unique, there

    def _tables(self, train: Sequences, catalog: Catalog, name: str) -> Channels:
        if name not in self.kept:
            self.kept[name] = super()._tables(train, catalog, name)
        return self.kept[name]


class Prior(Shared):
    """Asks by the mean label of place and channel, whoever the user is."""

    @classmethod
    def of(cls, tool: Shared) -> Prior:
        other = cls(tool.config, tool.kept)
        other.__dict__.update(tool.__dict__)
        return other

    def route(self, contexts: list[UserContext]) -> tuple[Triggers, None, list[Route]]:
        triggers, found = triggers_of(contexts, self.config), []
        for rows, lists in zip(triggers.rows, triggers.lists(self.channels, self.config.depth), strict=True):
            n = int((rows >= 0).sum())
            score = self.rates[np.minimum(np.arange(n), PLACES - 1)]
            pairs = route(score, lists[:n], self.config.quota, discount=0.0)
            found.append(Route(pairs, np.array([score[p] for p in pairs], np.float32)))
        return triggers, None, found


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
    """float64 [B, 6 + 3 + C], see `columns`."""
    rows, c, quota = [], len(tool.channels.names), tool.config.quota
    for start in range(0, len(contexts), CHUNK):
        part = contexts[start : start + CHUNK]
        if oracle:
            triggers = triggers_of(part, tool.config)
        else:
            triggers, _, found = tool.route(part)
        for b in range(len(part)):
            mine, new, seen = triggers.rows[b], wanted[start + b], triggers.seen[b]
            values, fetched = [], []
            for k in CUTS:
                if oracle:
                    lists = unseen(tool.channels, mine[mine >= 0], seen, k // quota + 1)
                    pairs = best_cover(lists, new, quota, k)
                else:
                    pairs = found[b].pairs
                brought = retrieved(pairs, mine, tool.channels, seen, k, quota)
                items = np.concatenate([np.zeros(0, int), *brought])
                values.append(float(np.isin(new, items).mean()))
                fetched.append(len(items))
                if k == AT:
                    about = [1 - len(np.unique(items)) / max(1, len(items)), *describe(brought, pairs, c, new)]
            rows.append(values + fetched + about)
    return np.array(rows)


def columns(channels: list[str]) -> list[str]:
    """What `measure` gives."""
    names = [f"{what}@{k}" for what in ("union-recall", "fetched") for k in CUTS]
    return names + [f"{what}@{AT}" for what in ("wasted", "overlap", "unique hits", *(f"{c} recall" for c in channels))]


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
        try:
            best = best_set(scores[b, :n], lists[:n], config.quota, config.discount, config.least, config.most)
        except GenrecError:  # it would take too long
            continue
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
        arms: dict[str, CAPTS] = {name: tools[OURS].steered(policy=name) for name in POLICIES}
        arms |= {GREEDY: tools[OURS].steered(discount=0.0, eta=0.0), PRIOR: Prior.of(tools[OURS])}
        for name, tool in (arms | {CONTROL: tools[CONTROL], ORACLE: tools[OURS]}).items():
            start = time.process_time()
            found = measure(tool, contexts, wanted, oracle=name == ORACLE)
            spent[f"{name}, test"] = round(time.process_time() - start, 1)
            with atomic(folder / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, found)
        pairs = np.array([min(len(set(c.history)), config.triggers) for c in contexts]) * len(config.channels)
        many = np.flatnonzero(pairs >= max(args.quotas, default=0))  # elsewhere every policy would ask all pairs
        curve, some = {}, np.sort(np.random.default_rng(0).permutation(many)[:CURVE])
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
    names, clustered = columns(settings["channels"]), np.tile(users, len(folders))
    values = {n: np.concatenate([np.load(f / f"{n}.npy") for f in folders]) for n in ARMS}
    rows = [
        Row(name, "all", len(users), len(users), dict(zip(names, bootstrap(found, clustered), strict=True)))
        for name, found in values.items()
    ]
    best = max(RULES, key=lambda n: values[n][:, 0].mean())
    asked = [(OURS, n) for n in (best, PRIOR, GREEDY, "independent", CONTROL, "pdn", "recent")]
    asked += [(PRIOR, best), (ORACLE, best)]
    pairs = [
        Comparison(a, b, "all", len(users), dict(zip(names, paired(values[a], values[b], clustered), strict=True)))
        for a, b in dict.fromkeys(asked)
    ]
    about = provenance(
        f"by the clock 60/20/20; users with {args.least} events before, a new one in {settings['window']:g} days",
        {f"fit {i}": s for i, s in enumerate(args.seeds)},
        time.perf_counter() - clock,
    )
    main, found = names[0], {(p.system, p.baseline): p.differences for p in pairs}

    def told(a: str, b: str, name: str, base: float = 1.0) -> list[float]:
        i = found[a, b][name]
        return [round(x / base, 4) for x in (i.mean, i.low, i.high)]

    bases = {n: float(values[n][:, 0].mean()) for n in ARMS}
    ours, learned = found[OURS, best][main], found[OURS, PRIOR][main]
    about["verdicts"] = {
        "best rule": best,
        "oracle above the best rule, relative": told(ORACLE, best, main, bases[best]),
        "ours above the best rule, relative": told(OURS, best, main, bases[best]),
        "5 % reached": bool(ours.mean >= 0.05 * bases[best] and ours.low > 0),
        "the mean label above the best rule, relative": told(PRIOR, best, main, bases[best]),
        "ours above the mean label, relative": told(OURS, PRIOR, main, bases[PRIOR]),
        "something is learned of users": bool(learned.low > 0),
        "ours above no coordination, relative": told(OURS, GREEDY, main, bases[GREEDY]),
        **{f"wasted, ours - {n}": told(OURS, n, f"wasted@{AT}") for n in (best, GREEDY, "independent")},
        **{f"overlap, ours - {n}": told(OURS, n, f"overlap@{AT}") for n in (best, GREEDY, "independent")},
    }
    about["per_seed"] = {
        n: [round(float(x[:, 0].mean()), 5) for x in np.split(v, len(folders))] for n, v in values.items()
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
