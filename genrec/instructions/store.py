"""Instructions on disk: one SQLite file, one row per user and scenario, safe under concurrent readers and kills.

Write-ahead logging lets readers go on while the batch job writes; every `put_many` is one transaction, so a killed
process leaves a chunk whole or absent. After a power cut the newest transactions may be missing, never half there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Self

from genrec.contracts import Instruction
from genrec.errors import GenrecError

Key = tuple[str, str]  # user, scenario

FORMAT = 1  # PRAGMA user_version; raised when the table changes
_COLUMNS = "situation, intents, look_for, rationale, model, prompt_version, context_hash, created"
_fields = attrgetter(*_COLUMNS.split(", "))
_TABLE = f"""CREATE TABLE IF NOT EXISTS instructions (
    user TEXT NOT NULL, scenario TEXT NOT NULL, {_COLUMNS.replace(", created", ", created REAL NOT NULL")},
    PRIMARY KEY (user, scenario)) WITHOUT ROWID"""


class InstructionStore:
    """A store of instructions by user and scenario. One object may be shared between threads; closing is idempotent.

    path: the SQLite file. create: make it (and its folder) when it is missing; False for readers.
    Raises GenrecError when the file is missing (create False), is no instruction store, is of another format,
    is damaged, stays locked for `patience` seconds, or cannot be written.
    """

    def __init__(self, path: Path, create: bool = True, patience: float = 30.0) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not create and not (self.path.is_file() and self.path.stat().st_size):
            raise GenrecError(f"{self.path} is missing or empty; write it with: genrec instruct")
        with self._errors():
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # Readers in a folder without write permission cannot make the log's index file: the file is frozen then.
            frozen = "?immutable=1" if not create and not os.access(self.path.parent, os.W_OK) else ""
            self._db = sqlite3.connect(
                self.path.resolve().as_uri() + frozen,
                uri=True,
                timeout=patience,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = [name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if found not in (0, FORMAT):
            raise GenrecError(f"{self.path} is of format {found}, this genrec reads {FORMAT}; write it again")
        if tables and "instructions" not in tables:
            raise GenrecError(f"{self.path} is an SQLite file but no instruction store; choose another path")
        if not tables:
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._transaction():
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version = {FORMAT}")
        self._db.execute("PRAGMA synchronous = NORMAL")

    def get(self, user: str, scenario: str) -> Instruction | None:
        """The instruction of one user in one scenario, stale or not (compare context_hash), or None."""
        with self._errors(), self._lock:
            row = self._db.execute(
                f"SELECT {_COLUMNS} FROM instructions WHERE user = ? AND scenario = ?", (user, scenario)
            ).fetchone()
        return None if row is None else self._instruction(row)

    def put_many(self, rows: Iterable[tuple[str, str, Instruction]]) -> None:
        """Writes (user, scenario, instruction) rows in one transaction; a row with the same key is replaced."""
        values = (
            (user, scenario, *(json.dumps(v, ensure_ascii=False) if isinstance(v, tuple) else v for v in _fields(i)))
            for user, scenario, i in rows
        )
        with self._errors(), self._lock, self._transaction():
            self._db.executemany(f"REPLACE INTO instructions VALUES ({', '.join('?' * 10)})", values)

    def stale(self, current: Mapping[Key, str]) -> list[Key]:
        """The keys of `current` (key -> context hash now) that have no instruction or one of another hash, in order."""
        query = "SELECT context_hash FROM instructions WHERE user = ? AND scenario = ?"
        with self._errors(), self._lock:
            return [k for k, now in current.items() if self._db.execute(query, k).fetchone() != (now,)]

    def expire(self, before: float) -> int:
        """Deletes what was created before this time (unix seconds); returns how many."""
        with self._errors(), self._lock, self._transaction():
            return self._db.execute("DELETE FROM instructions WHERE created < ?", (before,)).rowcount

    def count(self) -> int:
        """How many instructions there are."""
        with self._errors(), self._lock:
            return int(self._db.execute("SELECT count(*) FROM instructions").fetchone()[0])

    def all(self) -> list[tuple[str, str, Instruction]]:
        """Every (user, scenario, instruction), ordered by user and scenario."""
        with self._errors(), self._lock:
            rows = self._db.execute(
                f"SELECT user, scenario, {_COLUMNS} FROM instructions ORDER BY user, scenario"
            ).fetchall()
        return [(user, scenario, self._instruction(tuple(rest))) for user, scenario, *rest in rows]

    def close(self) -> None:
        """Closes the file; the last one to close folds the write-ahead log into it."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """One clear line for what SQLite and the file system may say."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.DatabaseError, OSError) as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise GenrecError(f"{self.path} is locked by another process; try again when it is done") from error
            if isinstance(error, OSError) or name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
                raise GenrecError(f"cannot use {self.path} ({error}); check the folder and the free space") from error
            if name.startswith("SQLITE_READONLY"):
                raise GenrecError(f"cannot write {self.path}: it is read-only") from error
            raise GenrecError(f"{self.path} is damaged ({error}); delete it and run: genrec instruct") from error

    def _instruction(self, row: tuple[object, ...]) -> Instruction:
        situation, intents, look_for, rationale, model, prompt_version, context_hash, created = row
        try:
            parsed = tuple(str(intent) for intent in json.loads(str(intents)))
        except ValueError as error:
            raise GenrecError(f"{self.path} is damaged ({error}); delete it and run: genrec instruct") from error
        texts = (str(situation), parsed, str(look_for), str(rationale), str(model), str(prompt_version))
        return Instruction(*texts, str(context_hash), float(str(created)))
