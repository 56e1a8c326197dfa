"""The memory cache of MARM: per event and layer one state, bounded, in memory or in a memory-mapped file.

Layout: a ring of `events` slots for each of `users` rows; the event at place p of its user's sequence has slot
p mod events, so a newer event takes the place of the one that is out of reach anyhow. When all rows are taken the user
who was written or read longest ago makes room. A state is [L - 1, d] in float16 (level 0 is the item's embedding, which
is looked up and keeps its gradient); the paper's L n d counts level 0 too.

One writer, any number of readers, threads or processes. A slot has a tag: its event's place, its item, and a counter
that every write raises. A writer takes the tag away, writes the state and sets the tag; a reader copies tags, states
and tags again and keeps what was there unchanged. So a reader never waits and never sees half a state, and a writer
that is killed leaves at most a slot without tag. After a crash of the machine, which may write pages in any order, the
file is taken as empty: it holds nothing that cannot be made again. The space is reserved when the file is made, so a
disk that is full says so then and not as a fault in the middle of a write.
"""

from __future__ import annotations

import json
import mmap
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from genrec import io
from genrec.errors import GenrecError

MAGIC, FORMAT, HEADER = "genrec-marm-cache", 1, 4096
DTYPES = {"float16": np.float16, "float32": np.float32}
FREE, COUNTER = 0, 0xFFFFFF  # a tag is (place + 1) << 24 | counter; no place: no event
LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class CacheConfig:
    """Sizes: users rows, events slots each, states of [levels, d]. model: what wrote the states; another model's are
    never read."""

    users: int
    events: int
    levels: int
    d: int
    model: str = ""
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name in ("users", "events", "d"):
            if getattr(self, name) < 1:
                raise GenrecError(f"{name} of the cache is {getattr(self, name)}; it must be at least 1")
        if self.levels < 0 or self.dtype not in DTYPES:
            raise GenrecError(f"a cache of {self.levels} levels in {self.dtype} is not possible")

    @property
    def state_bytes(self) -> int:
        """What the states take: users x events x levels x d x 2 (4 in float32)."""
        return self.users * self.events * self.levels * self.d * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def total_bytes(self) -> int:
        """States, tags and the table of users."""
        return HEADER + self.users * 16 + self.users * self.events * 12 + self.state_bytes


def user_key(user: str) -> int:
    """A user's key, a positive 63-bit number; two of a billion users share one with a chance below 1 in 10."""
    return int.from_bytes(blake2b(user.encode(), digest_size=8).digest(), "little") >> 1 or 1


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(HEADER).rstrip(b"\0"))
    except FileNotFoundError:
        raise GenrecError(f"there is no cache {path}; the model that writes it has not run yet") from None
    except ValueError:
        raise GenrecError(f"{path} is no cache of states or is damaged; remove it") from None
    if not isinstance(found, dict) or found.get("magic") != MAGIC:
        raise GenrecError(f"{path} is no cache of states or is damaged; remove it")
    return found


