"""Late fusion: every block of scores is standardised per request, multiplied by its weight, and summed.

Weights are chosen on validation requests by NDCG@10 (a coordinate search; the scores are computed once, by the caller).
A block may score only some items, as a generator's beam does: NaN or -inf stands for "not scored" and is filled with
the row's smallest score minus `MARGIN`. For log-probabilities that is one nat: an item that the beam dropped is taken
to be e times less likely than the worst one it kept. A row without any score says nothing and becomes zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.errors import GenrecError
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import target_ranks, tie_numbers

MARGIN = 1.0
FACTORS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)
SWEEPS = 6
CONTENDERS = 200
BAGS, BAG = 12, 2000
LEAST_GAIN = 1e-4


def standardise(scores: np.ndarray) -> np.ndarray:
    """float32 [B, N]: each row filled in, less its mean, over its standard deviation; a constant row becomes zeros."""
    scores = np.array(scores, dtype=np.float32)
    missing = ~np.isfinite(scores)
    if missing.any():
        if np.isposinf(scores).any():
            raise ValueError("a score of +inf has no place in a sum")
        lowest = np.where(missing, np.inf, scores).min(axis=1, initial=np.inf, keepdims=True)
        lowest = np.where(np.isfinite(lowest), lowest - np.float32(MARGIN), np.float32(0))
        scores = np.where(missing, lowest, scores)
    flat = scores.max(axis=1, keepdims=True, initial=-np.inf) == scores.min(axis=1, keepdims=True, initial=np.inf)
    scores -= scores.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    deviation = np.sqrt(np.square(scores).mean(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return np.where(flat, np.float32(0), scores / np.where(flat, np.float32(1), deviation))


def fuse(blocks: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted sum of the standardised blocks, float32 [B, N]. Blocks without a weight are left out.

    Raises GenrecError for a weight that names no block.
    """
    unknown = [name for name, w in weights.items() if w and name not in blocks]
    if unknown:
        raise GenrecError(f"no scores for the fusion weight {unknown[0]!r}: the parts are {', '.join(blocks)}")
    used = {name: w for name, w in weights.items() if w}
    total = np.zeros(next(iter(blocks.values())).shape, dtype=np.float32)
    for name, weight in used.items():
        total += np.float32(weight) * standardise(blocks[name])
    return total


@dataclass(frozen=True)
class Contenders:
    """The items that a chunk of B requests is judged by: at most M of them per request, the wanted one among them.

    ready: standardised scores per block, float32 [B, M]; there: bool [B, M], False where padded; place: int64 [B], the
    column of the wanted item.
    """

    ready: dict[str, np.ndarray]
    there: np.ndarray
    place: np.ndarray


def contenders(
    blocks: Mapping[str, np.ndarray], targets: np.ndarray, seen: tuple[np.ndarray, np.ndarray]
) -> Contenders:
    """The CONTENDERS best unseen items of every block, and the wanted items.

    blocks: raw scores [B, N] per name; targets: int [B]; seen: as `protocol.seen_index(contexts)` gives. Exact for a
    catalogue of CONTENDERS items; in larger ones it leaves out items that no block puts near its top. Requests that
    want a seen item are left out: every weight misses them.
    """
    items = next(iter(blocks.values())).shape[1]
    mask = np.zeros((len(targets), items), dtype=bool)
    depth = min(CONTENDERS, items)
    for block in blocks.values():
        filled = np.where(np.isfinite(block), block, -np.inf)
        filled[seen] = -np.inf
        np.put_along_axis(mask, np.argpartition(-filled, depth - 1, axis=1)[:, :depth], True, axis=1)
    mask[seen] = False
    hopeless = np.zeros(len(targets), bool)
    hopeless[seen[0][seen[1] == targets[seen[0]]]] = True
    mask[np.arange(len(targets)), targets] = True
    rows = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max(initial=0)]
    kept = rows[~hopeless]
    ready = {n: np.take_along_axis(standardise(block)[~hopeless], kept, axis=1) for n, block in blocks.items()}
    there = np.take_along_axis(mask[~hopeless], kept, axis=1)
    return Contenders(ready, there, np.nonzero(kept == targets[~hopeless][:, None])[1])


