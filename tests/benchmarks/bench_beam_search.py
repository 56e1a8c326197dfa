"""Beam search users/s: genrec's against transformers' `generate`, same weights, beams and machine, in one run.

    python tests/benchmarks/bench_beam_search.py [--bundle bundle] [--width 50] [--history 10] [--out beam_search.json]
    OMP_NUM_THREADS=2 taskset -c 2,3 python tests/benchmarks/bench_beam_search.py     (on two quiet cores)

Without a bundle: random weights over 12,000 items, the size of Amazon Beauty. 50 beams are what genrec serves with.
Every row first checks that both find the same items with the same log-probabilities, then times both in turns, each
with the batch size that suits it best, and takes medians. After the main row come others that change one thing at a
time, always on random weights: history, beams, catalogue (`--no-growth` leaves them out). Prints a table, writes JSON.

- generate: with its key-value cache and its own constraint, `prefix_allowed_tokens_fn`, which looks up one prebuilt
  list per beam; the model's part of every step is genrec's own code (see hf_adapter.py).
- generate, masked: no constraint of its own; the logits that genrec's model returns are low for illegal codes. It is
  the most that can be got out of `generate` with the help of genrec's own tree.
- cpu: users per second of processor time. With one thread it holds on a busy machine too, where the clock does not.
- limit: the time that the search's matrix products, as counted while it runs, would take at this machine's measured
  rate; `share` is how much of the time they account for.
- memory: what the process grows by at most during one call (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from hf_adapter import GenerateAdapter

from genrec.bundle import Bundle
from genrec.contracts import UserContext
from genrec.evaluation.report import provenance
from genrec.generator.config import GeneratorConfig
from genrec.generator.model import GeneratorModel, History, Request
from genrec.generator.search import beam_search, make_history, make_request
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from training.evaluate import WIDTH

CPU = torch.device("cpu")
BATCHES = (16, 32, 64, 128, 256)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device = CPU, repeats: int = 5) -> float:
    """Measured fp32 matrix-product rate of a device, FLOP/s; on a CPU that of this process."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        wait(device)

    wait(device)
    return 2 * size**3 / min(seconds(product) for _ in range(repeats))


def seconds(job: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    job()
    return clock() - start


def operations(job: Callable[[], object]) -> int:
    """FLOP of all matrix products in a call, attention's included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is not counted
        job()
    return counter.get_total_flops()


def peak_memory(job: Callable[[], object]) -> float | None:
    """MiB by which the process grows at most during a call; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size
        before = _status("VmRSS")
        job()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def random_model(items: int, seed: int = 0, max_history: int = 50) -> GeneratorModel:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(items, 384)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=128, iterations=4))
    torch.manual_seed(seed)
    model = GeneratorModel(GeneratorConfig(items=items, max_history=max_history))
    return model.set_catalog(ids.trie, torch.from_numpy(x)).eval()


def requests(model: GeneratorModel, users: int, length: int) -> tuple[History, Request]:
    assert model.trie is not None
    histories = np.random.default_rng(0).integers(0, model.trie.items, (users, length))
    contexts = [UserContext(history=tuple(row)) for row in histories.tolist()]
    return make_history(contexts, model.config.max_history), make_request(model, contexts)


