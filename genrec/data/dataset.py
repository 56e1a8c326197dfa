"""A data set in memory: a catalogue and one time-ordered sequence per user, as flat arrays.

Order in time: ascending timestamp; events of one user with equal timestamps keep the order of the file
(for Amazon 2014 the file's `pos` column). This is the one stated tie rule of every split and metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from genrec.contracts import HOME, UserContext
from genrec.errors import GenrecError


@dataclass(frozen=True)
class Catalog:
    """The items. Columns: item (string, unique), title (string), category (list of strings, broad to
    narrow), and any number of further text columns (brand, year, ...) named in `fields`."""

    table: pa.Table
    fields: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def items(self) -> list[str]:
        return self.table["item"].to_pylist()

    @cached_property
    def titles(self) -> list[str]:
        return [t or i for t, i in zip(self.table["title"].to_pylist(), self.items, strict=True)]

    @cached_property
    def categories(self) -> list[list[str]]:
        return [c or [] for c in self.table["category"].to_pylist()]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.items)}

    def item(self, row: int) -> str:
        return self.items[row]

    def title(self, row: int) -> str:
        return self.titles[row]

    def row(self, item: str) -> int:
        """The row of an item identifier. Raises GenrecError when the catalogue does not hold it."""
        try:
            return self._rows[item]
        except KeyError:
            raise GenrecError(f"unknown item {item!r}: the catalogue has no such identifier") from None

    @cached_property
    def texts(self) -> list[str]:
        """One line per item for embedding: title, the further fields, the category path."""
        columns = {f: self.table[f].to_pylist() for f in self.fields}
        out = []
        for row, title in enumerate(self.titles):
            parts = [title, *(str(columns[f][row]) for f in self.fields if columns[f][row])]
            parts += [", ".join(self.categories[row])] if self.categories[row] else []
            out.append(". ".join(p.strip() for p in parts if p and p.strip()))
        return out


@dataclass(frozen=True)
class Sequences:
    """Users' events as flat arrays: user u's events are positions offsets[u]:offsets[u+1], oldest first.

    users: identifiers [U]; offsets: int64 [U+1]; items: int32 catalogue rows [M]; times: float64 unix
    seconds [M]; weights: float32 [M], 1.0 neutral (behaviour weight); ratings: float32 [M], NaN where none;
    attributes: of every user (see UserContext), or empty where nothing is known of anybody.
    """

    users: list[str]
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray
    weights: np.ndarray
    ratings: np.ndarray
    attributes: list[tuple[tuple[str, str], ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.users)

    @cached_property
    def attribute_names(self) -> list[str]:
        """The names of all attributes that are known of anybody."""
        return sorted({name for pairs in self.attributes for name, _ in pairs})

    def attributes_of(self, u: int) -> tuple[tuple[str, str], ...]:
        """What is known about user u, as (name, value)."""
        return self.attributes[u] if self.attributes else ()

    @property
    def events(self) -> int:
        return len(self.items)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def user_of(self) -> np.ndarray:
        """The user position of every event, int64 [M]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def _user_positions(self) -> dict[str, int]:
        return {user: u for u, user in enumerate(self.users)}

    def position(self, user: str) -> int | None:
        return self._user_positions.get(user)

    def keep(self, mask: np.ndarray) -> Sequences:
        """The events where mask [M] is true; every user stays, perhaps with no event."""
        counts = np.bincount(self.user_of[mask], minlength=len(self))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return replace(
            self,
            offsets=offsets,
            items=self.items[mask],
            times=self.times[mask],
            weights=self.weights[mask],
            ratings=self.ratings[mask],
        )

    def context(self, u: int, upto: int | None = None, scenario: str = HOME) -> UserContext:
        """User u's first `upto` events (all when None) as a request context."""
        start, end = int(self.offsets[u]), int(self.offsets[u + 1])
        end = end if upto is None else min(end, start + upto)
        return UserContext(
            history=tuple(self.items[start:end].tolist()),
            times=tuple(self.times[start:end].tolist()),
            weights=tuple(self.weights[start:end].tolist()),
            user=self.users[u],
            scenario=scenario,
            attributes=self.attributes_of(u),
        )


@dataclass(frozen=True)
class Dataset:
    """A named catalogue with its users' sequences. scenarios: see genrec.data.scenarios."""

    name: str
    catalog: Catalog
    sequences: Sequences
    scenarios: tuple[str, ...] = ("home", "item", "search", "discovery")
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSet:
    """Requests with their wanted items.

    contexts [B]; targets: int32 rows [B]; users: int64 positions [B], for user-clustered intervals;
    same_day: bool [B], the target falls on the UTC day of the event before it.
    """

    name: str
    contexts: list[UserContext]
    targets: np.ndarray
    users: np.ndarray
    same_day: np.ndarray

    def __len__(self) -> int:
        return len(self.contexts)

    def sample(self, n: int, seed: int = 0) -> EvalSet:
        """At most n requests, drawn without replacement with the given seed, in their original order."""
        if n >= len(self):
            return self
        keep = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return self.take(keep)

    def take(self, keep: np.ndarray) -> EvalSet:
        """The requests at these positions, int [n]."""
        return EvalSet(
            self.name,
            [self.contexts[i] for i in keep],
            self.targets[keep],
            self.users[keep],
            self.same_day[keep],
        )