def fit_weights(pieces: Sequence[Contenders], k: int = 10, seed: int = 0) -> dict[str, float]:
    """The weights of the blocks that rank validation requests best by mean NDCG@k (`bagged`); they add up to 1. The
    search starts from equal weights, which stay where there is no request. Raises ValueError without a piece."""
    if not pieces:
        raise ValueError("there is nothing to choose weights on")
    names = list(pieces[0].ready)
    most = max(p.there.shape[1] for p in pieces)

    def whole(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(p, ((0, 0), (0, most - p.shape[1]))) for p in parts])

    ready = {name: whole([p.ready[name] for p in pieces]) for name in names}
    there, place = whole([p.there for p in pieces]), np.concatenate([p.place for p in pieces])
    if not len(place):
        return {name: round(1 / len(names), 4) for name in names}
    ties = tie_numbers(len(place), seed)

    def choose(at: np.ndarray) -> dict[str, float]:
        requests, columns = np.nonzero(~there[at])

        def quality(scores: np.ndarray) -> float:
            return float(ndcg(target_ranks(scores, place[at], (requests, columns), ties[at]), k).mean())

        return search_weights({name: block[at] for name, block in ready.items()}, quality, dict.fromkeys(ready, 1.0))

    return bagged(len(place), choose, seed)


def bagged(n: int, choose: Callable[[np.ndarray], dict[str, float]], seed: int = 0) -> dict[str, float]:
    """The mean of the weights that `choose` finds on BAGS random halves (BAG requests at most) of n requests, int
    positions; each choice, and the mean, adds up to 1.

    One choice on all requests follows their noise. Cross-validated on the 943 validation requests of ML-100K, five
    tools and a generator had an NDCG@10 of .1311 by one choice and of .1360 by the mean of 12.
    """
    rng = np.random.default_rng(seed)
    found = [choose(np.sort(rng.choice(n, max(1, min(n // 2, BAG)), replace=False))) for _ in range(BAGS)]
    shares = [{name: w / sum(weights.values()) for name, w in weights.items()} for weights in found]
    return {name: round(float(np.mean([s[name] for s in shares])), 4) for name in shares[0]}


def search_weights(
    ready: Mapping[str, np.ndarray], quality: Callable[[np.ndarray], float], start: Mapping[str, float]
) -> dict[str, float]:
    """The weights of equally shaped blocks whose sum has the highest quality.

    One name after the other tries its weight times each of FACTORS and keeps the best when that gains LEAST_GAIN;
    a name that can go without loss goes. At most SWEEPS rounds. Deterministic.
    """
    weights = dict(start)
    total = np.sum([np.float32(weights[name]) * block for name, block in ready.items()], axis=0)
    best = quality(total)
    for _ in range(SWEEPS):
        before = best
        for name, block in ready.items():
            old = weights[name]
            rest = total - np.float32(old) * block
            bases = [old * f for f in FACTORS] if old else [max(weights.values()) * f for f in (0.05, 0.1, 0.25, 0.5)]
            tried = {w: quality(rest + np.float32(w) * block) for w in bases if w or _others(weights, name)}
            new = max(tried, key=lambda w: (tried[w], -w))
            if old and 0.0 in tried and tried[0.0] >= max(best, tried[new] - LEAST_GAIN):
                new = 0.0
            elif tried[new] < best + LEAST_GAIN:
                continue
            weights[name], best = new, tried[new]
            total = rest + np.float32(new) * block
        if best < before + LEAST_GAIN:
            break
    return {name: round(float(w), 5) for name, w in weights.items()}


def _others(weights: Mapping[str, float], name: str) -> bool:
    """Whether another name still has a weight: the last one must stay."""
    return any(w for other, w in weights.items() if other != name)
