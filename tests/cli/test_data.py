"""`genrec data`: what a source holds, and one line for what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Capture, error_of, json_of

from genrec.cli import main


def test_data_describes_a_source(shop_folder: Path, capsys: Capture) -> None:
    found = json_of(capsys, "data", str(shop_folder))
    assert (found["users"], found["items"], found["rated_events"]) == (40, 60, 0)
    assert found["scenarios"]["home"]["requests"] == 40 and "favourites" not in found["scenarios"]
    assert found["splits"]["leave-one-out"]["train"] == found["events"] - 80
    assert "users with 12 events" in found["splits"]["rolling"]["error"]
    assert main(["data", str(shop_folder)]) == 0
    out = capsys.readouterr().out
    assert "leave-one-out" in out and "The start page" in out and "Tea number 0. tea" in out


def test_data_counts_duplicates_and_ties_and_keeps_them(tmp_path: Path, capsys: Capture) -> None:
    lines = ["a,x,5", "a,x,5", "b,y,5", "a,y,5", "a,x,5", "a,x,9", "b,x,5", "b,y,6"]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    found = json_of(capsys, "data", str(tmp_path))
    assert (found["events"], found["duplicate_events"], found["tied_events"]) == (8, 2, 4)
    assert main(["data", str(tmp_path)]) == 0
    assert "duplicate events" in capsys.readouterr().out


def test_data_saves_what_it_checked(shop_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    first = json_of(capsys, "data", str(shop_folder), "--save", str(tmp_path / "kept"))
    again = json_of(capsys, "data", str(tmp_path / "kept"))
    assert again == first


@pytest.mark.parametrize(
    ("events", "items", "says"),
    [
        ("user,item\na,x\n", None, "no column 'timestamp'"),
        ("user,item,timestamp\na,x,soon\n", None, "line 2"),
        ("user,item,timestamp,rating\na,x,1,good\n", None, "line 2, column 'rating': 'good' is not a number"),
        ("", None, "empty"),
        ("user,item,timestamp\n", None, "it has a header and no rows"),
        ("user,item,timestamp\na,x\n", None, "row 2 (the header counts): 2 values where the header has 3"),
        ("user,item,timestamp\na,y,1\n", "item,title\nx,X\n", "'y' is not in"),
        ("user,item,timestamp\na,x,1\n", "item,title\nx,X\nx,Y\n", "there twice"),
        ("user,item,timestamp,pos\na,x,9,1\na,y,2,2\n", None, "timestamps out of order"),
    ],
)
def test_bad_data_is_one_line(events: str, items: str | None, says: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "interactions.csv").write_text(events)
    if items:
        (tmp_path / "items.csv").write_text(items)
    assert says in error_of(capsys, "data", str(tmp_path))
    assert says in error_of(capsys, "fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("rating", ["", "5"])
def test_data_of_which_nobody_has_enough_is_described_but_not_fitted(
    rating: str, tmp_path: Path, capsys: Capture
) -> None:
    lines = [f"{user},{item},{day},{rating}" for user in "abc" for day, item in enumerate("xy")]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp,rating", *lines]) + "\n")
    found = json_of(capsys, "data", str(tmp_path))
    assert found["users"] == 3 and "has none" in found["splits"]["leave-one-out"]["error"]
    ask = ("fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "leave-one-out needs users with 3 events" in error_of(capsys, *ask)
    with (tmp_path / "interactions.csv").open("a") as more:
        more.writelines(f"{user},z,9,{rating}\n" for user in "abc")
    assert "no user of" in (said := error_of(capsys, *ask)) and "2 events left to train on" in said
    assert not (tmp_path / "out.work" / "done" / "data").exists()  # the next fit reads the mended data


@pytest.mark.parametrize(("name", "says"), [("interactions.csv.gz", "cut off"), ("interactions.parquet", "cut off")])
def test_a_truncated_data_file_is_one_line(name: str, says: str, tmp_path: Path, capsys: Capture) -> None:
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"user,item,timestamp\n" + b"a,x,1\n" * 999))
    else:
        parquet.write_table(pa.table({"user": ["a"] * 9, "item": ["x"] * 9, "timestamp": [1] * 9}), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    for ask in (("data", str(tmp_path)), ("fit", "--data", str(tmp_path), "--out", str(tmp_path / "out"))):
        line = error_of(capsys, *ask)
        assert says in line and name in line
