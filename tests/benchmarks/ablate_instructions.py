"""What instructions are worth: the equal-input ablation of slow thinking.

    python tests/benchmarks/ablate_instructions.py fit --data ml-100k --protocol rolling --work ablation \\
        --timeline template=template.parquet --timeline shuffled=shuffled.parquet --seeds 0 1 2
    python tests/benchmarks/ablate_instructions.py table --work ablation --out docs/results/instructions
    python tests/benchmarks/ablate_instructions.py fresher --work ablation --timeline template=written-anew.parquet \\
        --out docs/results/instructions-fresher

Arms: `none` (home requests alone, nothing is ever asked for), `default` (all scenarios, the learned default at home),
and one per --timeline (see `python -m training.instructions`): the same, with these instructions in training and test.
With --home they learn home alone, as `none` does: what differs from it is the instruction then, and nothing else.
Memory: `plain` sees the newest RECENT + RETRIEVED events; `igr` sees the newest RECENT and the RETRIEVED that the
instruction chooses out of HISTORY; `igr+q2i` trains that choice. All attend to equally many events, and share data,
semantic IDs, tools and teaching of their seed. Every arm is a fit of its own: kill it, start it again, finished ones
are kept.

The table: every arm over all seeds (requests of a user are one cluster) and the requests that every timeline has an
instruction for, its difference to `none` and, for instructed arms, to `default`, to `shuffled` and, where there is one,
to `NAME-shuffled` of the same memory; and IGR's own recall: of the older events that share the wanted item's
categories, the share that is retrieved, beside the newest ones and the mean of a random choice; requests that see their
whole history are left out.

`fresher`: what an old instruction loses. The fits stay as they are; their test requests are ranked under timelines that
were written anew before every request (`--refresh 1`), beside the same requests under the timeline of the fit, and how
far each arm is from `none` by the number of events since its instruction was written. NAME@ARM=FILE tells the fits of
ARM what another writer says.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from arms import MADE_ON, Arm, finished, machines
from command import run_command

from genrec.bundle import Bundle
from genrec.contracts import HOME
from genrec.data import EvalSet, Split
from genrec.device import fastest_device
from genrec.errors import GenrecError
from genrec.evaluation.intervals import paired
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import Ranked, rank_lists
from genrec.evaluation.report import Report, compare, machine, provenance, rows_of, save
from genrec.generator.batches import TrainingData
from genrec.generator.model import GeneratorModel
from genrec.instructions.timeline import Timeline
from genrec.io import atomic, read_json, write_json
from training.config import FitConfig
from training.evaluate import WIDTH, chunks, fused_weights, instruction_vectors, rank_generator, shortlists
from training.fit import SPLITS

RECENT, RETRIEVED, HISTORY = 20, 30, 200
NONE = "none.plain"
RECALL = "recall.npz"
MEMORY = {
    "plain": {"max_history": RECENT + RETRIEVED},
    "igr": {"max_history": HISTORY, "recent": RECENT, "retrieved": RETRIEVED, "q2i": 0.0},
    "igr+q2i": {"max_history": HISTORY, "recent": RECENT, "retrieved": RETRIEVED},
}


class InstructionArm(Arm):
    """One fit of the ablation. `none` learns the home scenario alone; the fusion is chosen for home only. only: ranks
    the test requests alone that have an instruction in this timeline, written just before them."""

    asks = True
    only: Timeline | None = None

    def training_data(self, model: GeneratorModel) -> TrainingData:
        data = super().training_data(model)
        return data if self.asks else replace(data, tasks=())

    def train_generator(self) -> str:
        said = super().train_generator()
        write_json(self.folder / "report" / MADE_ON, machine())
        return said

    def choose_weights(self) -> str:
        floors = read_json(self.work / "floors.json")["floors"]
        sample = self.split.validation.sample(8000 if self.only is None else 4000, seed=2)
        fused = fused_weights(self.parts(), sample, floors)
        write_json(self.folder / "fusion.json", {HOME: {"floors": floors, "fused": fused}})
        return ", ".join(f"{name} {w:g}" for name, w in fused.items() if w)

    def make_report(self) -> str:
        """Ranks and lists of the test requests, for the table over all arms."""
        parts, folder, test = self.parts(), self.folder / "report", self.split.test
        ranked = np.ones(len(test), bool) if self.only is None else age(test, self.only) == 0
        np.save(folder / "ranked.npy", ranked)
        weights, found = parts.fusion(HOME), {"alone": [], "fused": []}
        for piece, shortlist in shortlists(parts, test.take(np.flatnonzero(ranked)), weights["floors"]):
            served = np.take_along_axis(shortlist.rows, shortlist.order(weights["fused"]), 1)
            for name, lists in (("alone", shortlist.beam), ("fused", served)):
                found[name].append(rank_lists(name, lists, piece))
        if self.config.retrieved and parts.timeline is not None:
            with atomic(folder / RECALL) as path, path.open("wb") as file:
                np.savez(file, **retrieval(parts, test, np.flatnonzero(ranked)))
        for name, pieces in found.items():
            ranks, lists = (np.concatenate([getattr(r, what) for r in pieces]) for what in ("ranks", "lists"))
            whole = np.full(len(test), np.inf, ranks.dtype), np.full((len(test), lists.shape[1]), -1, lists.dtype)
            whole[0][ranked], whole[1][ranked] = ranks, lists
            np.save(folder / f"{name}-ranks.npy", whole[0])
            np.save(folder / f"{name}-lists.npy", whole[1])
        return f"test NDCG@10 {ndcg(np.load(folder / 'alone-ranks.npy')[ranked], 10).mean():.4f}"


def fit(args: argparse.Namespace) -> None:
    timelines = dict(part.split("=", 1) for part in args.timeline)
    only = Timeline.load(args.only) if args.only else None
    arms = args.arms or ["none", "default", *timelines]
    unknown = set(arms) - {"none", "default", *timelines}
    if unknown:
        raise GenrecError(f"unknown arm {min(unknown)!r}: give --timeline {min(unknown)}=FILE")
    for seed in args.seeds:
        for arm in arms:
            for memory in args.memory:
                config = FitConfig(
                    data=args.data,
                    out=args.work / f"{arm}.{memory}.{seed}",
                    protocol=args.protocol,
                    epochs=args.epochs,
                    d_model=args.d_model,
                    seed=seed,
                    instructions=timelines.get(arm, ""),
                    **MEMORY[memory],
                )
                job = InstructionArm(config, args.work / f"prepared.{seed}")
                job.asks, job.only = arm != "none" and not args.home, only
                job.run()


def retrieval(parts: Bundle, every: EvalSet, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Per request with an instruction and older events of the wanted category: the recall of those that IGR retrieves,
    of as many of the newest older ones, and the expectation of a random choice; float64 [B'] each, with the requests'
    users and where they stand in `every`. asked: those that are looked at, int [B]."""
    import torch

    from genrec.generator.model import distances
    from genrec.generator.search import make_history, make_request

    requests, model, config = every.take(asked), parts.generator, parts.generator.config
    leaf = np.array([hash(tuple(p)) if p else 0 for p in parts.dataset.catalog.categories])
    vectors = instruction_vectors(parts, requests)
    out: dict[str, list[float]] = {"users": [], "at": [], "igr": [], "newest": [], "random": []}
    done, device = 0, model.device
    for piece in chunks(requests):
        told = None if vectors is None else vectors[done : done + len(piece)]
        start, done = done, done + len(piece)
        history, request = make_history(piece.contexts, config.max_history), make_request(model, piece.contexts, told)
        distance = distances(history)
        with torch.no_grad():
            visible = model.visible(history.to(device), request.to(device), distance.to(device))
        seen, older = (visible >= 0)[:, 0].cpu().numpy(), (distance[:, 0] >= config.recent).numpy()
        rows, back = history.rows.numpy(), distance[:, 0].numpy()
        for b, target in enumerate(piece.targets.tolist()):
            wanted = older[b] & (leaf[rows[b]] == leaf[target]) & (rows[b] >= 0)
            k = int((older[b] & seen[b]).sum())
            if not wanted.any() or k == int(older[b].sum()) or not bool(request.instructed[b, 0]):
                continue
            newest = older[b] & (back[b] < config.recent + k)
            out["users"].append(int(piece.users[b]))
            out["at"].append(int(asked[start + b]))
            out["igr"].append((wanted & seen[b]).sum() / wanted.sum())
            out["newest"].append((wanted & newest).sum() / wanted.sum())
            out["random"].append(k / older[b].sum())
    return {name: np.array(values) for name, values in out.items()}


