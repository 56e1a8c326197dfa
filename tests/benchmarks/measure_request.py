"""What one request costs: without an instruction, with a stored one, and with a typed text.

    OMP_NUM_THREADS=1 python tests/benchmarks/measure_request.py --bundle bundles/ml-100k-0 --out request.json

Requests of users of the bundle's data, one at a time, each in these ways in turns; milliseconds, median and 95th
percentile, and the medians of the trace's parts ("instruction": read from the store, and embedded where its text is
new; "stored, again" is the next request of the same user). The stored instructions are the template's, in a store of
the benchmark's own: reading one is as much work whoever wrote it. At the end the process must hold none of the packages
that run language models; what it has loaded is the text encoder. A text typed at home is a search, which has weights of
its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

import prompts
from genrec import Recommender
from genrec.contracts import HOME, Trace, UserContext
from genrec.evaluation.report import provenance
from genrec.instructions import PromptWriter, open_store
from genrec.instructions.plain import plain_instruction
from genrec.io import write_json

WRITERS = ("vllm", "trl", "serving.llm")  # what loads or calls a language model


def asked(recommender: Recommender, contexts: list[UserContext], text: str | None) -> tuple[list[float], list[Trace]]:
    """Milliseconds and traces of single requests."""
    times, traces = [], []
    for context in contexts:
        clock = time.perf_counter()
        traces.append(recommender.recommend(context, 10, text))
        times.append(1000 * (time.perf_counter() - clock))
    return times, traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--text", default="a film for a rainy evening", help="what is typed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.users < 4:
        raise SystemExit(f"--users is {args.users}; at least 4 are needed, as three only warm up")
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
        store, empty = Path(folder) / "stored.sqlite", Path(folder) / "empty.sqlite"
        told, untold = Recommender.load(args.bundle, store), Recommender.load(args.bundle, empty)
        dataset = told.bundle.dataset
        contexts = [told.context(user) for user in dataset.sequences.users[: args.users]]
        writer = PromptWriter(dataset.catalog, prompts.load("intent_v2"))
        with open_store(store) as opened:
            opened.put_many((c.user or "", HOME, plain_instruction(c, writer)) for c in contexts)
        with open_store(empty) as opened:
            opened.put_many([])
        ways: dict[str, tuple[Recommender, str | None]]
        ways = {"no instruction": (untold, None), "stored": (told, None), "stored, again": (told, None)}
        ways |= {"typed": (untold, args.text)}
        found: dict[str, tuple[list[float], list[Trace]]] = {name: ([], []) for name in ways}
        for recommender, text in ways.values():
            asked(recommender, contexts[:3], text)  # what is read when first used
        for turn, context in enumerate(contexts[3:]):
            order = list(ways.items())
            for name, (recommender, text) in order[turn % 2 * 3 :] + order[: turn % 2 * 3]:
                text = text and f"{text}, {context.user}"  # not known before
                times, traces = asked(recommender, [context], text)
                found[name][0].extend(times)
                found[name][1].extend(traces)
    result: dict = {"users": len(contexts) - 3, "items": len(dataset.catalog)}
    for name, (times, traces) in found.items():
        result[name] = {
            "median ms": round(float(np.median(times)), 2),
            "p95 ms": round(float(np.quantile(times, 0.95)), 2),
            "parts, median ms": {
                part: round(1000 * float(np.median([t.seconds.get(part, 0.0) for t in traces])), 2)
                for part in traces[0].seconds
            },
            "source": sorted({trace.instruction_source for trace in traces}),
        }
        print(name, result[name], flush=True)
    if loaded := [name for name in WRITERS if name in sys.modules]:
        raise SystemExit(f"a request has loaded {', '.join(loaded)}")
    result["about"] = provenance("single requests in turns", {"fit": told.bundle.config["seed"]}, 0.0)
    result["about"]["seconds"] = round(time.perf_counter() - clock, 1)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
