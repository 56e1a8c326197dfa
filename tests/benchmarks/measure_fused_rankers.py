"""What MARM and SARM add to the fused list: finished bundles with and without them, on the same test requests.

    python tests/benchmarks/measure_fused_rankers.py --bundles bundles/ml-100k-0 bundles/ml-100k-1 bundles/ml-100k-2 \\
        --work fused-rankers --out docs/results/fused-rankers-ml-100k

Each ranker is fitted on the ratings of the bundle's training events, as `genrec fit --rankers` does, and judges the
shortlist; its weight is chosen on the validation requests of each scenario, after the generator's. `noise` is a
control: a ranker that says what chance says. Rows are the fused list in `home` and in `favourites`, whose wanted items
were rated high; differences to the list without rankers are paired. A fitted ranker stays in --work, so a killed run
goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from genrec.bundle import MANIFEST, Bundle
from genrec.contracts import HOME, UserContext
from genrec.data import Dataset, EvalSet
from genrec.device import fastest_device
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import Report, compare, provenance, rows_of, save
from genrec.io import sha256
from genrec.tools.rankers import RANKERS, open_tool, train_ranker
from serving.models import whole_folder
from training.evaluate import FUSED_ROW, fused_weights, rank_systems, requests_of
from training.fit import SPLITS, WEIGHING

NONE, SCENARIOS = "none", (HOME, "favourites")
ARMS: dict[str, tuple[str, ...]] = {NONE: (), "noise": ("noise",), **{n: (n,) for n in RANKERS}, "both": RANKERS}


class Noise:
    """A ranker whose scores are chance, the same for the same request."""

    name = "noise"

    def score(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
        seeds = [len(c.history) + 1000 * int(sum(c.history)) for c in contexts]
        chance = np.stack([np.random.default_rng(s).random(items.shape[1]) for s in seeds])
        return np.where(items < 0, -np.inf, chance).astype(np.float32)


def fitted(name: str, rated: Dataset, folder: Path, seed: int) -> Any:
    if not folder.is_dir():
        clock = time.perf_counter()
        tool = train_ranker(name, rated, lambda line: print(f"{folder.name}: {line}", flush=True), seed)
        with whole_folder(folder) as temporary:
            tool.save(temporary)
        print(f"{folder.name}: fitted in {time.perf_counter() - clock:.0f} s", flush=True)
    return open_tool(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="+", required=True, help="fits of the same data, other seeds")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    clock, seeds = time.perf_counter(), []
    ranked: dict[tuple[str, str], list[tuple[EvalSet, Ranked]]] = {}
    chosen: list[dict[str, object]] = []
    for path in args.bundles:
        bundle = Bundle.load(path)
        seed, split = int(bundle.config["seed"]), SPLITS[bundle.config["protocol"]](bundle.dataset)
        seeds.append(seed)
        digest = sha256(path / MANIFEST)[:12]
        rated = replace(bundle.dataset, sequences=split.train)
        rankers = {n: fitted(n, rated, args.work / f"{n}.{digest}", seed) for n in RANKERS} | {"noise": Noise()}
        for arm, names in ARMS.items():
            parts = Bundle(path, bundle.config, device=fastest_device())
            parts.__dict__["rankers"] = {n: rankers[n] for n in names}
            for scenario in SCENARIOS:
                floors = bundle.fusion(scenario)["floors"]
                asked = requests_of(parts, split, split.validation, scenario).sample(WEIGHING, seed=2)
                weights = fused_weights(parts, asked, floors)
                parts.__dict__["weights"] = {HOME: {"floors": floors, "fused": weights}}
                test = requests_of(parts, split, split.test, scenario)
                found = {r.system: r for r in rank_systems(parts, test, scenario=HOME)}[FUSED_ROW]
                ranked.setdefault((scenario, arm), []).append((test, found))
                chosen.append({"seed": seed, "scenario": scenario, "rankers": arm, "weights": weights})
                print(f"{path.name}, {scenario}, {arm}: {weights}", flush=True)
    rows, pairs, together = [], [], {}
    for (scenario, arm), each in ranked.items():
        test, fits = each[0][0], len(each)
        requests = test.take(np.tile(np.arange(len(test)), fits))
        one = Ranked(
            f"{scenario}: {arm}", *(np.concatenate([getattr(f, k) for _, f in each]) for k in ("ranks", "lists"))
        )
        together[scenario, arm] = one
        rows += [r for r in rows_of(one, requests, fits=fits) if r.slice == "all"]
        if arm != NONE:
            pairs += [c for c in compare(one, together[scenario, NONE], requests, fits=fits) if c.slice == "all"]
    about = provenance(split.note, {f"fit {i}": seed for i, seed in enumerate(seeds)}, 0.0)
    about |= {"seconds": round(time.perf_counter() - clock, 1), "weights": chosen}
    save(Report(f"{bundle.dataset.name}: rankers in the fused list", tuple(rows), tuple(pairs), about), args.out)
    print((args.out / "report.md").read_text(encoding="utf-8").split("- protocol")[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
