"""What routing costs: a user with 100 triggers on 4 channels, and how it grows with users, triggers and quota.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_capts.py [--items 50000] [--out capts-cost.json]

Random tables and an untrained network: the cost does not depend on what was learned. Processor time of one thread,
median over repeats, from contexts to routed pairs, and by part. Target: at most 5 ms for one user.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from genrec.contracts import UserContext
from genrec.evaluation.report import provenance
from genrec.io import write_json
from genrec.tools.capts import CAPTS, CAPTSConfig
from genrec.tools.capts.channels import Channels
from genrec.tools.capts.model import CATR
from genrec.tools.capts.policies import routes
from genrec.tools.capts.requests import triggers_of

REPEATS = 30


def milliseconds(job: Callable[[], object], repeats: int = REPEATS) -> float:
    job()
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        job()
        spent.append(1000 * (time.process_time() - start))
    return statistics.median(spent)


def tool_of(items: int, config: CAPTSConfig) -> CAPTS:
    rng = np.random.default_rng(0)
    shape = (items, len(config.channels), config.neighbours)
    tool = CAPTS(config)
    scores = np.sort(rng.random(shape).astype(np.float16), axis=2)[:, :, ::-1]
    rows = rng.integers(0, items, shape).astype(np.int32)
    tool.channels = Channels(config.channels, rows, scores, np.ones(items, np.float32))
    tool.content = rng.normal(size=(items, 64)).astype(np.float32)
    torch.manual_seed(0)
    tool.network = CATR(64, len(config.channels), config.width).eval()
    tool.titles = [""] * items
    _ = tool.channels.features
    return tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=Path("capts-cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock, rng = time.perf_counter(), np.random.default_rng(1)
    tool = tool_of(args.items, replace(CAPTSConfig(), triggers=100, quota=40))

    def users(count: int, triggers: int = 100) -> list[UserContext]:
        rows = [rng.choice(args.items, triggers, replace=False) for _ in range(count)]
        times = tuple(float(86400 * i) for i in range(triggers))
        return [UserContext(tuple(r.tolist()), times) for r in rows]

    one = users(1)
    triggers = triggers_of(one, tool.config)
    values = tool.values(triggers)
    found = {
        "one user, ms": milliseconds(lambda: tool.route(one)),
        "of that: triggers": milliseconds(lambda: triggers_of(one, tool.config)),
        "of that: network": milliseconds(lambda: tool.values(triggers)),
        "of that: routing": milliseconds(lambda: routes(triggers, values, tool.channels, tool.content, tool.config)),
    }
    growth: dict[str, dict[int, float]] = {"users": {}, "triggers": {}, "quota": {}}
    for count in (1, 4, 16, 64, 256):
        asked = users(count)
        growth["users"][count] = milliseconds(lambda asked=asked: tool.route(asked), 5)
    for n in (10, 25, 50, 100):
        asked = users(1, n)
        growth["triggers"][n] = milliseconds(lambda asked=asked: tool.route(asked))
    for quota in (10, 20, 40, 80):
        wide = tool.steered(quota=quota)
        growth["quota"][quota] = milliseconds(lambda wide=wide: wide.route(one))
    for name, value in found.items():
        print(f"{name:20} {value:7.2f}")
    for name, row in growth.items():
        print(f"{name:10}", "  ".join(f"{k}: {v:.2f} ms" for k, v in row.items()))
    about = provenance("processor time of one thread, median", {"tables": 0}, time.perf_counter() - clock)
    ok = found["one user, ms"] <= 5
    write_json(args.out, {"milliseconds": found, "growth": growth, "within_5_ms": ok, "about": about})


if __name__ == "__main__":
    main()
