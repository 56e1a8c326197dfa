"""What EBR costs: a training step beside SASRec's, and retrieval beside faiss, as the catalogue grows.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_ebr.py [--out ebr.json] [--sizes 10000 100000 1000000 10000000]

Training: steps of the same rows, lengths and negatives on random sequences, in turns; processor time, so that it holds
on a busy machine with one thread. Retrieval: 500 of N synthetic items (a mixture of Gaussians, d = 64) for one batch of
256 users: EBR's one index with offsets, 20 clusters, M_k from an intent that halves from cluster to cluster; against
IndexFlatIP (exact) and IndexIVFFlat with one vector. By probability, the default, each cluster is asked for 500. The
approximate ones search as many lists as bring 95 % of what their own exact search finds, which are different items:
EBR's list is of 20 vectors, the others' of one. Memory: what the index holds by its arrays (mib), and how much the
process grew while it was made (resident). A tool keeps its item vectors beside the index. Sizes that are done are kept
in <out>.work: a killed run goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from genrec.evaluation.report import provenance
from genrec.io import read_json, write_json
from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.config import EBRConfig
from genrec.tools.ebr.index import ClusterIndex
from genrec.tools.ebr.loss import Objective
from genrec.tools.ebr.merge import apportion
from genrec.tools.ebr.model import Encoder
from genrec.tools.ebr.train import loss_of

WIDTH, USERS, WANTED, CLUSTERS = 64, 256, 500, 20
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ENOUGH = 0.95


def resident() -> float:
    """MiB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def training(items: int = 12_000, length: int = 10, rounds: int = 12) -> dict[str, float]:
    """Milliseconds of processor time per step, median of rounds taken in turns."""
    rng = np.random.default_rng(0)
    of = np.sort(rng.integers(0, 10, items)).astype(np.int32)
    clusters = Clusters(of, tuple(map(str, range(10))))
    content = rng.normal(size=(items, 128)).astype(np.float16)
    one: dict[str, Any] = {"single": True, "prompt": "none", "negatives_from": "catalogue"}
    arms = {"SASRec, 1 negative": one | {"loss": "bce"}, "SASRec, softmax": one, "EBR, no prompt": {"prompt": "none"}}
    arms |= {"EBR, prefix": {"prompt": "prefix"}, "EBR, Hadamard": {}}
    steps = {}
    for name, changes in arms.items():
        config = EBRConfig(**changes)
        torch.manual_seed(0)
        encoder = Encoder(config, content, 10).train()
        objective = Objective(encoder, clusters, np.ones(items))
        optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
        inputs, targets = (torch.from_numpy(rng.integers(0, items, (config.rows, length))) for _ in range(2))
        prompts = torch.from_numpy(rng.integers(0, 11, config.rows))
        if config.prompt == "none":
            prompts[:] = 10
        else:  # users stay with a cluster: a good third of a row's positions are of its prompt
            stay = torch.rand(targets.shape) < 0.4
            mine = torch.stack([torch.from_numpy(rng.choice(clusters.members(int(p) % 10), length)) for p in prompts])
            targets = torch.where(stay, mine, targets)
        batch = (inputs, targets, torch.ones(targets.shape), prompts)

        def step(e: Encoder = encoder, o: Objective = objective, a: Any = optimizer, b: Any = batch) -> None:
            loss = loss_of(e, o, b)
            a.zero_grad()
            loss.backward()
            a.step()

        steps[name] = step
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, job in steps.items():
            times[name].append(1000 * cpu(job))
    found = {name: round(statistics.median(t), 2) for name, t in times.items()}
    base = found["SASRec, softmax"]
    return found | {f"{n} / SASRec, softmax": round(t / base, 3) for n, t in list(found.items())}


def world(items: int, seed: int = 0) -> tuple[np.ndarray, Clusters, np.ndarray]:
    """Item vectors [N, d] around 1,000 centres of CLUSTERS clusters; users' vectors per cluster [B, K, d]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1000, WIDTH)).astype(np.float32)
    group = np.sort(rng.integers(0, 1000, items))
    vectors = np.empty((items, WIDTH), np.float32)
    for start in range(0, items, 500_000):
        part = slice(start, start + 500_000)
        vectors[part] = centres[group[part]]
        vectors[part] += 0.5 * rng.normal(size=vectors[part].shape).astype(np.float32)
    of = (group * CLUSTERS // 1000).astype(np.int32)
    users = (
        centres[rng.integers(0, 1000, (USERS, 1))] * 0.5
        + centres[np.stack([rng.integers(k * 50, (k + 1) * 50, USERS) for k in range(CLUSTERS)], axis=1)]
    )
    return vectors, Clusters(of, tuple(map(str, range(CLUSTERS)))), users.astype(np.float32)


def overlap(found: np.ndarray, exact: np.ndarray) -> float:
    """The mean share of a row's exact results that were found."""
    shares = [np.isin(b[b >= 0], a).mean() for a, b in zip(found, exact, strict=True)]
    return float(np.mean(shares))


