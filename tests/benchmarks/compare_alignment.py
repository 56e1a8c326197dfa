"""The policy losses against each other: same initial weights, same rollouts to spend, judged on the same requests.

    python tests/benchmarks/compare_alignment.py fit --data ml-100k --work alignment --seeds 0 1 2
    python tests/benchmarks/compare_alignment.py sweep --work alignment --seeds 0 1 2
    python tests/benchmarks/compare_alignment.py run --work alignment --seeds 0 1 2
    python tests/benchmarks/compare_alignment.py table --work alignment --skip-first 3 --out results/alignment

`fit` makes the initial bundles (start.SEED), which all arms of a seed begin with; --start takes finished ones instead.
`sweep` aligns every seed by SA-GCPO with each of TEMPERATURES, in both orders, and keeps the pair whose *validation* is
best on average over the last third of the run. `run` is the comparison: the untouched model, every loss at the same
budget (no early stop), SA-GCPO without its floor, and three controls: the anchor alone, rewards dealt out at random,
and plain teaching by the tools in as many steps. Every arm is killed and started again at will: what is finished is
kept, and two processes may share the work by --seeds or --arms. --teaching gives the anchor of
every arm targets that the tools propose (`anchor-only` is plain teaching then), in a work folder of its own.

Weights of an arm: `guarded`, those that the run hands over (guard "harm": the last ones, unless validation shows a loss
whose interval excludes zero; picking the best would only find the luck of the requests that had picked the start), and
`last`, without any guard.

The table: NDCG@10 and HR@10 of the generator alone on the test requests, means over seeds, a user's requests of all
seeds being one cluster of the bootstrap; each arm less the untouched model, and SA-GCPO less every other arm; for WHOLE
arms also fused with the tools. --skip-first N leaves out the first N test requests of each user: on ML-100K, rolling,
three were looked at while the method was diagnosed (docs/alignment.md).
The mean reward of each scenario: of the ten best items at up to --requests test requests, judged by tools fitted on
training events. The scenario matrix: what the lists that one scenario's instruction gives earn in another (a search's
query is given to its own instruction alone: it is made of the wanted item).
Steadiness: validation and reward over the steps, as a plot, and the largest fall of validation below its best before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from alignment_arm import FUSED, GUARDED, LAST, OURS, UNTOUCHED, WHOLE, AlignmentArm, places
from arms import finished, machines
from command import run_command

from genrec.bundle import MANIFEST, Bundle
from genrec.errors import GenrecError
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import Comparison, Report, Row, compare, provenance, rows_of, save
from genrec.io import atomic, read_json, sha256, write_json
from training.align_config import RANKINGS, ROLLOUTS, AlignConfig
from training.config import FitConfig
from training.fit import SPLITS, Fit

START, NO_FLOOR = "start", "sa-gcpo-no-floor"
ARMS: dict[str, dict[str, Any]] = {
    UNTOUCHED: {},
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
    "gspo": {"loss": "gspo"},
    "sapo": {"loss": "sapo", "temperature_positive": 1.0, "temperature_negative": 1.05},
    "ecpo": {"loss": "ecpo"},
    "gbpo": {"loss": "gbpo"},
    OURS: {"loss": "sa-gcpo"},
    NO_FLOOR: {"loss": "sa-gcpo", "floor": False},
    "anchor-only": {"policy": 0.0},
    "shuffled-rewards": {"loss": "sa-gcpo", "shuffled": True},
    "taught": {"policy": 0.0, "teaching": 0.7},
}
BUDGET = (
    *("steps", "updates", "requests", "group", "rollouts", "ranking", "learning_rate", "anchor", "evaluate_steps"),
    *("teaching", "genrec"),
)
TEMPERATURES = ((1.0, 2.0), (2.0, 1.0), (2.0, 5.0), (5.0, 2.0))
FLAGS = ("learning_rate", "updates", "rollouts", "ranking", "anchor", "teaching", "evaluate_steps")  # in every arm


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
    settings = {"steps": args.steps, "requests": args.batch, "seed": seed, "patience": 0, "guard": "harm"}
    settings |= {flag: getattr(args, flag) for flag in FLAGS}
    out, digest = args.work / f"{name}.{seed}", sha256(start / MANIFEST)[:12]
    config = AlignConfig(bundle=start, out=out, **settings | changes)
    shared = args.work / f"shared.{digest}.{seed}"
    made = AlignmentArm(config, lambda line: print(f"{out.name}: {line}", flush=True), shared)
    made.name, made.asked = name.split("_")[0], args.requests
    return made


def logged(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "report" / "alignment.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation"]["ndcg"]) for line in logged(folder) if "validation" in line]


def settled(values: list[float]) -> float:
    """The mean of the last third, so that neither the start nor one lucky validation decides."""
    return float(np.mean(values[-math.ceil(len(values) / 3) :]))


def sweep(args: argparse.Namespace) -> None:
    found, first = [], starts(args)
    for positive, negative in TEMPERATURES:
        name, reached = f"sweep_{positive:g}_{negative:g}", []
        changes = {"temperature_positive": positive, "temperature_negative": negative}
        for seed in args.seeds:
            made = job(args, name, seed, first[seed], changes)
            made.make_report = lambda: "validation alone"  # type: ignore[method-assign]
            reached.append(settled([v for step, v in validations(made.run()) if step]))
        found.append({"positive": positive, "negative": negative, "validation": float(np.mean(reached))})
        print(f"{name}: {found[-1]['validation']:.4f}", flush=True)
    best = max(found, key=lambda x: x["validation"])
    write_json(args.work / "temperatures.json", {"tried": found, "seeds": args.seeds, "kept": best})


def run(args: argparse.Namespace) -> None:
    path = args.work / "temperatures.json"
    kept = read_json(path)["kept"] if path.exists() else None
    taus = {"temperature_positive": kept["positive"], "temperature_negative": kept["negative"]} if kept else {}
    if not kept:
        print(f"no sweep in {args.work}: SA-GCPO keeps the temperatures of `genrec align`", flush=True)
    found = starts(args)
    for seed in args.seeds:
        for name in args.arms:
            changes = ARMS[name] | (taus if ARMS[name].get("loss") == OURS else {})
            clock = time.perf_counter()
            job(args, name, seed, found[seed], changes).run()
            print(f"{name}.{seed}: {time.perf_counter() - clock:.0f} s", flush=True)


def check_budgets(configs: dict[str, dict[str, Any]]) -> None:
    """Raises GenrecError where two arms were given different budgets, but for what makes an arm what it is."""
    name, first = next(iter(configs.items()))
    for other, config in configs.items():
        own = {key for arm in (name, other) for key in ARMS[arm.rpartition(".")[0]]}
        for key in (key for key in BUDGET if key not in own):
            mine, theirs = first["aligned"].get(key), config["aligned"].get(key)
            if mine != theirs:
                raise GenrecError(f"{name} was made with {key} {mine}, {other} with {theirs}; they cannot be compared")


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    folders = {name: found for name, found in finished(args.work).items() if name in ARMS}
    if UNTOUCHED not in folders:
        raise GenrecError(f"{args.work} holds no finished arm 'untouched': run this script's `run` first")
    folders = {name: folders[name] for name in ARMS if name in folders}
    seeds = sorted(set.intersection(*(set(found) for found in folders.values())))
    if not seeds:
        have = ", ".join(f"{name}: {' '.join(map(str, sorted(found)))}" for name, found in folders.items())
        raise GenrecError(f"no seed is finished in every arm ({have}); run the missing ones first")
    configs = {path.name: Bundle.load(path).config for found in folders.values() for path in found.values()}
    check_budgets(configs)
    first = Bundle.load(folders[UNTOUCHED][seeds[0]])
    split = SPLITS[first.config["protocol"]](first.dataset)
    kept = np.flatnonzero(places(split.test, split.test) >= args.skip_first)
    if not len(kept):
        raise GenrecError(f"--skip-first {args.skip_first} leaves no test request")
    requests = split.test.take(np.tile(kept, len(seeds)))
    rows, pairs, ranked = [], [], {}
    for name, found in folders.items():
        for part in parts_of(name):
            ranks, lists = (
                np.concatenate([np.load(found[s] / "report" / f"{part}-{what}.npy")[kept] for s in seeds])
                for what in ("ranks", "lists")
            )
            ranked[name, part] = Ranked(f"{name}: {part}", ranks, lists)
            rows += [r for r in rows_of(ranked[name, part], requests, fits=len(seeds)) if r.slice == "all"]
    for name, part, base, other in comparisons(folders):
        found_pairs = compare(ranked[name, part], ranked[base, other], requests, fits=len(seeds))
        pairs += [c for c in found_pairs if c.slice == "all"]
    earned = {
        (name, part): rewards_of(found, seeds, part, args.skip_first)
        for name, found in folders.items()
        for part in parts_of(name)
        if part != FUSED
    }
    rows += [row for key in earned for row in reward_rows(*key, earned[key])]
    pairs += [p for x in comparisons(folders) if x[1] != FUSED for p in reward_pairs(*x, earned)]
    guarded = {name: earned[name, GUARDED] for name in folders}
    seconds = time.perf_counter() - clock
    about = provenance(split.note, {f"alignment {i}": s for i, s in enumerate(seeds)}, seconds)
    chosen = args.work / "temperatures.json"
    shown = OURS if OURS in folders else [*folders][-1]
    about |= {
        "start_of_each_seed": {s: configs[folders[UNTOUCHED][s].name]["aligned"]["bundle"][:12] for s in seeds},
        "arms_made_on": machines([path for found in folders.values() for path in found.values()]),
        "settings": configs[folders[shown][seeds[0]].name]["aligned"],
        "temperatures": read_json(chosen) if chosen.exists() else None,
        "skip_first": args.skip_first,
        "ndcg_per_seed": {
            f"{n}: {part}": [round(float(ndcg(x, 10).mean()), 6) for x in np.split(r.ranks, len(seeds))]
            for (n, part), r in ranked.items()
        },
        "scenario_matrix": {n: matrix(guarded[n]) for n in WHOLE if n in guarded},
        "control": control(guarded),
        "steadiness": {n: steadiness(found, seeds) for n, found in folders.items() if n != UNTOUCHED},
        "seconds_of_an_arm": {n: spent(found, seeds) for n, found in folders.items() if n != UNTOUCHED},
        "ratios": {n: ratios(found, seeds) for n, found in folders.items() if n == OURS},
    }
    report = Report(f"{first.dataset.name}: policy losses", tuple(rows), tuple(pairs), about)
    save(report, args.out)
    plot(folders, seeds, args.out / "steadiness.png")
    print(f"{args.out}: {len(folders)} arms, {len(seeds)} seeds")


def parts_of(name: str) -> tuple[str, ...]:
    """What is measured of an arm: the untouched model has no last weights."""
    return (GUARDED, *((LAST,) if name != UNTOUCHED else ()), *((FUSED,) if name in WHOLE else ()))


def comparisons(folders: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(arm, part, baseline, its part): every arm less the untouched model, SA-GCPO less every other arm, and SA-GCPO
    without floor less SAPO: the temperatures alone."""
    out = []
    for name in folders:
        for part in parts_of(name) if name != UNTOUCHED else ():
            out.append((name, part, UNTOUCHED, FUSED if part == FUSED else GUARDED))
            others = [n for n in folders if n not in (name, UNTOUCHED) and part in parts_of(n)]
            out += [(name, part, n, part) for n in others] if name == OURS else []
            out += [(name, part, "sapo", part)] if name == NO_FLOOR and "sapo" in folders else []
    return out


