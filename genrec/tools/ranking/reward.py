"""The ranking part of a reward: one number for a list of predicted rates, as a plain function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genrec.errors import GenrecError


def ranking_reward(rates: np.ndarray, names: Sequence[str], weights: Mapping[str, float] | None = None) -> np.ndarray:
    """The weighted mean of predicted rates [..., T], float32 [...], between 0 and 1 for rates that are.

    names: of the T labels; weights: of those that count, in any scale and not negative; None takes the first label
    alone. NaN where an item has no rate. Raises GenrecError for an unknown label or weights that give no sum.
    Example: ranking_reward(rates, ("like", "follow"), {"like": 1, "follow": 3})
    """
    weights = {names[0]: 1.0} if weights is None else weights
    if unknown := [name for name in weights if name not in names]:
        raise GenrecError(f"unknown label {unknown[0]!r}; there are: {', '.join(names)}")
    each = np.array([weights.get(name, 0.0) for name in names], np.float64)
    if (each < 0).any() or not 0 < each.sum() < np.inf:
        raise GenrecError(f"the weights of a reward must be 0 or more, and one above 0, not {dict(weights)}")
    return np.asarray(np.asarray(rates) @ (each / each.sum()), np.float32)
