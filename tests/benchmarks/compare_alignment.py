"""The policy losses against each other: same initial weights, same rollouts to spend, judged on the same requests.

    python tests/benchmarks/compare_alignment.py fit --data ml-100k --work alignment --seeds 0 1 2
    python tests/benchmarks/compare_alignment.py sweep --work alignment
    python tests/benchmarks/compare_alignment.py run --work alignment --seeds 0 1 2
    python tests/benchmarks/compare_alignment.py table --work alignment --out docs/results/alignment-ml-100k

`fit` makes the initial bundles (start.SEED), which all arms of a seed begin with; --start takes finished ones instead.
`sweep` aligns seed 0 by SA-GCPO with each of TEMPERATURES, in both orders, and keeps the pair that ranks *validation*
best. `run` is the comparison: the untouched model, every loss at the same budget (no early stop; each keeps the weights
that rank validation best), and SA-GCPO without its floor. Every arm is killed and started again at will: what is
finished is kept, and two processes may share the work by --seeds or --arms.

The table: NDCG@10 and HR@10 of the generator alone on the test requests, means over seeds, a user's requests of all
seeds being one cluster of the bootstrap; each arm less the untouched model, and SA-GCPO less every peer; for the
untouched model and SA-GCPO also fused with the tools. The mean reward of each scenario: of the ten best items at up to
--requests test requests, judged by tools fitted on training events. The scenario matrix: what the lists that one
scenario's instruction gives earn in another (a search's query is given to its own instruction alone: it is made of the
wanted item).
Steadiness: validation and reward over the steps, as a plot, and the largest fall of validation below its best before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from arms import finished

from genrec.alignment.judges import Bench, Judge, satisfactions, taste_vectors
from genrec.alignment.rewards import ScenarioWeights, judge
from genrec.bundle import Bundle
from genrec.candidates import allowed_items
from genrec.contracts import HOME
from genrec.data import SCENARIOS, EvalSet
from genrec.errors import GenrecError
from genrec.evaluation.intervals import Interval, bootstrap, paired
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import Comparison, Report, Row, compare, provenance, rows_of, save
from genrec.io import atomic, read_json, write_json
from training.align import Align
from training.align_config import AlignConfig
from training.config import FitConfig
from training.evaluate import FUSED_ROW, fused_weights, instruction_vectors, rank_generator, rank_systems, requests_of
from training.fit import Fit

START, OURS = "start", "sa-gcpo"
ARMS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
    "gspo": {"loss": "gspo"},
    "sapo": {"loss": "sapo", "temperature_positive": 1.0, "temperature_negative": 1.05},
    "ecpo": {"loss": "ecpo"},
    "gbpo": {"loss": "gbpo"},
    OURS: {"loss": "sa-gcpo"},
    "sa-gcpo-no-floor": {"loss": "sa-gcpo", "floor": False},
}
WHOLE = ("untouched", OURS)  # arms that are measured with the tools too, and under every instruction
TEMPERATURES = ((1.0, 2.0), (2.0, 1.0), (2.0, 5.0), (5.0, 2.0))
LIST = 10


class AlignmentArm(Align):
    """One arm, a bundle of its own. asked: at most so many test requests of each scenario are judged."""

    name = OURS
    asked = 500

    def align_generator(self) -> str:
        if self.name != "untouched":
            return super().align_generator()
        self.source.generator.save_pretrained(self.folder / "generator")
        return "untouched"

    def choose_weights(self) -> str:
        """Home's fusion alone, and only where it is measured."""
        floors = self.fusion_of(HOME)
        fused = {"generator": 1.0}
        if self.name in WHOLE:
            fused = fused_weights(self.parts(), self.split.validation.sample(8000, seed=2), floors)
        write_json(self.folder / "fusion.json", {HOME: {"floors": floors, "fused": fused}})
        return ", ".join(f"{name} {w:g}" for name, w in fused.items() if w)

    def make_report(self) -> str:
        """Ranks and lists of the test requests, and what each scenario's lists earn."""
        parts, folder = self.parts(), self.folder / "report"
        found = [
            ("alone", rank_generator(parts.generator, self.split.test, instruction_vectors(parts, self.split.test)))
        ]
        if self.name in WHOLE:
            found += [("fused", r) for r in rank_systems(parts, self.split.test) if r.system == FUSED_ROW]
        for what, ranked in found:
            np.save(folder / f"{what}-ranks.npy", ranked.ranks)
            np.save(folder / f"{what}-lists.npy", ranked.lists)
        rewards = self.scenario_rewards(parts)
        with atomic(folder / "rewards.npz") as path, path.open("wb") as file:
            np.savez(file, **rewards)
        return f"test NDCG@10 {ndcg(found[0][1].ranks, 10).mean():.4f}"

    def scenario_rewards(self, parts: Bundle) -> dict[str, np.ndarray]:
        """The mean reward in the scenario `asked` of the ten items that the generator gives each of its requests under
        the instruction of the scenario `told`, "asked/told" -> float32 [B]; and "asked/users" -> int [B]."""
        weights, items, train = ScenarioWeights.load(), len(parts.dataset.catalog), self.split.train
        whole = Judge(parts.tools, taste_vectors(train, items), satisfactions(train, items))
        bench = Bench.of([whole], parts.semantic_ids.trie, parts.embeddings, self.fusion_of, train)
        out: dict[str, np.ndarray] = {}
        for asked in parts.dataset.scenarios:
            requests = requests_of(parts, self.split, self.split.test, asked).sample(self.asked, seed=3)
            out[f"{asked}/users"] = requests.users
            vectors = self.query_vectors(parts, requests, asked)
            allowed, nobody = allowed_items(requests.contexts, items), np.zeros(len(requests), np.int64)
            context = bench.context(requests.contexts, requests.targets, nobody, allowed, vectors)
            for told in parts.dataset.scenarios if self.name in WHOLE else (asked,):
                own = vectors if told == asked else None
                lists = rank_generator(parts.generator, as_in(requests, told), own).lists[:, :LIST].astype(np.int64)
                earned = judge(lists, context, weights).total
                out[f"{asked}/{told}"] = np.where(lists >= 0, earned, 0).mean(1).astype(np.float32)
        return out

    def query_vectors(self, parts: Bundle, requests: EvalSet, scenario: str) -> np.ndarray | None:
        """The queries of a search, embedded once for all arms of a seed; None for other scenarios."""
        path = self.shared / f"{scenario}-asked-{len(requests)}.npy"
        if not SCENARIOS[scenario].query:
            return None
        if not path.exists():
            vectors = instruction_vectors(parts, requests)
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
        return np.load(path)