def measure(
    model: GeneratorModel, width: int, length: int, repeats: int, rate: float, peers: bool = True
) -> dict[str, Any]:
    """One row: both searches (`peers`: also generate with masked logits, and genrec with a filter)."""
    assert model.trie is not None
    asked = {users: requests(model, users, length) for users in BATCHES}
    allowed = {users: torch.ones(users, model.trie.items, dtype=torch.bool) for users in BATCHES}
    for users, (history, _) in asked.items():
        allowed[users].scatter_(1, history.rows, False)  # nothing from the history again
    adapter = GenerateAdapter(model).eval()
    ways: dict[str, Callable[[int], object]] = {
        "genrec": lambda users: beam_search(model, *asked[users], width),
        "generate": lambda users: adapter.search(asked[users][0].rows, width),
    }
    if peers:
        ways["generate, masked"] = lambda users: adapter.search(asked[users][0].rows, width, constrained=False)
        ways["genrec, filtered"] = lambda users: beam_search(model, *asked[users], width, allowed[users])
    row: dict[str, Any] = {"items": model.trie.items, "width": width, "history": length}
    row |= agreement(model, adapter, *asked[64], width)
    best = {}
    for name, search in ways.items():
        rounds = [[seconds(lambda n=n, search=search: search(n)) / n for n in BATCHES] for _ in range(3)]
        cost = [min(times) for times in zip(*rounds, strict=True)]
        best[name] = BATCHES[cost.index(min(cost))]
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # in turns, so that what else the machine does falls on all
        for name, search in ways.items():
            start = time.process_time()
            wall[name].append(seconds(lambda name=name, search=search: search(best[name])))
            cpu[name].append(time.process_time() - start)
    for name, search in ways.items():
        users = best[name]
        flop = operations(lambda search=search, users=users: search(users)) / users
        per_second = users / statistics.median(wall[name])
        row[name] = {
            "batch": users,
            "users_per_second": per_second,
            "users_per_cpu_second": users / statistics.median(cpu[name]),
            "flop_per_user": flop,
            "share_of_matmul_limit": flop * per_second / rate,
            "peak_memory_mib": peak_memory(lambda search=search, users=users: search(users)),
        }
    for key in ("users_per_second", "users_per_cpu_second"):
        row[f"ratio_{key}"] = row["genrec"][key] / row["generate"][key]
    return row


def agreement(
    model: GeneratorModel, adapter: GenerateAdapter, history: History, request: Request, width: int
) -> dict[str, Any]:
    """Whether both searches find the same: items as sets and in order, and log-probabilities."""
    mine = beam_search(model, history, request, width)
    items, scores = adapter.search(history.rows, width)
    sets = [set(a) == set(b) for a, b in zip(mine.items.tolist(), items.tolist(), strict=True)]
    difference = float((mine.scores - scores).abs().max())
    if not difference < 1e-3:
        raise SystemExit(f"the two searches differ by {difference:.3g} in log-probability: nothing to compare")
    return {
        "same_items": sum(sets) / len(sets),
        "same_order": float((mine.items == items).float().mean()),
        "largest_score_difference": difference,
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"\n{row['items']:,} items, {row['width']} beams, history {row['history']}: same items for "
        f"{row['same_items']:.0%} of users, log-probabilities within {row['largest_score_difference']:.0e}; "
        f"genrec / generate {row['ratio_users_per_second']:.1f} by the clock, "
        f"{row['ratio_users_per_cpu_second']:.1f} in processor time"
    )
    for name in (n for n, value in row.items() if isinstance(value, dict)):
        v = row[name]
        memory = "" if v["peak_memory_mib"] is None else f"{v['peak_memory_mib']:7.0f} MiB"
        print(
            f"  {name:17} batch {v['batch']:3} {v['users_per_second']:8,.0f} users/s {v['users_per_cpu_second']:8,.0f} "
            f"cpu {v['flop_per_user'] / 1e6:7.1f} MFLOP/user  share {v['share_of_matmul_limit']:4.0%} {memory}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="the main row on this bundle's generator")
    parser.add_argument("--items", type=int, default=12_000, help="catalogue size of the random model")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-growth", action="store_true", help="the main row only")
    parser.add_argument("--out", type=Path, default=Path("beam_search.json"))
    args = parser.parse_args()
    clock = time.perf_counter()
    rate = matmul_rate()
    model = Bundle.load(args.bundle).generator if args.bundle else random_model(args.items)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "matmul_flop_per_second": rate,
        "rows": [measure(model, args.width, args.history, args.repeats, rate)],
    }
    print(f"{result['threads']} threads, matrix products at {rate / 1e9:.0f} GFLOP/s")
    show(result["rows"][0])
    if not args.no_growth:
        model = random_model(12_000, max_history=200)
        cases = [(model, WIDTH, 50), (model, WIDTH, 200), (model, 10, 10), (model, 20, 10)]
        cases += [(random_model(items), WIDTH, 10) for items in (1_000, 100_000)]
        for case in cases:
            result["rows"].append(measure(*case, max(3, args.repeats // 2), rate, peers=False))
            show(result["rows"][-1])
    result["about"] = provenance("medians of rounds taken in turns", {"weights": 0}, time.perf_counter() - clock)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
