"""MovieLens-100K: two formats, one data set; fetched with a checksum, kept whole. Archives here are tiny fakes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.data import Dataset, archives, load_dataset
from genrec.data.archives import GENRES, film, publisher_tables, recbole_tables
from genrec.data.build import build
from genrec.errors import GenrecError

DATA = b"196\t3\t3\t881250949\n186\t1\t3\t891717742\n196\t2\t5\t881250949\n196\t1\t1\t881250949\n"
FILMS = [
    ("1", "Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    ("2", "Misérables, Les", "1995", ["Drama", "Musical"]),
    ("3", "Land Before Time III (1995)", "V", ["Animation"]),
    ("4", "unkonwn", "unkonwn", ["unknown"]),
    ("5", 'Good "Morning"', "1971", ["unknown"]),
]


def publisher_films() -> bytes:
    lines = []
    for item, title, year, genres in FILMS:
        name = "unknown" if title == "unkonwn" else f"{title} ({year})"
        flags = "|".join("1" if g in genres else "0" for g in GENRES)
        lines.append(f"{item}|{name}|01-Jan-1995||http://us.imdb.com/x|{flags}")
    return "\n".join([*lines, ""]).encode("latin-1")


def recbole_files() -> tuple[bytes, bytes]:
    films = "".join(f"{i}\t{t}\t{y}\t{' '.join(g)}\n" for i, t, y, g in FILMS)
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    return b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + DATA, (head + films).encode()


def zipped(archive: archives.Archive, events: bytes, films: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(archive.events, events)
        z.writestr(archive.films, films)
    return out.getvalue()


def assert_same(a: Dataset, b: Dataset) -> None:
    assert a.catalog.table.equals(b.catalog.table) and a.catalog.fields == b.catalog.fields
    assert (a.name, a.scenarios, a.notes) == (b.name, b.scenarios, b.notes)
    assert a.sequences.users == b.sequences.users
    for name in ("offsets", "items", "times", "weights", "ratings"):
        assert (getattr(a.sequences, name) == getattr(b.sequences, name)).all(), name


def test_both_formats_are_one_data_set() -> None:
    ours = build("ml-100k", *publisher_tables(DATA, publisher_films()))
    assert_same(ours, build("ml-100k", *recbole_tables(*recbole_files())))
    assert ours.catalog.titles == ["Toy Story", "Misérables, Les", "Land Before Time III", "unknown", 'Good "Morning"']
    assert ours.catalog.table["year"].to_pylist() == ["1995", "1995", "1995", "", "1971"]
    assert ours.catalog.categories[:2] == [["Animation", "Children's", "Comedy"], ["Drama", "Musical"]]
    assert ours.catalog.categories[3:] == [[], []]
    assert ours.catalog.fields == ("year",)
    assert ours.sequences.users == ["196", "186"]
    assert ours.sequences.items.tolist() == [2, 1, 0, 0]  # one moment: the order of the file
    assert ours.sequences.ratings.tolist() == [3, 5, 1, 3] and ours.sequences.weights.tolist() == [1.0] * 4
    assert "favourites" in ours.scenarios


@pytest.mark.parametrize(
    ("title", "wanted"),
    [
        ("Toy Story (1995)", ("Toy Story", "1995")),
        ("Seven (Se7en) (1995) ", ("Seven (Se7en)", "1995")),
        ("Land Before Time III (1995) (V)", ("Land Before Time III", "1995")),
        ("unknown", ("unknown", "")),
        ("1-900 (1994)", ("1-900", "1994")),
        ("No Year", ("No Year", "")),
    ],
)
def test_title_and_year(title: str, wanted: tuple[str, str]) -> None:
    assert film(title) == wanted


def test_bad_film_line() -> None:
    with pytest.raises(GenrecError, match=r"u\.item, line 1: 2 values where 24"):
        publisher_tables(DATA, b"1|Toy Story\n")


def test_a_folder_of_the_publishers_files(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_bytes(DATA)
    (tmp_path / "u.item").write_bytes(publisher_films())
    assert load_dataset(tmp_path).catalog.titles[0] == "Toy Story"


# --- fetching


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Tiny archives whose digests are the expected ones; fetching either fails until a test says otherwise."""
    zipfile_ = zipped(archives.PUBLISHER, DATA, publisher_films())
    wheel = zipped(archives.WHEEL, *recbole_files())
    monkeypatch.setattr(
        archives, "PUBLISHER", replace(archives.PUBLISHER, digest="md5:" + hashlib.md5(zipfile_).hexdigest())
    )
    monkeypatch.setattr(
        archives, "WHEEL", replace(archives.WHEEL, digest="sha256:" + hashlib.sha256(wheel).hexdigest())
    )

    def unreachable() -> bytes:
        raise OSError("no route")

    monkeypatch.setattr(archives, "_from_publisher", unreachable)
    monkeypatch.setattr(archives, "_from_pypi", unreachable)
    return {"zip": zipfile_, "wheel": wheel}


def test_publisher_first_then_the_cache(
    fakes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(archives, "_from_publisher", lambda: fakes["zip"])
    first = load_dataset("ml-100k", cache=tmp_path)
    assert [p.name for p in (tmp_path / "ml-100k").iterdir()] == ["ml-100k.zip"]  # whole, no temporary left
    monkeypatch.setattr(archives, "_from_publisher", lambda: pytest.fail("fetched again"))
    assert_same(first, load_dataset("ml-100k", cache=tmp_path))


def test_the_wheel_when_the_publisher_is_out_of_reach(
    fakes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(archives, "_from_pypi", lambda: fakes["wheel"])
    second = load_dataset("ml-100k", cache=tmp_path)
    monkeypatch.setattr(archives, "_from_pypi", lambda: pytest.fail("fetched again"))
    assert_same(second, load_dataset("ml-100k", cache=tmp_path))
    monkeypatch.setattr(archives, "_from_publisher", lambda: fakes["zip"])
    assert_same(second, load_dataset("ml-100k", cache=tmp_path / "other"))


def test_wrong_bytes_are_neither_used_nor_kept(
    fakes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(archives, "_from_publisher", lambda: fakes["zip"][:-5])
    with pytest.raises(
        GenrecError, match=r"ml-100k\.zip: its checksum is md5:.*no route.*put ml-100k\.zip from"
    ) as caught:
        load_dataset("ml-100k", cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ml-100k").exists()


def test_damaged_cache_is_fetched_again(
    fakes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ml-100k").mkdir()
    kept = tmp_path / "ml-100k" / "ml-100k.zip"
    kept.write_bytes(fakes["zip"][:100])
    monkeypatch.setattr(archives, "_from_publisher", lambda: fakes["zip"])
    load_dataset("ml-100k", cache=tmp_path)
    assert kept.read_bytes() == fakes["zip"]


def test_default_cache_is_the_cache_folder(
    fakes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path))
    monkeypatch.setattr(archives, "_from_publisher", lambda: fakes["zip"])
    load_dataset("ml-100k")
    assert (tmp_path / "ml-100k" / "ml-100k.zip").is_file()


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("WARNING: x\nERROR: No matching distribution found for recbole==1.2.1\n", "No matching distribution"),
        ("/venv/bin/python: No module named pip\n", "No module named pip"),
        ("", "no wheel came"),
    ],
)
def test_pip_failure_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, shown: str) -> None:
    def unreachable() -> bytes:
        raise OSError("no route")

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command and "recbole==1.2.1" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(archives, "_from_publisher", unreachable)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(GenrecError, match=f"no route.*{shown}") as caught:
        load_dataset("ml-100k", cache=tmp_path)
    assert "\n" not in str(caught.value)
