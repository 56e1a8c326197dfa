"""Where instructions are kept: one small interface, an SQLite file by default, Redis or Valkey for many hosts.

    store = open_store("bundles/shop/instructions.sqlite")
    store = open_store("redis://host:6379/0?prefix=shop")

An instruction is kept by user and scenario with its provenance: model, prompt version, context hash, events, time.
What a search text means is kept the same way, for everybody who types it (`query_key`).
Every `put_many` is one transaction, so a killed writer leaves a chunk whole or absent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from genrec.contracts import Instruction
from genrec.errors import GenrecError
from genrec.instructions.text import clean

Key = tuple[str, str]  # user, scenario
Row = tuple[str, str, Instruction]

QUERY = "query"  # in the place of a scenario: no request has it
QUERY_BYTES = 160  # what is told apart of a search text
SERVERS = ("redis", "rediss", "valkey", "valkeys")  # schemes of a URL; those with s speak TLS


def query_key(text: str) -> Key:
    """What the rewriting of a search text is kept under: one for everybody, whatever its case, spaces and marks. The
    user is "" for a text that is too long to be told apart: it has none."""
    whole = clean(text, 2 * QUERY_BYTES)
    return (whole.casefold() if len(whole.encode()) <= QUERY_BYTES else ""), QUERY


class InstructionStore(ABC):
    """Instructions by user and scenario. One object may be shared between threads; closing is idempotent.

    Reading never makes a store: one that does not exist yet is empty. All methods raise GenrecError, one line, when
    the store cannot be reached, read or written.
    """

    @abstractmethod
    def get_many(self, keys: Sequence[Key]) -> list[Instruction | None]:
        """The instruction of each key, stale or not, or None."""

    @abstractmethod
    def put_many(self, rows: Iterable[Row]) -> None:
        """Writes (user, scenario, instruction) rows in one transaction and lifts the claims on them; a row with the
        same key is replaced. With no rows it makes sure that the store can be written."""

    @abstractmethod
    def expire(self, before: float) -> int:
        """Deletes what was created before this time (unix seconds); returns how many. What a search text means
        (`query_key`) does not age and stays."""

    @abstractmethod
    def claim(self, keys: Sequence[Key], seconds: float) -> list[Key]:
        """Those of the keys that no other writer has claimed, in order; they are the caller's for these seconds, or
        until they are put or released."""

    @abstractmethod
    def release(self, keys: Sequence[Key]) -> None:
        """Lifts claims."""

    @abstractmethod
    def count(self) -> int:
        """How many instructions there are."""

    @abstractmethod
    def all(self) -> list[Row]:
        """Every (user, scenario, instruction), ordered by user and scenario."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the file or the connections."""

    def get(self, user: str, scenario: str) -> Instruction | None:
        """The instruction of one user in one scenario, stale or not (compare context_hash), or None."""
        return self.get_many([(user, scenario)])[0]

    def stale(self, current: Mapping[Key, str]) -> list[Key]:
        """The keys of `current` (key -> context hash now) that have no instruction or one of another hash, in order."""
        found = self.get_many(list(current))
        return [k for (k, now), i in zip(current.items(), found, strict=True) if i is None or i.context_hash != now]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(place: str | Path) -> InstructionStore:
    """The store at a path (SQLite) or a URL (Redis, Valkey). Nothing is made or connected to before it is used.

    Raises GenrecError for a URL that is none of a store, or when the client package is missing.
    """
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        from genrec.instructions.sqlite_store import SQLiteStore

        return SQLiteStore(Path(place))
    if scheme not in SERVERS:
        raise GenrecError(f"{scheme}:// is no instruction store; give a file, or a URL of {', '.join(SERVERS)}")
    from genrec.instructions.redis_store import RedisStore

    return RedisStore(str(place))
