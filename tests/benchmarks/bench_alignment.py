"""What alignment costs: rollouts/s, optimiser steps/s and the share of time in rollouts, against the same loop with
transformers' `generate` for the rollouts.

    python tests/benchmarks/bench_alignment.py [--items 12000] [--history 10] [--out alignment.json]

Random weights over 12,000 items, the size of Amazon Beauty; the default group, requests and updates of `genrec align`.
Both loops share rewards, losses and optimiser; the other one's rollouts are `generate`'s beams of the same width (its
sampling gives doubles, ours does not), with its key-value cache and `prefix_allowed_tokens_fn` (see hf_adapter.py).
Times are medians of batches taken in turns. On a GPU, where one is found, the same script runs unchanged but for the
other loop, whose adapter is for CPUs; `share_of_matmul_limit` is the part of the time that the loss's matrix products
alone would take at the card's measured rate (the anchor is counted too; rewards run on the CPU and are timed apart).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from bench_beam_search import matmul_rate, operations, random_model, wait
from bench_training import sequences
from hf_adapter import GenerateAdapter

from genrec.alignment.judges import Bench, Judge
from genrec.alignment.rewards import ScenarioWeights
from genrec.evaluation.report import provenance
from genrec.generator.batches import TrainingData
from training.align_config import AlignConfig
from training.policy import Aligner, Positions, Rollout


def world(items: int, history: int, config: AlignConfig) -> Aligner:
    """An alignment of random weights to home. No tool is asked: the time of rewards is without the ranker's."""
    model = random_model(items)
    train = sequences(items, 2048, history + 1)
    text = model.item_text.numpy()
    judge = Judge({}, text[:, :64] / np.linalg.norm(text[:, :64], axis=1, keepdims=True), np.zeros(items, np.float32))
    bench = Bench.of([judge], model.trie, text, lambda _: {}, train)  # type: ignore[arg-type]
    data = TrainingData(train, (), {"home": 0}, None, model.config.text_dim)
    positions = Positions(data, np.zeros(len(train), np.int64), None)
    return Aligner(model, positions, bench, ScenarioWeights.load(), config)


def one_batch(run: Aligner, adapter: GenerateAdapter | None) -> dict[str, float]:
    """Seconds of one batch: its rollouts, its rewards, its optimiser steps. adapter: whose beams are the rollouts."""
    wait(run.device)
    rollout: Rollout = run.roll_out()
    wait(run.device)
    seconds = dict(rollout.seconds)
    if adapter is not None:
        start = time.perf_counter()
        adapter.search(rollout.history.rows, run.config.group)
        seconds["rollout"] = time.perf_counter() - start
    start, old = time.perf_counter(), None
    for _ in range(run.config.updates):
        old, _ = run.update(rollout, old)
    wait(run.device)
    return seconds | {"update": time.perf_counter() - start}


def figures(batches: list[dict[str, float]], config: AlignConfig) -> dict[str, float]:
    middle = {name: statistics.median(b[name] for b in batches) for name in ("rollout", "reward", "update")}
    whole = sum(middle.values())
    return {
        "rollouts_per_second": config.requests * config.group / middle["rollout"],
        "steps_per_second": config.updates / middle["update"],
        "steps_per_second_of_the_loop": config.updates / whole,
        "share_of_rollouts": middle["rollout"] / whole,
        "share_of_rewards": middle["reward"] / whole,
        "seconds_per_batch": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--requests", type=int, default=AlignConfig.requests)
    parser.add_argument("--group", type=int, default=AlignConfig.group)
    parser.add_argument("--out", type=Path, default=Path("alignment.json"))
    args = parser.parse_args()
    clock = time.perf_counter()
    config = AlignConfig(Path("none"), Path("none"), requests=args.requests, group=args.group)
    run = world(args.items, args.history, config)
    cpu = run.device.type == "cpu"
    loops: dict[str, GenerateAdapter | None] = {"genrec": None}
    if cpu:
        loops["generate"] = GenerateAdapter(run.model).eval()
    for adapter in loops.values():
        one_batch(run, adapter)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for _ in range(args.batches):
        for name, adapter in loops.items():
            found[name].append(one_batch(run, adapter))
    rate, rollout = matmul_rate(run.device), run.roll_out()
    old = run.update(rollout, None)[0]
    flop = operations(lambda: run.update(rollout, old))
    result: dict[str, Any] = {
        "items": args.items,
        "history": args.history,
        "requests": config.requests,
        "group": config.group,
        "updates": config.updates,
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "matmul_flop_per_second": rate,
        "flop_per_step": flop,
    } | {name: figures(batches, config) for name, batches in found.items()}
    result["genrec"]["share_of_matmul_limit"] = flop * result["genrec"]["steps_per_second"] / rate
    if cpu:
        ours, theirs = result["genrec"], result["generate"]
        result["ratio_rollouts"] = ours["rollouts_per_second"] / theirs["rollouts_per_second"]
        result["ratio_loop"] = theirs["seconds_per_batch"] / ours["seconds_per_batch"]
    for name in loops:
        shown = ", ".join(f"{k.replace('_', ' ')} {v:,.3g}" for k, v in result[name].items())
        print(f"{name}: {shown}")
    result["about"] = provenance("medians of batches taken in turns", {"weights": 0}, time.perf_counter() - clock)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