def recall_of(arm: Path, every: EvalSet) -> dict[str, np.ndarray]:
    """What an arm kept of `retrieval`; made anew for one of before."""
    path = arm / "report" / RECALL
    kept = dict(np.load(path)) if path.is_file() else {}
    if "at" in kept:
        return kept
    return retrieval(Bundle.load(arm, device=fastest_device()), every, np.arange(len(every)))


def recalls(each: list[dict[str, np.ndarray]], told: np.ndarray) -> dict[str, Any]:
    """Means of `retrieval` over seeds, and IGR's differences to the other two, as [mean, low, high]; a user's requests
    of all seeds are one cluster. told: bool [B], the requests of the table."""
    each = [{k: v[told[e["at"].astype(int)]] for k, v in e.items()} for e in each]
    whole = {k: np.concatenate([e[k] for e in each]) for k in ("users", "igr", "newest", "random")}
    if not len(whole["igr"]):
        return {"requests": 0}
    out: dict[str, Any] = {k: round(float(whole[k].mean()), 4) for k in ("igr", "newest", "random")}
    for base in ("newest", "random"):
        i = paired(whole["igr"][:, None], whole[base][:, None], whole["users"])[0]
        out[f"igr minus {base}"] = [round(x, 4) for x in (i.mean, i.low, i.high)]
    return out | {"requests": len(each[0]["igr"])}


