"""MovieLens-100K: fetched, checked and kept whole. Its licence forbids passing it on, so it is never in this project.

From the publisher (files.grouplens.org) where it can be reached, else from the copy that the PyPI wheel
recbole 1.2.1 carries. The archive itself is kept in the cache folder and checked against its published digest
every time it is read; a copy put there by hand is as good. Both give the same tables.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from genrec.data.readers import RawTable, parse_delimited, shown
from genrec.errors import GenrecError
from genrec.io import atomic, cache_folder

CONNECT_SECONDS = 5.0
FETCH_SECONDS = 60.0
PIP_SECONDS = 300.0
MAX_ARCHIVE = 50 << 20  # bytes; the zip has 4.9 MB, the wheel 2.1 MB
MAX_MEMBER = 64 << 20  # bytes, unpacked
RECBOLE = "recbole==1.2.1"
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """A zip with the two tables. digest: "md5:..." or "sha256:..."."""

    file: str
    digest: str
    events: str
    films: str


PUBLISHER = Archive(  # the publisher states the MD5 beside the zip
    "ml-100k.zip", "md5:0e33842e24a9c977be4e0107933c0723", "ml-100k/u.data", "ml-100k/u.item"
)
WHEEL = Archive(
    "recbole-1.2.1-py3-none-any.whl",
    "sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k/ml-100k.inter",
    "recbole/dataset_example/ml-100k/ml-100k.item",
)
URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"


def movielens_tables(cache: Path | None = None) -> tuple[RawTable, RawTable]:
    """Events and films of MovieLens-100K, from the cache or fetched. Raises GenrecError when neither source answers."""
    folder = (cache or cache_folder()) / "ml-100k"
    for archive in (PUBLISHER, WHEEL):
        path = folder / archive.file
        if path.is_file() and _digest(path.read_bytes(), archive.digest) == archive.digest:
            return _tables(archive, path)
    problems = []
    for archive, fetch in ((PUBLISHER, _from_publisher), (WHEEL, _from_pypi)):
        try:
            data = fetch()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problems.append(
                f"{archive.file}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else error!r}"
            )
            continue
        if (digest := _digest(data, archive.digest)) != archive.digest:
            problems.append(f"{archive.file}: its checksum is {digest}, not {archive.digest}")
            continue
        path = folder / archive.file
        with atomic(path) as temporary:
            temporary.write_bytes(data)
        return _tables(archive, path)
    raise GenrecError(
        f"MovieLens-100K could not be fetched ({'; '.join(problems)}); "
        f"put {PUBLISHER.file} from {URL} or the wheel {WHEEL.file} into {folder}"
    )


def publisher_tables(events: bytes, films: bytes, name: str = "ml-100k") -> tuple[RawTable, RawTable]:
    """The publisher's u.data (user, item, rating, seconds; tabs) and u.item (Latin-1, "|", 19 genre flags)."""
    rows = []
    for number, line in enumerate(films.decode("latin-1").splitlines(), start=1):
        parts = line.split("|")
        if not line.strip():
            continue
        if len(parts) != 5 + len(GENRES):
            raise GenrecError(f"{name}/u.item, line {number}: {len(parts)} values where 24 are expected: {shown(line)}")
        rows.append((parts[0], parts[1], [g for g, flag in zip(GENRES, parts[5:], strict=True) if flag == "1"]))
    return _events(f"{name}/u.data", events), _films(f"{name}/u.item", rows)


def recbole_tables(events: bytes, films: bytes, name: str = "recbole/ml-100k") -> tuple[RawTable, RawTable]:
    """RecBole's atomic files: the same, with typed header lines, UTF-8, and the year cut off the title."""
    rows = []
    for number, line in enumerate(films.decode("utf-8").splitlines()[1:], start=2):
        parts = line.split("\t")
        if len(parts) != 4:
            raise GenrecError(f"{name}.item, line {number}: {len(parts)} values where 4 are expected: {shown(line)}")
        item, title, year, genres = parts
        rows.append((item, f"{title} ({year})", genres.split(" ")))
    return _events(f"{name}.inter", events.split(b"\n", 1)[1]), _films(f"{name}.item", rows)


def film(title: str) -> tuple[str, str]:
    """The publisher's title, apart from its year: ("Toy Story", "1995"). One film has neither: ("unknown", "")."""
    if title.startswith(("unknown", "unkonwn")):  # the second is RecBole's spelling
        return "unknown", ""
    match = re.fullmatch(r"(.*?)\s*\((\d{4})\)(?:\s*\(V\))?\s*", title)
    return (match[1].strip(), match[2]) if match else (title.strip(), "")


def _events(name: str, data: bytes) -> RawTable:
    return RawTable(name, parse_delimited(name, data, "\t", False, ["user", "item", "rating", "timestamp"]))


def _films(name: str, rows: list[tuple[str, str, list[str]]]) -> RawTable:
    titles = [film(title) for _, title, _ in rows]
    table = pa.table(
        {
            "item": [item for item, _, _ in rows],
            "title": [title for title, _ in titles],
            "category": [[g for g in genres if g != "unknown"] for _, _, genres in rows],
            "year": [year for _, year in titles],
        },
        pa.schema({"item": pa.string(), "title": pa.string(), "category": pa.list_(pa.string()), "year": pa.string()}),
    )
    return RawTable(name, table)


def _tables(archive: Archive, path: Path) -> tuple[RawTable, RawTable]:
    with zipfile.ZipFile(path) as z:
        for member in (archive.events, archive.films):
            if z.getinfo(member).file_size > MAX_MEMBER:
                raise GenrecError(f"{path}: {member} is larger than {MAX_MEMBER} bytes")
        events, films = z.read(archive.events), z.read(archive.films)
    return publisher_tables(events, films) if archive is PUBLISHER else recbole_tables(events, films)


def _digest(data: bytes, like: str) -> str:
    """The digest of data, of the sort and in the form of `like`."""
    sort = like.split(":", 1)[0]
    return f"{sort}:{hashlib.new(sort, data, usedforsecurity=False).hexdigest()}"


def _from_publisher() -> bytes:
    deadline = time.monotonic() + FETCH_SECONDS
    out = io.BytesIO()
    with urllib.request.urlopen(URL, timeout=CONNECT_SECONDS) as answer:
        while chunk := answer.read(1 << 16):
            out.write(chunk)
            if out.tell() > MAX_ARCHIVE or time.monotonic() > deadline:
                raise OSError(f"gave up after {out.tell()} bytes")
    return out.getvalue()


def _from_pypi() -> bytes:
    with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
        command = [sys.executable, "-m", "pip", "download", RECBOLE, "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run(
            [*command, "--dest", folder],
            capture_output=True,
            text=True,
            timeout=PIP_SECONDS,
            env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            check=False,
        )
        path = Path(folder) / WHEEL.file
        if done.returncode or not path.is_file():
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise OSError(f"pip download {RECBOLE} failed: {lines[-1] if lines else 'no wheel came'}")
        return path.read_bytes()
