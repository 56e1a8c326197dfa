"""How good are the semantic IDs: the diagnostics that OxygenREC and OneRec report, as plain numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from genrec.tokenizer.semantic_ids import SemanticIDs


@dataclass(frozen=True)
class TokenizerReport:
    """utilisation: share of codes in use, per level. entropy: of the code distribution in nats, per level.
    collisions: items whose whole ID another item has (0 by construction). prefix_sharing: share of items
    that share all but the last code with another item, the collisions that the last level resolved.
    reconstruction: mean squared distance from an embedding to its ID's codewords, over the embeddings'
    variance (0 exact, 1 nothing learned). purity: per level, share of items whose category is the most
    common one among the items with the same prefix (None without categories); purity_floor: the share of the
    most common category in the catalogue."""

    items: int
    utilisation: tuple[float, ...]
    entropy: tuple[float, ...]
    collisions: int
    prefix_sharing: float
    largest_prefix: int
    reconstruction: float
    purity: tuple[float, ...] | None
    purity_floor: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(ids: SemanticIDs, embeddings: np.ndarray, categories: list[list[str]]) -> TokenizerReport:
    """Diagnostics of `ids` for embeddings [N, D] and category paths (the narrowest name counts)."""
    n, levels = ids.codes.shape
    k = ids.codebooks.shape[1]
    utilisation, entropy = [], []
    for level in range(levels):
        share = np.bincount(ids.codes[:, level], minlength=k) / n
        utilisation.append(float((share > 0).mean()))
        entropy.append(float(-(share[share > 0] * np.log(share[share > 0])).sum()))
    prefixes = Counter(map(tuple, ids.codes[:, :-1].tolist()))
    whole = Counter(map(tuple, ids.codes.tolist()))
    spread = float(((embeddings - embeddings.mean(0)) ** 2).sum(1).mean())
    error = float(((embeddings - ids.reconstruct()) ** 2).sum(1).mean())
    names = [path[-1] if path else "" for path in categories]
    purity = floor = None
    if any(names):
        named = [row for row, name in enumerate(names) if name]
        purity = tuple(_purity(ids.codes[named, : level + 1], [names[r] for r in named]) for level in range(levels))
        floor = Counter(names[r] for r in named).most_common(1)[0][1] / len(named)
    return TokenizerReport(
        items=n,
        utilisation=tuple(utilisation),
        entropy=tuple(entropy),
        collisions=sum(c for c in whole.values() if c > 1),
        prefix_sharing=sum(c for c in prefixes.values() if c > 1) / n,
        largest_prefix=max(prefixes.values()),
        reconstruction=error / spread if spread else 0.0,
        purity=purity,
        purity_floor=floor,
    )


def _purity(prefixes: np.ndarray, names: list[str]) -> float:
    groups: dict[tuple[int, ...], Counter[str]] = {}
    for prefix, name in zip(map(tuple, prefixes.tolist()), names, strict=True):
        groups.setdefault(prefix, Counter())[name] += 1
    return sum(c.most_common(1)[0][1] for c in groups.values()) / len(names)