def as_in(requests: EvalSet, scenario: str) -> EvalSet:
    """The same requests as another scenario would tell them: its name, its trigger, and a query for a search that has
    one already."""
    about = SCENARIOS[scenario]
    contexts = [
        replace(
            c,
            scenario=scenario,
            trigger=c.history[-1] if about.trigger and c.history else None,
            query=c.query if about.query else None,
        )
        for c in requests.contexts
    ]
    return replace(requests, contexts=contexts)


def fit(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        out = args.work / f"{START}.{seed}"
        config = FitConfig(data=args.data, out=out, protocol=args.protocol, epochs=args.epochs, seed=seed)
        Fit(config, lambda line, out=out: print(f"{out.name}: {line}", flush=True)).run()


def starts(args: argparse.Namespace) -> dict[int, Path]:
    """The initial bundle of every seed."""
    given = getattr(args, "start", None) or []
    found = {i: path for i, path in enumerate(given)} or finished(args.work).get(START, {})
    missing = [s for s in args.seeds if s not in found]
    if missing:
        raise GenrecError(f"no initial bundle for seed {missing[0]}: run this script's `fit` first, or give --start")
    return found


def job(args: argparse.Namespace, name: str, seed: int, start: Path, changes: dict[str, Any]) -> AlignmentArm:
    settings = {"steps": args.steps, "seed": seed, "patience": 0} | changes
    out = args.work / f"{name}.{seed}"
    config = AlignConfig(bundle=start, out=out, **settings)
    made = AlignmentArm(config, lambda line: print(f"{out.name}: {line}", flush=True), args.work / f"shared.{seed}")
    made.name, made.asked = name.split("_")[0], args.requests
    return made


def validations(folder: Path) -> list[tuple[int, float]]:
    path = folder / "report" / "alignment.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["validation"]["ndcg"]) for line in lines if "validation" in line]


def sweep(args: argparse.Namespace) -> None:
    args.seeds = [0]
    start, found = starts(args)[0], []
    for positive, negative in TEMPERATURES:
        name = f"sweep_{positive:g}_{negative:g}"
        changes = {"temperature_positive": positive, "temperature_negative": negative}
        made = job(args, name, 0, start, changes)
        made.make_report = lambda: "validation alone"  # type: ignore[method-assign]
        folder = made.run()
        found.append({"positive": positive, "negative": negative, "validation": max(v for _, v in validations(folder))})
        print(f"{name}: {found[-1]['validation']:.4f}", flush=True)
    best = max(found, key=lambda x: x["validation"])
    write_json(args.work / "temperatures.json", {"tried": found, "kept": best})


def run(args: argparse.Namespace) -> None:
    path = args.work / "temperatures.json"
    kept = read_json(path)["kept"] if path.exists() else None
    taus = {"temperature_positive": kept["positive"], "temperature_negative": kept["negative"]} if kept else {}
    found = starts(args)
    for seed in args.seeds:
        for name in args.arms:
            changes = ARMS[name] | (taus if ARMS[name].get("loss") == OURS else {})
            clock = time.perf_counter()
            job(args, name, seed, found[seed], changes).run()
            print(f"{name}.{seed}: {time.perf_counter() - clock:.0f} s", flush=True)


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    folders = {name: found for name, found in finished(args.work).items() if name in ARMS}
    if "untouched" not in folders:
        raise GenrecError(f"{args.work} holds no finished arm 'untouched': run this script's `run` first")
    folders = {name: folders[name] for name in ARMS if name in folders}
    seeds = sorted(set.intersection(*(set(found) for found in folders.values())))
    first = Bundle.load(folders["untouched"][seeds[0]])
    from training.fit import SPLITS

    split = SPLITS[first.config["protocol"]](first.dataset)
    requests = split.test.take(np.tile(np.arange(len(split.test)), len(seeds)))
    rows, pairs, ranked = [], [], {}
    for name, found in folders.items():
        for part in ("alone", "fused") if name in WHOLE else ("alone",):
            ranks, lists = (
                np.concatenate([np.load(found[s] / "report" / f"{part}-{what}.npy") for s in seeds])
                for what in ("ranks", "lists")
            )
            ranked[name, part] = Ranked(f"{name}: {part}", ranks, lists)
            rows += [r for r in rows_of(ranked[name, part], requests, fits=len(seeds)) if r.slice == "all"]
    for (name, part), system in ranked.items():
        bases = [("untouched", part)] if name != "untouched" else []
        others = [key for key in ranked if key not in ((OURS, part), ("untouched", part)) and key[1] == part]
        bases += others if name == OURS else []
        for base in bases:
            pairs += [c for c in compare(system, ranked[base], requests, fits=len(seeds)) if c.slice == "all"]
    earned = {name: rewards_of(found, seeds) for name, found in folders.items()}
    rows += [row for name in folders for row in reward_rows(name, earned[name])]
    pairs += [p for name in folders for p in reward_pairs(name, earned)]
    about = provenance(split.note, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    chosen = args.work / "temperatures.json"
    about |= {
        "settings": Bundle.load(folders[OURS][seeds[0]]).config["aligned"] if OURS in folders else {},
        "temperatures": read_json(chosen) if chosen.exists() else None,
        "ndcg_per_seed": {
            n: [round(float(ndcg(x, 10).mean()), 6) for x in np.split(ranked[n, "alone"].ranks, len(seeds))]
            for n in folders
        },
        "scenario_matrix": {n: matrix(earned[n]) for n in ("untouched", OURS) if n in earned},
        "control": control(earned),
        "steadiness": {n: steadiness(found, seeds) for n, found in folders.items() if n != "untouched"},
    }
    report = Report(f"{first.dataset.name}: policy losses", tuple(rows), tuple(pairs), about)
    save(report, args.out)
    plot(folders, seeds, args.out / "steadiness.png")
    print(f"{args.out}: {len(folders)} arms, {len(seeds)} seeds")


def rewards_of(found: dict[int, Path], seeds: list[int]) -> dict[str, np.ndarray]:
    """The arrays of `scenario_rewards`, those of all seeds one after the other."""
    each = [np.load(found[s] / "report" / "rewards.npz") for s in seeds]
    return {key: np.concatenate([e[key] for e in each]) for key in each[0].files}


def scenarios_of(earned: dict[str, np.ndarray]) -> list[str]:
    return [key.removesuffix("/users") for key in earned if key.endswith("/users")]


def reward_rows(name: str, earned: dict[str, np.ndarray]) -> list[Row]:
    """The reward of each scenario under its own instruction, and their mean."""
    rows, means = [], []
    for s in scenarios_of(earned):
        users = earned[f"{s}/users"]
        found = bootstrap(earned[f"{s}/{s}"][:, None], users)[0]
        means.append(found.mean)
        rows.append(Row(name, f"reward in {s}", len(users), len(np.unique(users)), {"reward": found}))
    nan = float("nan")
    return [*rows, Row(name, "reward, mean", 0, 0, {"reward": Interval(float(np.mean(means)), nan, nan)})]


def reward_pairs(name: str, earned: dict[str, dict[str, np.ndarray]]) -> list[Comparison]:
    """Each scenario's reward less the untouched model's; SA-GCPO's less every peer's too."""
    bases = ["untouched"] if name != "untouched" else []
    bases += [n for n in earned if n not in (OURS, "untouched")] if name == OURS else []
    out = []
    for base in bases:
        for s in scenarios_of(earned[name]):
            a, b = (earned[n][f"{s}/{s}"][:, None] for n in (name, base))
            found = paired(a, b, earned[name][f"{s}/users"])[0]
            out.append(Comparison(name, base, f"reward in {s}", len(a), {"reward": found}))
    return out


def matrix(earned: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """asked -> told -> mean reward."""
    names = scenarios_of(earned)
    return {a: {t: round(float(earned[f"{a}/{t}"].mean()), 4) for t in names} for a in names}


def control(earned: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Scenario control of the aligned model: in each scenario its reward less the untouched model's, and less its own
    under each other instruction, as [mean, low, high]."""
    if OURS not in earned or "untouched" not in earned:
        return {}
    mine, names = earned[OURS], scenarios_of(earned[OURS])

    def less(s: str, other: np.ndarray) -> list[float]:
        i = paired(mine[f"{s}/{s}"][:, None], other[:, None], mine[f"{s}/users"])[0]
        return [round(x, 4) for x in (i.mean, i.low, i.high)]

    return {
        s: {"untouched": less(s, earned["untouched"][f"{s}/{s}"])}
        | {f"told {t}": less(s, mine[f"{s}/{t}"]) for t in names if t != s}
        for s in names
    }


def steadiness(found: dict[int, Path], seeds: list[int]) -> dict[str, float]:
    """Means over seeds: the largest fall of validation NDCG@10 below its best before, and where it ended less its
    start."""
    falls, ends = [], []
    for s in seeds:
        values = np.array([v for _, v in validations(found[s])])
        falls.append(float((np.maximum.accumulate(values) - values).max()))
        ends.append(float(values[-1] - values[0]))
    return {"largest_fall": round(float(np.mean(falls)), 5), "end_less_start": round(float(np.mean(ends)), 5)}


def plot(folders: dict[str, dict[int, Path]], seeds: list[int], path: Path) -> None:
    """Validation NDCG@10 and training reward over the steps, a line per arm (mean of seeds), a band from the lowest to
    the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, found in folders.items():
        if name == "untouched":
            continue
        logs = []
        for s in seeds:
            text = (found[s] / "report" / "alignment.jsonl").read_text(encoding="utf-8")
            logs.append([json.loads(line) for line in text.splitlines()])
        wide = 2.2 if name == OURS else 1.0
        for axes, key in ((left, "validation"), (right, "reward")):
            every = [
                [(x["step"], x[key]["ndcg"] if key == "validation" else x[key]) for x in log if key in x]
                for log in logs
            ]
            values = np.array([[v for _, v in one] for one in every])
            steps = [step for step, _ in every[0]]
            if key == "reward":  # a running mean over five batches
                values = np.stack([np.convolve(v, np.ones(5) / 5, "valid") for v in values])
                steps = steps[2 : 2 + values.shape[1]]
            line = axes.plot(steps, values.mean(0), label=name, lw=wide)[0]
            axes.fill_between(steps, values.min(0), values.max(0), alpha=0.12, color=line.get_color(), lw=0)
    for axes, title in ((left, "validation NDCG@10, averaged weights"), (right, "reward of the rollouts")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("optimiser steps")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fit", help="fit the initial bundles")
    one.add_argument("--data", required=True)
    one.add_argument("--protocol", default="rolling")
    one.add_argument("--epochs", type=int, default=16)
    one.set_defaults(run=fit)
    two = commands.add_parser("sweep", help="choose the temperatures of SA-GCPO on validation")
    two.set_defaults(run=sweep)
    three = commands.add_parser("run", help="align the arms and measure them")
    three.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    three.set_defaults(run=run)
    four = commands.add_parser("table", help="the table over finished arms")
    four.add_argument("--out", type=Path, required=True)
    four.set_defaults(run=table)
    for each in (one, three):
        each.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for each in (two, three):
        each.add_argument("--start", type=Path, nargs="+", help="finished bundles, one per seed 0, 1, ...")
        each.add_argument("--steps", type=int, default=AlignConfig.steps, help="optimiser steps of every arm")
        each.add_argument("--requests", type=int, default=500, help="test requests judged in each scenario")
    for each in (one, two, three, four):
        each.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    try:
        args.run(args)
    except GenrecError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