def retrieval(items: int, rounds: int = 3) -> dict[str, Any]:
    """Processor seconds per batch, recall of the own exact search, MiB of the index, and seconds to build it."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors, clusters, users = world(items)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(CLUSTERS), (USERS, 1)), axis=1)
    shares = 0.5 ** order.astype(float)
    counts = apportion(WANTED, shares, clusters.sizes)
    one = np.ascontiguousarray(users[np.arange(USERS), counts.argmax(axis=1)])
    row: dict[str, Any] = {"items": items}
    raw = items * WIDTH * 4 / 2**20

    def timed(job: Callable[[], Any]) -> tuple[float, Any]:
        spent = []
        for _ in range(rounds):
            start = time.process_time()
            result = job()
            spent.append(time.process_time() - start)
        return min(spent), result

    before = resident()
    exact_index = ClusterIndex(vectors, clusters, exact=True)
    grown = resident() - before
    seconds, (exact, _) = timed(partial(exact_index.search, users, counts))
    row["EBR, exact"] = {"seconds": seconds, "recall": 1.0, "mib": raw, "resident": grown}
    likeliest = np.minimum(WANTED, clusters.sizes)[None].repeat(USERS, axis=0)
    row["EBR, exact, by probability"] = {"seconds": timed(partial(exact_index.search, users, likeliest))[0]}
    row["EBR, exact, by probability"] |= {"recall": 1.0, "mib": raw, "resident": grown}
    del exact_index
    gc.collect()
    before, start = resident(), time.process_time()
    index = ClusterIndex(vectors, clusters, exact=False)
    built, grown = time.process_time() - start, resident() - before
    for probes in PROBES:
        index.probes = probes
        seconds, (found, _) = timed(partial(index.search, users, counts))
        if (recall := overlap(found, exact)) >= ENOUGH:
            break
    row["EBR, faiss"] = {"seconds": seconds, "recall": recall, "probes": probes, "built": built, "resident": grown}
    likely = {"seconds": timed(partial(index.search, users, likeliest))[0], "recall": recall, "probes": probes}
    row["EBR, faiss, by probability"] = likely | {"built": built, "resident": grown}
    own = sum(c.nbytes for c in index.centroids) + sum(s.nbytes for s in index.sampled)
    row["EBR, faiss"]["mib"] = raw + (items * 8 + own) / 2**20
    row["EBR, faiss, by probability"]["mib"] = row["EBR, faiss"]["mib"]
    del index
    gc.collect()
    lists, before = round(2 * items**0.5), resident()
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    grown = resident() - before
    seconds, (_, exact) = timed(partial(flat.search, one, WANTED))
    row["IndexFlat"] = {"seconds": seconds, "recall": 1.0, "mib": raw, "resident": grown}
    del flat
    gc.collect()
    before, start = resident(), time.process_time()
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(WIDTH), WIDTH, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.max_points_per_centroid = 64
    ivf.train(vectors)
    ivf.add(vectors)
    built, grown = time.process_time() - start, resident() - before
    for probes in PROBES:
        ivf.nprobe = probes
        seconds, (_, found) = timed(partial(ivf.search, one, WANTED))
        if (recall := overlap(found, exact)) >= ENOUGH:
            break
    row["IndexIVFFlat"] = {"seconds": seconds, "recall": recall, "probes": probes, "built": built, "resident": grown}
    row["IndexIVFFlat"]["mib"] = raw + items * 8 / 2**20 + lists * WIDTH * 4 / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--out", type=Path, default=Path("ebr.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock, work = time.perf_counter(), args.out.with_suffix(".work")
    steps = work / "training.json"
    if not steps.is_file():
        write_json(steps, training())
    print(json.dumps(read_json(steps), indent=1))
    rows = []
    for items in args.sizes:
        path = work / f"retrieval-{items}.json"
        if not path.is_file():
            write_json(path, retrieval(items))
        rows.append(read_json(path))
        print(f"\n{items:,} items, {USERS} users, {WANTED} each")
        for name, found in rows[-1].items():
            if isinstance(found, dict):
                spent, memory = 1000 * found["seconds"] / USERS, f"{found['mib']:.0f} MiB (+{found['resident']:.0f})"
                said = f"  {name:28} {spent:8.3f} ms/user  recall {found['recall']:.3f}  {memory}"
                built = f"  probes {found['probes']}  built {found['built']:.0f} s" if "probes" in found else ""
                print(said + built, flush=True)
    about = provenance("processor time, one thread", {"vectors": 0}, time.perf_counter() - clock)
    write_json(args.out, {"training": read_json(steps), "retrieval": rows, "about": about})


if __name__ == "__main__":
    main()
