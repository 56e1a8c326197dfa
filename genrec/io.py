"""Files that are whole or absent: every write goes to a temporary neighbour and is renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError

UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip
TEMPORARY = ".*.tmp"  # names of files that are being written; a killed process leaves them


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise _cannot_write(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes the folder if need be and tries it out, for a clear word before long work. Raises GenrecError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp"):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: OSError) -> GenrecError:
    return GenrecError(f"cannot write {path}: {error.strerror}; free some space or choose another folder")


def remove_temporaries(folder: Path) -> None:
    """Removes what killed writers left below a folder. Nobody may be writing there."""
    for path in folder.rglob(TEMPORARY):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a file, which is made if need be; the system takes it from a killed process. Raises GenrecError
    with the text `busy` where another process holds it."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GenrecError(busy) from None
        yield


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises GenrecError when it is missing or cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GenrecError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GenrecError(f"{path} is not valid JSON ({error}); it may be cut off") from None


def check_shape(path: Path, value: Any, shape: Mapping[str, type]) -> dict[str, Any]:
    """The value read from `path` as an object whose fields have these types. Raises GenrecError naming the first that
    has not."""
    if not isinstance(value, dict):
        raise GenrecError(f"{path} is damaged: it holds no JSON object")
    for name, kind in shape.items():
        if name not in value:
            raise GenrecError(f"{path} is damaged: {name!r} is missing")
        if not isinstance(value[name], kind) or isinstance(value[name], bool) is not (kind is bool):
            raise GenrecError(f"{path} is damaged: {name!r} is not of type {kind.__name__}")
    return value


def sha256(path: Path) -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(path: Path) -> str:
    """The hex digest of a file's content, or of the names and contents of the files right inside a folder."""
    if path.is_file():
        return sha256(path)
    found = [f"{p.name} {sha256(p)}" for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return hashlib.sha256("\n".join(found).encode("utf-8")).hexdigest()


def cache_folder() -> Path:
    """Where downloads and converted models are kept: $GENREC_CACHE, else ~/.cache/genrec."""
    return Path(os.environ.get("GENREC_CACHE") or Path.home() / ".cache" / "genrec")
