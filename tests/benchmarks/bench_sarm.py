"""What SARM costs: a request against the same ranker with learned vectors in the place of the bank's, and training.

    python tests/benchmarks/bench_sarm.py [--data ml-100k] [--out docs/results/sarm-cost]

Serving: one request of --candidates candidates, and 64 of them at once, interleaved, medians of --repeats; the parts
before the model (tensors of the request) are the same for both and are left out. Training: median seconds of a step of
SARM's batch, interleaved, of SARM, of the learned vectors and of identifiers alone; the batches are made before.
Cold items: rows that `SARM.add` takes up per second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from bench_marm import medians
from ranking_arms import task_of, test_positions

from genrec.evaluation.report import provenance
from genrec.io import write_json, write_text
from genrec.tools.ranking.samples import TRAIN
from genrec.tools.sarm.anchors import anchors_for
from genrec.tools.sarm.model import SARMModel, SARMModelConfig, make_bank
from genrec.tools.sarm.tokens import TokenStreams
from genrec.tools.sarm.tool import attended
from genrec.tools.sarm.train import SARMTraining, Trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--out", type=Path, default=Path("sarm-cost"))
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter()
    task = task_of(args.data, (), "per-user")
    texts = [a.text for a in anchors_for(task.samples.catalog)]
    streams = TokenStreams.fit(texts)
    tokens, (base, domain) = streams.encode(texts), streams.sizes
    models, banks = {}, {}
    for name, side in (("sarm", "anchor"), ("learned", "learned"), ("ids", "none")):
        torch.manual_seed(0)
        sizes = SARMModelConfig(
            task.users, task.items, task.tasks, task.width, side=side, base_tokens=base, domain_tokens=domain
        )
        models[name] = SARMModel(sizes).eval()
        banks[name] = make_bank(models[name], tokens.base, tokens.domain, np.arange(task.items))
    found: dict[str, object] = {"serving": {}}
    rng = np.random.default_rng(0)
    for size in (1, 64):
        batch = task.batch(rng.choice(test_positions(task), size), models["sarm"].config.n)
        items = torch.from_numpy(rng.integers(0, task.items, (size, args.candidates)))
        dense = batch.dense.expand(-1, args.candidates, -1)
        batch = type(batch)(**(vars(batch) | {"item": items, "dense": dense}))

        def score(name: str, batch: object = batch) -> None:
            with torch.no_grad():
                models[name].score(batch, banks[name])  # type: ignore[arg-type]

        runs = [
            medians({name: (lambda name=name: score(name)) for name in models}, max(3, args.repeats // 5))
            for _ in range(5)
        ]
        middle = {name: statistics.median(r[name] for r in runs) for name in models}
        ratios = [r["sarm"] / r["learned"] for r in runs]
        found["serving"][f"{size} requests"] = {  # type: ignore[index]
            "ms": {name: round(1000 * s, 3) for name, s in middle.items()},
            "candidates per second": {name: round(size * args.candidates / s) for name, s in middle.items()},
            "sarm over learned": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }
    config = SARMTraining()
    order = rng.permutation(np.flatnonzero(task.part == TRAIN))
    full = [
        task.batch(order[at : at + config.batch], models["sarm"].config.n)
        for at in range(0, min(len(order), args.steps * config.batch), config.batch)
    ]
    trainers = {name: Trainer(model.train(), banks[name], tokens, config) for name, model in models.items()}
    timed: dict[str, list[float]] = {name: [] for name in trainers}
    for number, batch in enumerate([full[0], *full]):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(batch)
            if number:  # the first is a warm-up
                timed[name].append(time.perf_counter() - start)
    steps = {name: statistics.median(values) for name, values in timed.items()}
    found["training"] = {
        "seconds per step": {name: round(s, 4) for name, s in steps.items()},
        "sarm over learned": round(steps["sarm"] / steps["learned"], 3),
        "sarm over ids": round(steps["sarm"] / steps["ids"], 3),
    }
    models["sarm"].eval()
    taken = []
    for _ in range(4):  # what SARM.add does; the first is a warm-up
        start = time.perf_counter()
        again = streams.encode(texts)
        bank = make_bank(models["sarm"], again.base, again.domain, np.full(task.items, models["sarm"].config.items))
        attended(models["sarm"], bank, again, np.arange(task.items))
        taken.append(time.perf_counter() - start)
    found["new items per second"] = round(task.items / statistics.median(taken[1:]))
    found["bank bytes"] = banks["sarm"].bytes
    about = provenance(
        f"{task.samples.name}, one thread, {args.candidates} candidates", {}, time.perf_counter() - clock
    )
    write_json(args.out / "report.json", found | {"about": about})
    lines = [f"- {k}: `{v}`" for k, v in (found | about).items()]
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines[:5]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
