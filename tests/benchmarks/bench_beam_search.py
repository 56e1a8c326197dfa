"""Beam search users/s: genrec's against transformers' `generate`, same weights, beams and machine, in one run.

    python tests/benchmarks/bench_beam_search.py [--bundle bundle] [--users 64] [--width 20]

Without a bundle: random weights over 12,000 items, the size of Amazon Beauty. Checks that both find the same
items with the same log-probabilities, then prints a table and one JSON line. The limit is the time that the
matrix products of the search would take at this machine's measured rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from hf_adapter import GenerateAdapter

from genrec.bundle import Bundle
from genrec.contracts import UserContext
from genrec.generator.config import GeneratorConfig
from genrec.generator.model import PREFIX, GeneratorModel
from genrec.generator.search import beam_search, make_history, make_request
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Measured fp32 matrix-product rate of this process, FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(seconds(lambda: a @ b) for _ in range(repeats))
    return 2 * size**3 / best


def seconds(job: Callable[[], object]) -> float:
    clock = time.perf_counter()
    job()
    return time.perf_counter() - clock


def operations(model: GeneratorModel, length: int, width: int) -> float:
    """FLOP of one user's search: the products with weights, attention over the history, and output vectors."""
    c, trie = model.config, model.trie
    d, ff = c.d_model, c.d_ff
    encoder = c.encoder_layers * length * (4 * d * d + 2 * d * ff + 2 * length * d)
    token = c.decoder_layers * (6 * d * d + 2 * d * ff + 2 * length * d)
    cross = c.decoder_layers * length * 2 * d * d
    beams = [PREFIX] + [min(width, trie.size(level)) for level in range(1, c.levels)]
    outputs = sum(d * w * float(trie.child_count[i].float().mean()) for i, w in enumerate([1, *beams[1:]]))
    text = length * c.text_dim * d
    return 2 * (encoder + cross + token * sum(beams) + outputs + text)


def random_model(items: int, seed: int = 0) -> GeneratorModel:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(items, 384)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ids = SemanticIDs.fit(x, TokenizerConfig(codes=128, iterations=4))
    torch.manual_seed(seed)
    model = GeneratorModel(GeneratorConfig(items=items))
    return model.set_catalog(ids.trie, torch.from_numpy(x)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--items", type=int, default=12_000, help="catalogue size of the random model")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers' generate out (for scaling runs)")
    args = parser.parse_args()
    model = Bundle.load(args.bundle).generator if args.bundle else random_model(args.items)
    items = model.trie.items
    rng = np.random.default_rng(0)
    contexts = [UserContext(history=tuple(rng.integers(0, items, args.history).tolist())) for _ in range(args.users)]
    history, request = make_history(contexts, model.config.max_history), make_request(model, contexts)
    result = {
        "items": items,
        "users": args.users,
        "width": args.width,
        "history": args.history,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
    }

    def ours() -> object:
        return beam_search(model, history, request, args.width)

    if not args.no_peer:
        adapter = GenerateAdapter(model).eval()
        mine = beam_search(model, history, request, args.width)
        theirs, scores = adapter.search(history.rows, args.width)
        same = float((mine.items == theirs).float().mean())
        worst = float((mine.scores - scores).abs().max())
        sets = all(set(a) == set(b) for a, b in zip(mine.items.tolist(), theirs.tolist(), strict=True))
        result |= {"same_positions": same, "same_sets": sets, "largest_score_difference": worst}
        pairs = [
            (seconds(lambda: adapter.search(history.rows, args.width)), seconds(ours)) for _ in range(args.repeats)
        ]
        peer, own = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        result |= {"transformers_users_per_second": args.users / peer, "ratio": peer / own}
    else:
        ours()
        own = statistics.median(seconds(ours) for _ in range(args.repeats))
    flop, rate = operations(model, args.history, args.width), matmul_rate()
    result |= {
        "genrec_users_per_second": args.users / own,
        "flop_per_user": flop,
        "matmul_flop_per_second": rate,
        "share_of_matmul_limit": flop * args.users / own / rate,
    }
    for name, value in result.items():
        print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
