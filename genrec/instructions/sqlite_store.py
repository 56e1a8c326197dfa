"""Instructions in one SQLite file: one row per user and scenario, safe under concurrent readers and kills.

Write-ahead logging lets readers go on while a writer writes. After a power cut the newest transactions may be
missing, never half there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from genrec.contracts import Instruction
from genrec.errors import GenrecError
from genrec.instructions.store import QUERY, InstructionStore, Key, Row

READING = 2.0  # seconds a reader waits at most: a request is waiting with it
FORMAT = 2  # PRAGMA user_version; raised when the tables change
_COLUMNS = "situation, intents, look_for, rationale, model, prompt_version, context_hash, created, events"
_fields = attrgetter(*_COLUMNS.split(", "))
_KEY = "user TEXT NOT NULL, scenario TEXT NOT NULL"
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS instructions ({_KEY}, situation, intents, look_for, rationale, model, prompt_version,"
    " context_hash, created REAL NOT NULL, events INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (user, scenario))"
    " WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS claims ({_KEY}, until REAL NOT NULL, PRIMARY KEY (user, scenario)) WITHOUT ROWID",
)
_OLD = "created < ? AND scenario <> ?"
_FROM_FORMAT_1 = "ALTER TABLE instructions ADD COLUMN events INTEGER NOT NULL DEFAULT 0"


class SQLiteStore(InstructionStore):
    """See InstructionStore. path: the file; the first write makes it, and its folder. patience: seconds that a write
    waits for another writer.

    Each access sees the file that is there now: one that was made, replaced or deleted since the last one too. In a
    folder without write permission the file is read as it stands, and read anew when it has changed.
    """

    def __init__(self, path: Path | str, patience: float = 30.0) -> None:
        self.path = Path(path)
        self.patience = patience
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._seen: tuple[object, ...] | None = None  # the file that _db is open on

    def get_many(self, keys: Sequence[Key]) -> list[Instruction | None]:
        query = f"SELECT {_COLUMNS} FROM instructions WHERE user = ? AND scenario = ?"
        with self._reading() as db:
            rows = [None if db is None else db.execute(query, key).fetchone() for key in keys]
        return [None if row is None else self._instruction(row) for row in rows]

    def put_many(self, rows: Iterable[Row]) -> None:
        def values() -> Iterator[tuple[object, ...]]:
            for user, scenario, i in rows:
                fields = (json.dumps(v, ensure_ascii=False) if isinstance(v, tuple) else v for v in _fields(i))
                put.append((user, scenario))
                yield user, scenario, *fields

        put: list[Key] = []
        with self._writing() as db:
            places = ", ".join("?" * (2 + _COLUMNS.count(",") + 1))
            db.executemany(f"REPLACE INTO instructions (user, scenario, {_COLUMNS}) VALUES ({places})", values())
            db.executemany("DELETE FROM claims WHERE user = ? AND scenario = ?", put)

    def expire(self, before: float) -> int:
        with self._reading() as db:
            found = (
                db is not None and db.execute(f"SELECT 1 FROM instructions WHERE {_OLD}", (before, QUERY)).fetchone()
            )
        if not found:
            return 0
        with self._writing() as db:
            return db.execute(f"DELETE FROM instructions WHERE {_OLD}", (before, QUERY)).rowcount

    def claim(self, keys: Sequence[Key], seconds: float) -> list[Key]:
        now = time.time()
        query = "INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET until = excluded.until WHERE until < ?"
        with self._writing() as db:
            return [key for key in keys if db.execute(query, (*key, now + seconds, now)).rowcount]

    def release(self, keys: Sequence[Key]) -> None:
        with self._writing() as db:
            db.executemany("DELETE FROM claims WHERE user = ? AND scenario = ?", keys)

    def count(self) -> int:
        with self._reading() as db:
            return 0 if db is None else int(db.execute("SELECT count(*) FROM instructions").fetchone()[0])

    def all(self) -> list[Row]:
        query = f"SELECT user, scenario, {_COLUMNS} FROM instructions ORDER BY user, scenario"
        with self._reading() as db:
            rows = [] if db is None else db.execute(query).fetchall()
        return [(user, scenario, self._instruction(tuple(rest))) for user, scenario, *rest in rows]

    def close(self) -> None:
        """Closes the file; the last one to close folds the write-ahead log into it."""
        with self._lock:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The connection, or None where there is no store."""
        with self._errors(), self._lock:
            yield self._connect(write=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The connection, inside a transaction."""
        with self._errors(), self._lock:
            db = self._connect(write=True)
            assert db is not None
            with _transaction(db):
                yield db

    def _connect(self, write: bool) -> sqlite3.Connection | None:
        """The connection to the file that is there now; None where there is none and nothing is to be written."""
        found = self._look()
        if write and self._frozen():
            raise GenrecError(f"cannot write {self.path}: its folder is read-only")
        if self._db is None or found != self._seen:
            self._disconnect()
            if found is None and not write:
                return None
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            db = self._open()
            try:
                whole = _prepare(db, self.path, write)
            except BaseException:
                db.close()
                raise
            if not whole:
                db.close()
                return None
            self._db, self._seen = db, self._look()
        patience = self.patience if write else min(self.patience, READING)
        self._db.execute(f"PRAGMA busy_timeout = {round(1000 * patience)}")
        return self._db

    def _look(self) -> tuple[object, ...] | None:
        """What tells this file from another one; in a folder without write permission also from its earlier self."""
        try:
            file = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not file.st_size:
            return None
        if os.access(self.path.parent, os.W_OK):
            return file.st_dev, file.st_ino
        return file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size, self._log().exists()

    def _frozen(self) -> bool:
        """Whether there is a file in a folder without write permission."""
        return self.path.exists() and not os.access(self.path.parent, os.W_OK)

    def _log(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def _open(self) -> sqlite3.Connection:
        # Without write permission on the folder the log's index cannot be made: the file is read as it stands, or,
        # while another process writes, through that one's index.
        mode = "" if not self._frozen() else "?mode=ro" if self._log().exists() else "?immutable=1"
        return sqlite3.connect(
            self.path.resolve().as_uri() + mode,
            uri=True,
            timeout=self.patience,
            isolation_level=None,
            check_same_thread=False,
        )

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
        situation, intents, look_for, rationale, model, prompt_version, context_hash, created, events = row
        try:
            parsed = tuple(str(intent) for intent in json.loads(str(intents)))
            numbers = float(str(created)), int(str(events))
        except (ValueError, TypeError) as error:
            raise GenrecError(f"{self.path} is damaged ({error}); delete it and run: genrec instruct") from error
        texts = (str(situation), parsed, str(look_for), str(rationale), str(model), str(prompt_version))
        return Instruction(*texts, str(context_hash), *numbers)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _prepare(db: sqlite3.Connection, path: Path, write: bool) -> bool:
    """Checks the file, and makes or updates its tables. False for one without tables that is not to be written."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not 0 <= found <= FORMAT:
        raise GenrecError(
            f"{path} is of format {found}, this genrec reads {FORMAT}; delete it and run: genrec instruct"
        )
    if tables and "instructions" not in tables:
        raise GenrecError(f"{path} is an SQLite file but no instruction store; choose another path")
    if not tables and not write:
        return False
    if found != FORMAT:
        db.execute("PRAGMA journal_mode = WAL")
        with _transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] == 1:
                db.execute(_FROM_FORMAT_1)
            for table in _TABLES:
                db.execute(table)
            db.execute(f"PRAGMA user_version = {FORMAT}")
    db.execute("PRAGMA synchronous = NORMAL")
    return True
