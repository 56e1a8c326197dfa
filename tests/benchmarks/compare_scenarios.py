"""One model for all scenarios against one model for each: is the unified one inferior anywhere?

    python tests/benchmarks/compare_scenarios.py fit --data ml-100k --work scenarios --seeds 0 1 2
    python tests/benchmarks/compare_scenarios.py table --work scenarios --out docs/results/scenarios

Arms: `unified` learns all scenarios, as `genrec fit` does; `home`, `item`, `search` and `favourites` learn theirs
alone, from every training position that qualifies for it, and keep the weights that rank its own validation requests
best; `unified` keeps those that rank home's best. All share data, semantic IDs, tools and size of their seed. The one
model that takes the place of four is trained as long as the four together: EPOCHS each, and four times EPOCHS.
Tools teach the same share of early targets: `unified` at its home positions, as `genrec fit` does, the others at their
own; `search` is not taught, since its query tells the item.
Each scenario's test requests are ranked by the unified model and by its own, without any tool.

Not inferior: the lower end of the paired 95 % interval of NDCG@10, unified minus own, is above -MARGIN of the own
model's.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from arms import Arm, finished
from command import run_command

from genrec.bundle import Bundle
from genrec.contracts import HOME
from genrec.data import SCENARIOS as SCENARIOS_OF
from genrec.data import EvalSet
from genrec.errors import GenrecError
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import Report, compare, provenance, rows_of, save
from genrec.generator.batches import Batch, TrainingData
from genrec.generator.model import GeneratorModel
from genrec.io import write_json
from training.config import FitConfig
from training.evaluate import WIDTH, instruction_vectors, rank_generator, requests_of
from training.fit import SPLITS

UNIFIED, SCENARIOS = "unified", (HOME, "item", "search", "favourites")
MARGIN = 0.03


@dataclass(frozen=True)
class OneScenario(TrainingData):
    """Training positions of other scenarios than number `only` count nothing."""

    only: int = 0

    def batch(self, windows: np.ndarray, seed: int, teaching: float = 0.0) -> Batch:
        made = super().batch(windows, seed, teaching)
        return replace(made, weights=made.weights * (made.request.scenario == self.only))


class ScenarioArm(Arm):
    """`scenario` names the only one that is learned; UNIFIED for all."""

    scenario = UNIFIED

    def requests(self, validation: bool, scenario: str) -> EvalSet:
        return requests_of(self.parts(), self.split, self.split.validation if validation else self.split.test, scenario)

    def watched(self) -> EvalSet:
        scenario = HOME if self.scenario == UNIFIED else self.scenario
        return self.requests(True, scenario).sample(2000, seed=1)

    def training_data(self, model: GeneratorModel) -> TrainingData:
        data = super().training_data(model)
        if self.scenario == UNIFIED:
            return data
        tasks = tuple(replace(task, share=1.0) for task in data.tasks if task.name == self.scenario)
        only = data.scenario_ids[self.scenario]
        pupils = () if SCENARIOS_OF[self.scenario].query else (only,)
        return OneScenario(**vars(replace(data, tasks=tasks, pupils=pupils)), only=only)

    def choose_weights(self) -> str:
        write_json(self.folder / "fusion.json", {HOME: {"floors": {}, "fused": {"generator": 1.0}}})
        return "none: the generator alone is compared"

    def make_report(self) -> str:
        """Ranks and lists of the test requests of the scenarios that this arm serves."""
        parts, said = self.parts(), []
        for scenario in SCENARIOS if self.scenario == UNIFIED else (self.scenario,):
            requests = self.requests(False, scenario)
            found = rank_generator(parts.generator, requests, instruction_vectors(parts, requests), WIDTH)
            np.save(self.folder / "report" / f"{scenario}-ranks.npy", found.ranks)
            np.save(self.folder / "report" / f"{scenario}-lists.npy", found.lists)
            said.append(f"{scenario} {len(requests):,}")
        return "test requests ranked: " + ", ".join(said)


def fit(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for arm in args.arms:
            config = FitConfig(
                data=args.data,
                out=args.work / f"{arm}.{seed}",
                protocol=args.protocol,
                epochs=args.epochs * (len(SCENARIOS) if arm == UNIFIED else 1),
                d_model=args.d_model,
                seed=seed,
            )
            job = ScenarioArm(config, args.work / f"prepared.{seed}")
            job.scenario = arm
            job.run()


def check_budget(folders: dict[str, dict[int, Path]], seeds: list[int]) -> int:
    """The epochs of a model for one scenario. Raises GenrecError where the unified one was not trained as long as all
    of them together, or an arm has other settings."""
    alike: dict[str, object] | None = None
    for seed in seeds:
        for arm in (UNIFIED, *SCENARIOS):
            config = dict(Bundle.load(folders[arm][seed]).config)
            epochs, config["seed"] = config.pop("epochs"), 0
            own = epochs // len(SCENARIOS) if arm == UNIFIED else epochs
            alike = alike or config | {"own": own}
            if config | {"own": own} != alike or (arm == UNIFIED and epochs != own * len(SCENARIOS)):
                raise GenrecError(
                    f"{folders[arm][seed]} has other settings or epochs than the first arm ({UNIFIED} takes "
                    f"{len(SCENARIOS)} times those of one scenario): fit it again"
                )
    assert alike is not None
    return int(str(alike["own"]))


def table(args: argparse.Namespace) -> None:
    clock = time.perf_counter()
    folders = finished(args.work)
    missing = [arm for arm in (UNIFIED, *SCENARIOS) if arm not in folders]
    if missing:
        raise GenrecError(f"{args.work} holds no finished arm {missing[0]!r}: run this script's `fit` first")
    seeds = sorted(set.intersection(*(set(found) for found in folders.values())))
    first = Bundle.load(folders[UNIFIED][seeds[0]])
    epochs = check_budget(folders, seeds)
    split = SPLITS[first.config["protocol"]](first.dataset)
    rows, pairs, verdicts = [], [], {}
    for scenario in SCENARIOS:
        asked = requests_of(first, split, split.test, scenario)
        requests = asked.take(np.tile(np.arange(len(asked)), len(seeds)))
        ranked = []
        for arm, label in ((UNIFIED, f"{scenario}: unified"), (scenario, f"{scenario}: its own model")):
            ranks, lists = (
                np.concatenate([np.load(folders[arm][s] / "report" / f"{scenario}-{what}.npy") for s in seeds])
                for what in ("ranks", "lists")
            )
            ranked.append(Ranked(label, ranks, lists))
            rows += [r for r in rows_of(ranked[-1], requests, fits=len(seeds)) if r.slice == "all"]
        pairs += [c for c in compare(*ranked, requests, fits=len(seeds)) if c.slice == "all"]
        own, low = rows[-1].metrics["NDCG@10"].mean, pairs[-1].differences["NDCG@10"].low
        verdicts[scenario] = {"lowest_relative": round(low / own, 4), "not_inferior": bool(low > -MARGIN * own)}
        print(f"{scenario}: at worst {low / own:+.1%}, {'not inferior' if low > -MARGIN * own else 'not shown'}")
    about = provenance(split.note, {f"fit {i}": s for i, s in enumerate(seeds)}, time.perf_counter() - clock)
    about |= {"settings": first.config, "epochs": {UNIFIED: first.config["epochs"], "its own": epochs}}
    about |= {"margin": MARGIN, "verdicts": verdicts}
    save(
        Report(f"{first.dataset.name}: one model or one for each scenario", tuple(rows), tuple(pairs), about), args.out
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fit", help="fit the arms")
    one.add_argument("--data", required=True)
    one.add_argument("--protocol", default="rolling")
    one.add_argument("--epochs", type=int, default=8, help="of a model for one scenario (default: %(default)s)")
    one.add_argument("--d-model", type=int, default=128)
    one.add_argument("--arms", nargs="+", choices=(UNIFIED, *SCENARIOS), default=(UNIFIED, *SCENARIOS))
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--work", type=Path, required=True)
    one.set_defaults(run=fit)
    one = commands.add_parser("table", help="the table over finished arms")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=table)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
