"""The cache as the trainer and the server read and write it: batches in, tensors out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.tools.marm.cache import CacheConfig, StateCache, user_key
from genrec.tools.ranking.models import RankerConfig
from genrec.tools.ranking.task import Batch


def cache_for(
    model: RankerConfig, users: int, name: str = "", events: int | None = None, dtype: str = "float16"
) -> CacheConfig:
    """The sizes of a cache for so many users of a ranker. name: the model's, see CacheConfig; events: slots per user,
    by default as many as the ranker reads."""
    return CacheConfig(users, events or model.n, model.layers - 1, model.d, name, dtype)


class CachedStates:
    """Implements genrec.tools.ranking.train.Memory. users: identifiers; the batch's user numbers index them."""

    def __init__(self, cache: StateCache, users: list[str]) -> None:
        self.cache = cache
        self.keys = np.array([*map(user_key, users), 0], np.int64)  # 0: a stranger, who has nothing

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States float32 [B, n, L - 1, d] and whether each was there, bool [B, n]."""
        states, present = self.cache.read(
            self.keys[batch.user.numpy()], batch.events.numpy(), batch.history.numpy().astype(np.int32)
        )
        return torch.from_numpy(states.astype(np.float32)), torch.from_numpy(present)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Keeps the states [B, L - 1, d] of the first candidate of each request, which was really shown."""
        known = batch.user.numpy() < len(self.keys) - 1
        self.cache.write(
            self.keys[batch.user.numpy()[known]],
            batch.place.numpy()[known],
            batch.item[:, 0].numpy().astype(np.int32)[known],
            states.numpy()[known],
        )

    def clear(self) -> None:
        self.cache.clear()

    def snapshot(self) -> Any:
        return self.cache.snapshot()

    def restore(self, kept: Any) -> None:
        self.cache.restore(kept)
