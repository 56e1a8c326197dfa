"""What a request of 100 candidates costs: MARM against recomputing the states and against DIN, over L and n.

    python tests/benchmarks/bench_marm.py [--out docs/results/marm-cost]

One request, random weights, width 64, one thread; the time is the median of --repeats interleaved runs, states read
from the cache included. `shared` recomputes the states of the history once for all candidates, by the first L - 1
layers of the causal transformer (with one layer there are none), and then does what MARM does; `per candidate` does
both for each candidate (measured for one, times 100); they are measured up to --quadratic events, beyond that their
operations stand alone. `DIN` is the published activation unit over the same n; `one layer` is MARM with L = 1.
Operations are multiplications and additions, by the formulas of `operations`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from ranking_arms import new_figure, save_figure

from genrec.evaluation.report import provenance
from genrec.io import write_json, write_text
from genrec.tools.marm.cache import CacheConfig, StateCache
from genrec.tools.ranking.attention import Stack
from genrec.tools.ranking.models import UNIT, RankerConfig, RankerModel

HEADS, ITEMS, TASKS = 2, 10_000, 1


def operations(system: str, layers: int, n: int, d: int, candidates: int) -> int:
    """Of one request. A product of [a, b] and [b, c] counts 2 a b c."""
    project = layers * n * 4 * d * d  # keys and values of the history
    each = layers * (4 * n * d + 4 * d * d) + (layers - 1) * 16 * d * d  # attention; q and o; feed-forward
    states = (layers - 1) * (4 * n * n * d + n * 24 * d * d)  # self-attention over n, projections, feed-forward
    return {
        "marm": project + candidates * each,
        "shared": states + project + candidates * each,
        "per candidate": candidates * (states + project + each),
        "DIN": candidates * n * (2 * 4 * d * UNIT + 2 * UNIT + 2 * d),
    }[system]


def medians(
    jobs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each by a clock, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, one in jobs.items():
            begun = clock()
            one()
            if repeat:  # the first is a warm-up
                seconds[name].append(clock() - begun)
    return {name: statistics.median(found) for name, found in seconds.items()}


@torch.no_grad()
def cell(layers: int, n: int, args: argparse.Namespace) -> dict[str, object]:
    """All systems at one L and n."""
    torch.manual_seed(0)
    d, count = args.d, args.candidates
    stack, one = Stack(d, layers, HEADS, n, TASKS).eval(), Stack(d, 1, HEADS, n, TASKS).eval()
    din = RankerModel(RankerConfig("din", 1, ITEMS, TASKS, 5, d=d, n=n)).eval()
    table = torch.randn(ITEMS + 1, d)
    rows = torch.randint(0, ITEMS, (1, n))
    feedback, there = torch.ones(1, n, TASKS), torch.ones(1, n, dtype=torch.bool)
    x = table[torch.randint(0, ITEMS, (1, count))]
    cache = StateCache(CacheConfig(1, n, layers - 1, d))
    places, key = np.arange(n)[None], np.array([1])
    cache.write(
        np.ones(n, np.int64), places[0], rows[0].numpy(), np.random.default_rng(0).normal(size=(n, layers - 1, d))
    )

    def marm() -> None:
        states, present = (torch.from_numpy(a) for a in cache.read(key, places, rows.numpy()))
        stack.targets(x, stack.memory(table[rows], feedback, states.float(), present), there)

    def shared() -> None:
        states = stack.states(table[rows], feedback)
        stack.targets(x, stack.memory(table[rows], feedback, states, there), there)

    def single() -> None:
        states = stack.states(table[rows], feedback)
        stack.targets(x[:, :1], stack.memory(table[rows], feedback, states, there), there)

    def long_din() -> None:
        for part in x.split(10, 1):
            din.activate(part, table[rows], there)

    def one_layer() -> None:
        one.targets(x, one.memory(table[rows], feedback, None, None), there)

    jobs: dict[str, Callable[[], object]] = {"marm": marm, "one layer": one_layer, "DIN": long_din}
    if n <= args.quadratic:
        jobs |= {"shared": shared, "per candidate": single}
    seconds, busy = medians(jobs, args.repeats), medians(jobs, args.repeats, time.thread_time)
    for found in (seconds, busy):
        if "per candidate" in found:
            found["per candidate"] *= count
    ops = {name: operations(name, layers, n, d, count) for name in ("marm", "shared", "per candidate", "DIN")}
    ops["one layer"] = operations("marm", 1, n, d, count)
    return {
        "L": layers,
        "n": n,
        "operations": ops,
        "seconds": {k: round(v, 6) for k, v in seconds.items()},
        "times marm, operations": {k: round(v / ops["marm"], 3) for k, v in ops.items()},
        "times marm, seconds": {k: round(v / seconds["marm"], 3) for k, v in seconds.items()},
        "times marm, processor seconds": {k: round(v / busy["marm"], 3) for k, v in busy.items()},
        "cache bytes": {
            "L n d 2": layers * n * d * 2,
            "stored": cache.config.state_bytes,
            "measured": cache._states.nbytes + cache._tags.nbytes + cache._items.nbytes,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("marm-cost"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--events", type=int, nargs="+", default=[50, 100, 200, 500, 1000, 2000, 5000, 10_000])
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quadratic", type=int, default=2000, help="most events at which what is quadratic is run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter()
    rows = []
    for n in args.events:
        for layers in args.layers:
            rows.append(cell(layers, n, args))
            print(f"L {layers}, n {n}: {rows[-1]['times marm, processor seconds']}", flush=True)
    about = provenance(f"d {args.d}, {args.candidates} candidates, one thread", {}, time.perf_counter() - clock)
    write_json(args.out / "report.json", {"rows": rows, "about": about})
    systems = ("one layer", "DIN", "shared", "per candidate")
    lines = [
        f"| L | n | MARM ms | {' | '.join(f'{s}: ops, time' for s in systems)} | kB: L n d 2, stored, measured |",
        "|---|---|---|" + "---|" * (len(systems) + 1),
    ]
    for r in rows:
        cells = [f"{r['times marm, operations'][s]}, {r['times marm, seconds'].get(s, '')}" for s in systems]
        size = ", ".join(f"{v / 1000:.0f}" for v in r["cache bytes"].values())
        lines.append(f"| {r['L']} | {r['n']} | {1000 * r['seconds']['marm']:.2f} | {' | '.join(cells)} | {size} |")
    lines += [
        "",
        "Operations and wall time as multiples of MARM's; processor time, which other work on the machine does not",
        "change, is in report.json.",
        *[f"- {k}: `{v}`" for k, v in about.items()],
    ]
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    figure, axes = new_figure(7, 4.5)
    deepest = [r for r in rows if r["L"] == max(args.layers)]
    for system in ("marm", *systems):
        line = [(r["n"], 1000 * r["seconds"][system]) for r in deepest if system in r["seconds"]]
        axes.plot(*zip(*line, strict=True), marker="o", label=system)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("events of history")
    axes.set_ylabel(f"ms per {args.candidates} candidates, L = {max(args.layers)}")
    axes.legend(frameon=False)
    save_figure(figure, args.out / "cost.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
