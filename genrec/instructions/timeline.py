"""Instructions over a user's time: what a near-line thinker had written when each request came.

A training position or a test request may only follow an instruction that was written before it. A timeline holds, per
user, texts with the number of events that the writer had seen; a request with a history of n events gets the newest
text written from at most n events, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.errors import GenrecError
from genrec.io import atomic

_COLUMNS = {"user": pa.string(), "events": pa.int64(), "look_for": pa.string(), "model": pa.string()}


@dataclass(frozen=True)
class Timeline:
    """K instructions. users: identifiers [K]; events: int64 [K], how many of the user's events each was written from;
    texts: look_for [K]; models: who wrote it [K]."""

    users: tuple[str, ...]
    events: np.ndarray
    texts: tuple[str, ...]
    models: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def _by_user(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per user: events known, ascending, and the index of each."""
        order = np.lexsort((self.events, np.array(self.users, dtype=object)))
        found: dict[str, list[int]] = {}
        for i in order.tolist():
            found.setdefault(self.users[i], []).append(i)
        return {user: (self.events[np.array(at)], np.array(at)) for user, at in found.items()}

    def find(self, user: str, lengths: np.ndarray) -> np.ndarray:
        """The index of the instruction that requests with histories of these lengths get, int64; -1 for none."""
        events, at = self._by_user.get(user, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
        place = np.searchsorted(events, lengths, side="right") - 1
        return np.where(place >= 0, at[np.maximum(place, 0)] if len(at) else -1, -1)

    def shuffled(self, seed: int = 0) -> Timeline:
        """The control that must fail: every user gets the texts of another one, drawn once for all of their time.

        Users are dealt in a ring in random order; a user's k-th text becomes the neighbour's k-th (its last one where
        the neighbour has fewer), so how many there are and when they were written stays as it was. With one user
        nothing can be shuffled: GenrecError.
        """
        names = sorted(self._by_user)
        if len(names) < 2:
            raise GenrecError("instructions of one user cannot be shuffled between users")
        ring = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        source = np.zeros(len(self), np.int64)
        for user, other in zip(ring, ring[1:] + ring[:1], strict=True):
            mine, theirs = self._by_user[user][1], self._by_user[other][1]
            source[mine] = theirs[np.minimum(np.arange(len(mine)), len(theirs) - 1)]
        taken = source.tolist()
        return replace(self, texts=tuple(self.texts[i] for i in taken), models=tuple(self.models[i] for i in taken))

    def save(self, path: Path) -> None:
        """One Parquet file, whole or not at all."""
        values = (list(self.users), self.events, list(self.texts), list(self.models))
        columns = [pa.array(v, t) for v, t in zip(values, _COLUMNS.values(), strict=True)]
        with atomic(path) as temporary:
            pq.write_table(pa.table(columns, names=list(_COLUMNS)), temporary)

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Raises GenrecError where the file is missing or is no timeline."""
        if not path.is_file():
            raise GenrecError(f"{path}: no such file; write it with python -m training.instructions")
        try:
            table = pq.read_table(path, columns=list(_COLUMNS))
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise GenrecError(
                f"{path} holds no instructions over time ({' '.join(str(error).split())[:160]})"
            ) from None
        users, events, texts, models = (table[name].to_pylist() for name in _COLUMNS)
        return cls(tuple(users), np.array(events, np.int64), tuple(texts), tuple(models))