def rewards_of(found: dict[int, Path], seeds: list[int], part: str, skip: int) -> dict[str, np.ndarray]:
    """The arrays of `scenario_rewards`, all seeds one after the other, without a user's first requests."""
    each = [np.load(found[s] / "report" / f"{part}-rewards.npz") for s in seeds]
    whole = {key: np.concatenate([e[key] for e in each]) for key in each[0].files}
    return {key: values[whole[f"{key.partition('/')[0]}/place"] >= skip] for key, values in whole.items()}


def scenarios_of(earned: dict[str, np.ndarray]) -> list[str]:
    return [key.removesuffix("/users") for key in earned if key.endswith("/users")]


def every_reward(earned: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """slice -> (rewards [B, 1], users [B]): each scenario under its own instruction, and all of them scaled so that
    their mean is that of the scenarios' means."""
    names = scenarios_of(earned)
    found = {f"reward in {s}": (earned[f"{s}/{s}"][:, None], earned[f"{s}/users"]) for s in names}
    whole = sum(len(users) for _, users in found.values())
    scaled = [values * whole / (len(names) * max(len(values), 1)) for values, _ in found.values()]
    return found | {"reward, mean": (np.concatenate(scaled), np.concatenate([u for _, u in found.values()]))}


def reward_rows(name: str, part: str, earned: dict[str, np.ndarray]) -> list[Row]:
    """The reward of each scenario under its own instruction, and their mean."""
    return [
        Row(f"{name}: {part}", s, len(users), len(np.unique(users)), {"reward": bootstrap(values, users)[0]})
        for s, (values, users) in every_reward(earned).items()
        if len(users)
    ]


def reward_pairs(
    name: str, part: str, base: str, other: str, earned: dict[tuple[str, str], dict[str, np.ndarray]]
) -> list[Comparison]:
    """The difference of two arms in each scenario's reward and in their mean."""
    ours, theirs = every_reward(earned[name, part]), every_reward(earned[base, other])
    return [
        Comparison(f"{name}: {part}", f"{base}: {other}", s, len(users), {"reward": paired(a, theirs[s][0], users)[0]})
        for s, (a, users) in ours.items()
        if len(users)
    ]


def matrix(earned: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """asked -> told -> mean reward."""
    names = scenarios_of(earned)
    return {a: {t: round(float(earned[f"{a}/{t}"].mean()), 4) for t in names} for a in names}


def control(earned: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Scenario control of the aligned model: in each scenario its reward less the untouched model's, and less its own
    under each other instruction, as [mean, low, high]."""
    if OURS not in earned or UNTOUCHED not in earned:
        return {}
    mine, names = earned[OURS], scenarios_of(earned[OURS])

    def less(s: str, other: np.ndarray) -> list[float]:
        i = paired(mine[f"{s}/{s}"][:, None], other[:, None], mine[f"{s}/users"])[0]
        return [round(x, 4) for x in (i.mean, i.low, i.high)]

    return {
        s: {UNTOUCHED: less(s, earned[UNTOUCHED][f"{s}/{s}"])}
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


def spent(found: dict[int, Path], seeds: list[int]) -> dict[str, float]:
    """Seconds of a run in rollouts, rewards, optimiser steps and validations, means over seeds."""
    lines = [line["seconds"] for s in seeds for line in logged(found[s]) if "seconds" in line]
    parts = ("rollout", "reward", "update", "validation")
    return {part: round(sum(x.get(part, 0.0) for x in lines) / len(seeds), 1) for part in parts}


def ratios(found: dict[int, Path], seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """Mean histograms of the last step on each batch of rollouts, over the run and over its first half: shares of the
    codes by ratio and by how far the gate is open, from the edges in docs/alignment.md on."""
    each = [[line for line in logged(found[s]) if "ratio_histogram" in line] for s in seeds]
    out: dict[str, dict[str, list[float]]] = {}
    for name in ("ratio_histogram", "gate_histogram"):
        values = np.array([[line[name] for line in lines] for lines in each])
        halves = {"whole": values, "first half": values[:, : max(1, values.shape[1] // 2)]}
        out[name] = {part: [round(float(x), 4) for x in v.mean((0, 1))] for part, v in halves.items()}
    return out


def plot(folders: dict[str, dict[int, Path]], seeds: list[int], path: Path) -> None:
    """Validation NDCG@10 less that of the start, and training reward, over the steps: a line per arm (mean of seeds), a
    band from the lowest to the highest seed for ours."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, (name, found) in enumerate(folders.items()):
        if name == UNTOUCHED:
            continue
        logs = [logged(found[s]) for s in seeds]
        wide = 2.2 if name == OURS else 1.0
        for axes, key in ((left, "validation"), (right, "reward")):
            every = [
                [(x["step"], x[key]["ndcg"] if key == "validation" else x[key]) for x in log if key in x]
                for log in logs
            ]
            values = np.array([[v for _, v in one] for one in every])
            steps = [step for step, _ in every[0]]
            if key == "validation":
                values = values - values[:, :1]
            if key == "reward":  # a running mean over five batches
                span = min(5, values.shape[1])
                values = np.stack([np.convolve(v, np.ones(span) / span, "valid") for v in values])
                steps = steps[span // 2 :][: values.shape[1]]
            axes.plot(steps, values.mean(0), label=name, lw=wide, color=colours[2 * number % 20 + number // 10])
            if name == OURS:
                axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=colours[2 * number % 20], lw=0)
    titles = "validation NDCG@10, averaged weights, less the start's", "reward of the rollouts"
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("optimiser steps")
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(0, color="grey", lw=0.8, ls="--")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
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
    four.add_argument("--skip-first", type=int, default=0, help="test requests of each user that are left out")
    four.set_defaults(run=table)
    for each in (one, two, three):
        each.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for each in (two, three):
        each.add_argument("--start", type=Path, nargs="+", help="finished bundles, one per seed 0, 1, ...")
        each.add_argument("--steps", type=int, default=AlignConfig.steps, help="optimiser steps of every arm")
        each.add_argument("--learning-rate", type=float, default=AlignConfig.learning_rate)
        each.add_argument("--updates", type=int, default=AlignConfig.updates)
        each.add_argument("--batch", type=int, default=AlignConfig.requests, help="requests in a batch of rollouts")
        each.add_argument("--anchor", type=float, default=AlignConfig.anchor)
        each.add_argument(
            "--teaching", type=float, default=AlignConfig.teaching,
            help="share of every arm's anchor targets that the tools propose (default 0; arm `taught`: .7)",
        )  # fmt: skip
        each.add_argument("--evaluate-steps", type=int, default=AlignConfig.evaluate_steps)
        each.add_argument("--rollouts", choices=ROLLOUTS, default=AlignConfig.rollouts)
        each.add_argument("--ranking", choices=RANKINGS, default=AlignConfig.ranking)
        each.add_argument("--requests", type=int, default=500, help="test requests judged in each scenario")
    for each in (one, two, three, four):
        each.add_argument("--work", type=Path, required=True)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
