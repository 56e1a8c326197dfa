"""Training cost of the generator: interactions/s, time per step and memory, against the matrix-product limit.

    python tests/benchmarks/bench_training.py [--items 12000] [--steps 10] [--out FILE]

The alternative that a user would have is one sample per position (history in, next item out), as TIGER-style
scripts train: the same model is timed that way in the same run, with the same targets per step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from bench_beam_search import matmul_rate, random_model, seconds

from genrec.data.dataset import Sequences
from genrec.evaluation.report import provenance
from genrec.generator.batches import Batch, TrainingData
from genrec.generator.model import PREFIX, GeneratorModel, History, Request
from training.generator import Run, TrainingConfig, loss_of


def sequences(items: int, users: int, length: int) -> Sequences:
    """Random sequences of equal length: cost does not depend on what is in them."""
    n = users * length
    return Sequences(
        [str(u) for u in range(users)],
        np.arange(users + 1, dtype=np.int64) * length,
        np.random.default_rng(0).integers(0, items, n).astype(np.int32),
        np.arange(n, dtype=np.float64),
        np.ones(n, np.float32),
        np.full(n, np.nan, np.float32),
    )


def operations(model: GeneratorModel, positions: int, length: int) -> float:
    """FLOP of one training step: forward products with weights, attention and output vectors, times three."""
    c, trie = model.config, model.trie
    d, ff = c.d_model, c.d_ff
    encoder = positions * c.encoder_layers * (4 * d * d + 2 * d * ff + 2 * length * d)
    tokens = (c.decoder_layers - 1) * (PREFIX + c.levels - 1) + c.levels
    decoder = positions * tokens * (6 * d * d + 2 * d * ff + 2 * length * d)
    outputs = sum(trie.size(level + 1) * c.text_dim * d for level in range(c.levels))
    outputs += (
        positions
        * d
        * sum(
            trie.size(level + 1) if trie.size(level + 1) <= 4096 else trie.children[level].shape[1]
            for level in range(c.levels)
        )
    )
    return 3 * 2 * (encoder + decoder + outputs + positions * c.text_dim * d)


def one_sample_per_position(batch: Batch) -> Batch:
    """The same targets, each with its own copy of the history."""
    rows, length = batch.history.rows, batch.history.rows.shape[1]
    users, at = torch.nonzero(batch.targets >= 0, as_tuple=True)
    keep = torch.arange(length) <= at[:, None]
    last = torch.arange(length) == at[:, None]

    def spread(x: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.where(keep, x[users], torch.tensor(fill, dtype=x.dtype))

    r = batch.request
    return Batch(
        History(spread(rows, -1), spread(batch.history.gaps, 0), spread(batch.history.weights, 1)),
        torch.where(last, batch.targets[users], -1),
        batch.weights[users] * last,
        Request(*(x[users] for x in (r.scenario, r.trigger, r.instruction, r.instructed, r.newest))),
        batch.chosen[users],
    )


def loss_at_last(model: GeneratorModel, batch: Batch) -> torch.Tensor:
    """The loss where only one position per row has a target: the decoder runs on that position alone."""
    at = (batch.targets >= 0).float().argmax(1, keepdim=True)
    distance = at[:, :, None] - torch.arange(batch.history.rows.shape[1])
    r = batch.request
    here = Request(
        *(x.gather(1, at) for x in (r.scenario, r.trigger)),
        r.instruction.gather(1, at[..., None].expand(-1, -1, r.instruction.shape[-1])),
        *(x.gather(1, at) for x in (r.instructed, r.newest)),
    )
    targets = batch.targets.gather(1, at)
    hidden = model.decode(batch.history, here, targets, distance)
    return -model.log_likelihood(hidden[:, 0], targets[:, 0]).sum(1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--length", type=int, default=8, help="events per user (Beauty has about 7 for training)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("training.json"))
    args = parser.parse_args()
    clock = time.perf_counter()
    model = random_model(args.items)
    data = TrainingData(sequences(args.items, 4096, args.length + 1), (), {"home": 0}, None, model.config.text_dim)
    run = Run(model, data, TrainingConfig(epochs=1, positions=args.positions))
    count = run.train_step()[1]
    step = statistics.median(seconds(run.train_step) for _ in range(args.steps))
    batch = data.batch(data.epoch(model.config.max_history, args.positions, 0, 0)[0], 0)
    single = one_sample_per_position(batch)

    def every_position() -> None:
        loss_of(model, batch)[0].backward()

    def by_sample() -> None:
        loss_at_last(model, single).backward()

    model.eval()
    same = abs(float(loss_of(model, batch)[0].detach() - loss_at_last(model, single).detach()))
    model.train()
    pairs = [(seconds(every_position), seconds(by_sample)) for _ in range(args.steps)]
    ours, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    rate, flop = matmul_rate(), operations(model, count, args.length)
    result = {
        "items": args.items,
        "positions": count,
        "length": args.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds_per_step": step,
        "interactions_per_second": count / step,
        "one_sample_per_position_ratio": theirs / ours,
        "loss_difference": same,
        "flop_per_step": flop,
        "matmul_flop_per_second": rate,
        "share_of_matmul_limit": flop / step / rate,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    for name, value in result.items():
        print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    result["about"] = provenance("medians of steps taken in turns", {"weights": 0}, time.perf_counter() - clock)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