class StateCache:
    """See the module's text. Without a path it lives in memory. write: whether this is the writer."""

    def __init__(self, config: CacheConfig, path: Path | None = None, write: bool = True) -> None:
        self.config, self.path, self.writable = config, path, write
        self._stack = ExitStack()
        self._rows: dict[int, int] = {}
        self._clock = 1
        try:
            buffer = self._memory() if path is None else self._file(path)
        except BaseException:
            self._stack.close()
            raise
        c = config
        place = HEADER

        def take(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            nonlocal place
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found = np.frombuffer(buffer, dtype, int(np.prod(shape)), place).reshape(shape)
            place += size
            return found

        self._owners, self._used = take((c.users,), np.int64), take((c.users,), np.int64)
        self._tags = take((c.users, c.events), np.uint64)
        self._items = take((c.users, c.events), np.int32)
        self._states = take((c.users, c.events, c.levels, c.d), DTYPES[c.dtype])
        self._rows = {int(key): row for row, key in enumerate(self._owners) if key}
        self._clock = int(self._used.max(initial=0)) + 1

    @staticmethod
    def describe(path: Path) -> CacheConfig:
        """The sizes that a file states. Raises GenrecError where it is missing or no cache."""
        found = _header(path)
        try:
            return CacheConfig(**{k: found[k] for k in CacheConfig.__dataclass_fields__})
        except (KeyError, TypeError):
            raise GenrecError(f"{path} is no cache of states or is damaged; remove it") from None

    # -- opening ------------------------------------------------------------------------------------

    def _memory(self) -> Any:
        if not self.writable:
            raise GenrecError("a cache in memory has no other reader; give a path")
        return bytearray(self.config.total_bytes)

    def _file(self, path: Path) -> Any:
        c = self.config
        about = {"magic": MAGIC, "format": FORMAT} | asdict(c)
        if self.writable:
            path.parent.mkdir(parents=True, exist_ok=True)
            busy = f"another process writes {path}; one writer at a time"
            self._stack.enter_context(io.locked(path.with_name(path.name + ".lock"), busy))
        fresh = not path.exists()
        if fresh and not self.writable:
            raise GenrecError(f"there is no cache {path}; the model that writes it has not run yet")
        if fresh:
            with io.atomic(path) as temporary, temporary.open("wb") as file:
                self._reserve(file.fileno(), c.total_bytes)
                os.pwrite(file.fileno(), json.dumps(about | {"boot": ""}).encode(), 0)
        found = _header(path)
        if {k: found.get(k) for k in about} != about:
            other = found.get("model")
            raise GenrecError(
                f"{path} holds the states of another model ({str(other)[:40]!r}, not {c.model[:40]!r}) or of other "
                "sizes; remove it, or load the model that wrote it"
            )
        if path.stat().st_size != c.total_bytes:
            raise GenrecError(f"{path} is cut off: {path.stat().st_size:,} bytes of {c.total_bytes:,}; remove it")
        crashed = found.get("boot") not in ("", _boot())  # the machine went down while this was open for writing
        if crashed and not self.writable:
            raise GenrecError(f"{path} was being written when the machine went down; open it once for writing")
        mode = "r+b" if self.writable else "rb"
        with path.open(mode) as file:
            access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
            self._mapped = mmap.mmap(file.fileno(), c.total_bytes, access=access)
        if self.writable:
            if crashed:
                self._mapped[HEADER:] = bytes(c.total_bytes - HEADER)
            self._mark(about, _boot())
        self._about = about
        return self._mapped

    @staticmethod
    def _reserve(file: int, size: int) -> None:
        os.posix_fallocate(file, 0, size)

    def _mark(self, about: dict[str, Any], boot: str) -> None:
        """boot: of the machine while the file may hold pages that are not on the disk yet; "" when all are."""
        text = json.dumps(about | {"boot": boot}).encode()
        self._mapped[:HEADER] = text.ljust(HEADER, b"\0")

    def flush(self) -> None:
        """Brings everything to the disk."""
        if self.path is not None and self.writable:
            self._mapped.flush()

    def close(self) -> None:
        """Brings everything to the disk and lets others write. The arrays stay readable until they are let go."""
        if self.path is not None and self.writable and self._stack is not None:
            self._mapped.flush()
            self._mark(self._about, "")
            self._mapped.flush()
            self.writable = False
        self._stack.close()

    def __enter__(self) -> StateCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------------

    def read(self, keys: np.ndarray, places: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The states of events. keys: int64 [B]; places, items: [B, n], -1 where there is no event. Returns states
        [B, n, levels, d] (zeros where missing) and whether each was there, bool [B, n]."""
        row_of = self._find(keys)
        rows = np.maximum(row_of, 0)[:, None]
        slots = np.where(places >= 0, places % self.config.events, 0)
        before = self._tags[rows, slots]
        held = self._items[rows, slots]
        states = self._states[rows, slots]
        owners = self._owners[rows[:, 0]]
        after = self._tags[rows, slots]
        present = (before == after) & (before >> np.uint64(24) == (places + 1).astype(np.uint64)) & (held == items)
        present &= (places >= 0) & ((row_of >= 0) & (owners == keys))[:, None]
        states[~present] = 0
        if self.writable and (row_of >= 0).any():
            self._used[row_of[row_of >= 0]] = self._clock
        return states, present

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, -1 where there is none. A reader looks again for users who are new to it."""
        found = np.fromiter((self._rows.get(int(k), -1) for k in keys), np.int64, len(keys))
        if not self.writable:
            moved = (found < 0) | (self._owners[np.maximum(found, 0)] != keys)
            if moved.any():
                self._rows = {int(key): row for row, key in enumerate(self._owners) if key}
                found = np.fromiter((self._rows.get(int(k), -1) for k in keys), np.int64, len(keys))
        return found

    # -- writing ------------------------------------------------------------------------------------

    def write(self, keys: np.ndarray, places: np.ndarray, items: np.ndarray, states: np.ndarray) -> None:
        """Keeps the states of events: keys, places, items [B]; states [B, levels, d]. Of two for the same slot the
        later one stays."""
        if not self.writable:
            raise GenrecError("this cache is open for reading")
        if not self.config.levels or not len(keys):
            return
        self._clock += 1
        rows = np.array([self._row(int(k)) for k in keys], np.int64)
        kept = self._owners[rows] == keys  # with more users than rows, some made room for later ones
        rows, places, items, states = rows[kept], places[kept], items[kept], states[kept]
        slots = places % self.config.events
        last = {(int(r), int(s)): i for i, (r, s) in enumerate(zip(rows, slots, strict=True))}
        keep = np.fromiter(last.values(), np.int64, len(last))
        rows, slots, places, items = rows[keep], slots[keep], places[keep], items[keep]
        counter = (self._tags[rows, slots] + np.uint64(1)) & np.uint64(COUNTER)
        self._tags[rows, slots] = counter  # the place is gone: nobody reads this slot
        values = states[keep]
        if self.config.dtype == "float16":
            values = np.clip(values, -LARGEST, LARGEST)
        self._states[rows, slots] = values
        self._items[rows, slots] = items
        counter = (counter + np.uint64(1)) & np.uint64(COUNTER)
        self._tags[rows, slots] = ((places + 1).astype(np.uint64) << np.uint64(24)) | counter
        self._used[rows] = self._clock

    def _row(self, key: int) -> int:
        row = self._rows.get(key)
        if row is not None:
            return row
        row = len(self._rows) if len(self._rows) < self.config.users else int(np.argmin(self._used))
        if old := int(self._owners[row]):
            self._owners[row] = 0
            del self._rows[old]
        self._tags[row] &= np.uint64(COUNTER)
        self._owners[row] = key
        self._used[row] = self._clock
        self._rows[key] = row
        return row

    def clear(self) -> None:
        """Forgets everything."""
        self._tags &= np.uint64(COUNTER)
        self._owners[:] = 0
        self._used[:] = 0
        self._rows, self._clock = {}, 1

    # -- whole --------------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """How many states there are."""
        return int((self._tags >> np.uint64(24) != FREE).sum())

    def snapshot(self) -> tuple[np.ndarray, ...]:
        """A copy of everything in it."""
        return tuple(a.copy() for a in (self._owners, self._used, self._tags, self._items, self._states))

    def restore(self, kept: tuple[np.ndarray, ...]) -> None:
        """What a snapshot of a cache of the same sizes held."""
        self.clear()
        owners, used, tags, items, states = kept
        self._used[:], self._items[:], self._states[:] = used, items, states
        self._tags[:], self._owners[:] = tags, owners
        self._rows = {int(key): row for row, key in enumerate(self._owners) if key}
        self._clock = int(self._used.max(initial=0)) + 1