def fresher(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    folders = finished(args.work)
    told = {}
    for part in args.timeline:
        name, _, file = part.partition("=")
        told[name.partition("@")[0]] = f"{name.rpartition('@')[2]}.plain", Timeline.load(Path(file))
    fits = {NONE, *(fit for fit, _ in told.values())}
    if missing := sorted(fits - set(folders)):
        raise GenrecError(f"{args.work} holds no finished arm {missing[0]!r}: run this script's `fit` first")
    seeds = sorted(set.intersection(*(set(folders[name]) for name in fits)))
    first = Bundle.load(folders[NONE][seeds[0]])
    split: Split = SPLITS[first.config["protocol"]](first.dataset)
    anew = np.array([age(split.test, timeline) == 0 for _, timeline in told.values()]).all(0)
    known = ranked_by([folders[name][s] for name in fits for s in seeds], len(split.test))
    anew &= known
    if not anew.any():
        raise GenrecError("no test request has an instruction written just before it: use --refresh 1")
    some = split.test.take(np.flatnonzero(anew))
    requests = some.take(np.tile(np.arange(len(some)), len(seeds)))
    ranked = {NONE: stored(folders[NONE], seeds, anew, "none")}
    by_age = {}
    for fit in sorted(fits - {NONE}):
        timeline = Bundle.load(folders[fit][seeds[0]]).timeline
        if timeline is None:
            raise GenrecError(f"{folders[fit][seeds[0]]} was fitted without instructions")
        stale, gain = age(split.test, timeline), differences(folders[fit], folders[NONE], seeds)
        stale[~known] = -1
        by_age[fit] = {int(a): round(float(gain[stale == a].mean()), 5) for a in np.unique(stale[stale >= 0])}
        ranked[fit] = stored(folders[fit], seeds, anew, f"{fit.partition('.')[0]}: as fitted")
    for name, (fit, timeline) in told.items():
        pieces = []
        for seed in seeds:
            parts = Bundle.load(folders[fit][seed], device=fastest_device())
            vectors = instruction_vectors(parts, some, timeline)
            pieces.append(rank_generator(parts.generator, some, vectors, WIDTH))
            print(f"{name}, seed {seed}: NDCG@10 {ndcg(pieces[-1].ranks, 10).mean():.4f} when told anew", flush=True)
        ranks, lists = (np.concatenate([getattr(r, what) for r in pieces]) for what in ("ranks", "lists"))
        ranked[name] = Ranked(f"{name}: before every request", ranks, lists)
    rows = [r for found in ranked.values() for r in rows_of(found, requests, fits=len(seeds)) if r.slice == "all"]
    pairs = []
    for name, (fit, _) in told.items():
        for base in [NONE, fit] + ["shuffled"] * ("shuffled" in told and name != "shuffled"):
            pairs += [c for c in compare(ranked[name], ranked[base], requests, fits=len(seeds)) if c.slice == "all"]
    about = provenance(split.note, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    about |= {"settings": first.config, "minus_none_by_events_since_written": by_age}
    save(Report(f"{first.dataset.name}: instructions written anew", tuple(rows), tuple(pairs), about), args.out)


def age(requests: EvalSet, timeline: Timeline) -> np.ndarray:
    """Events since the instruction of each request was written, int64 [B]; -1 where there is none."""
    lengths = np.array([len(c.history) for c in requests.contexts])
    found = np.array(
        [timeline.find(c.user or "", lengths[b : b + 1])[0] for b, c in enumerate(requests.contexts)], np.int64
    )
    return np.where(found >= 0, lengths - timeline.events[found], -1)


def ranked_by(folders: list[Path], requests: int) -> np.ndarray:
    """Which test requests all of these fits have ranked, bool [B]."""
    files = [folder / "report" / "ranked.npy" for folder in folders]
    return np.array([np.load(file) for file in files if file.exists()] or [np.ones(requests, bool)]).all(0)


def stored(found: dict[int, Path], seeds: list[int], asked: np.ndarray, label: str) -> Ranked:
    """What finished fits made of some test requests, one seed after the other."""
    ranks, lists = (
        np.concatenate([np.load(found[s] / "report" / f"alone-{what}.npy")[asked] for s in seeds])
        for what in ("ranks", "lists")
    )
    return Ranked(label, ranks, lists)


def differences(found: dict[int, Path], base: dict[int, Path], seeds: list[int]) -> np.ndarray:
    """NDCG@10 less that of a base at every test request, mean over seeds, float64 [B]."""
    each = [
        ndcg(np.load(found[s] / "report/alone-ranks.npy"), 10) - ndcg(np.load(base[s] / "report/alone-ranks.npy"), 10)
        for s in seeds
    ]
    return np.mean(each, 0)


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    folders = finished(args.work)
    if not folders:
        raise GenrecError(f"{args.work} holds no finished arm: run this script's `fit` first")
    seeds = sorted(set.intersection(*(set(found) for found in folders.values())))
    first = Bundle.load(next(iter(folders.values()))[seeds[0]])
    split: Split = SPLITS[first.config["protocol"]](first.dataset)
    timelines = [Bundle.load(found[seeds[0]]).timeline for found in folders.values()]
    told = ranked_by([found[s] for found in folders.values() for s in seeds], len(split.test))
    told &= np.array([age(split.test, t) >= 0 for t in timelines if t is not None] or [told]).all(0)
    requests = split.test.take(np.tile(np.flatnonzero(told), len(seeds)))
    rows, pairs, ranked, recall = [], [], {}, {}
    for name, found in folders.items():
        for part in ("alone", "fused"):
            label = f"{name.replace('.', ', ')}: {part}"
            ranks, lists = (
                np.concatenate([np.load(found[s] / "report" / f"{part}-{what}.npy")[told] for s in seeds])
                for what in ("ranks", "lists")
            )
            ranked[name, part] = Ranked(label, ranks, lists)
            rows += [r for r in rows_of(ranked[name, part], requests, fits=len(seeds)) if r.slice == "all"]
        one = Bundle.load(found[seeds[0]])
        if one.config["retrieved"] and one.timeline is not None:
            recall[name] = recalls([recall_of(found[s], split.test) for s in seeds], told)
    for name, part in ranked:
        arm, _, memory = name.partition(".")
        bases = [NONE] if name != NONE else []
        if arm not in ("none", "default"):
            shuffles = [f"{arm}-shuffled.{memory}", f"shuffled.{memory}"]  # of the same writer, and the common one
            bases += [f"default.{memory}"] + [name for name in shuffles if not arm.endswith("shuffled")]
        bases += [f"{arm}.plain"] if memory != "plain" and arm != "none" else []
        for base in dict.fromkeys(bases):
            if (base, part) in ranked:
                found = compare(ranked[name, part], ranked[base, part], requests, fits=len(seeds))
                pairs += [c for c in found if c.slice == "all"]
    about = provenance(split.note, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    about |= {"settings": first.config | {"memory": MEMORY}, "retrieval_recall": recall}
    about["ndcg_per_fit"] = {
        r.system: [round(float(ndcg(x, 10).mean()), 5) for x in np.split(r.ranks, len(seeds))] for r in ranked.values()
    }
    about["arms_made_on"] = machines([path for found in folders.values() for path in found.values()])
    save(Report(f"{first.dataset.name}: instructions", tuple(rows), tuple(pairs), about), args.out)
    print(f"{args.out}: {len(folders)} arms, {len(seeds)} seeds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fit", help="fit the arms")
    one.add_argument("--data", required=True)
    one.add_argument("--protocol", default="rolling")
    one.add_argument("--epochs", type=int, default=8)
    one.add_argument("--d-model", type=int, default=128)
    one.add_argument("--timeline", action="append", default=[], metavar="NAME=FILE")
    one.add_argument("--only", type=Path, metavar="FILE", help="rank the test requests of this timeline alone")
    one.add_argument("--arms", nargs="+", help="some of them (default: all)")
    one.add_argument("--home", action="store_true", help="these arms learn home alone, as none does; name them so")
    one.add_argument("--memory", nargs="+", choices=MEMORY, default=list(MEMORY))
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--work", type=Path, required=True)
    one.set_defaults(run=fit)
    one = commands.add_parser("fresher", help="finished arms under instructions written anew")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--timeline", action="append", required=True, metavar="NAME[@ARM]=FILE")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=fresher)
    one = commands.add_parser("table", help="the table over finished arms")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=table)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
