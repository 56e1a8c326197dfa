"""Files in: every kind gives the same table, and every broken one a clear line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.data.readers import SHOWN, read_table, shown
from genrec.errors import GenrecError

CSV = 'user,item,title\n1,007,"Salt, ""fine"""\n2,NA,\n'
TSV = 'user\titem\ttitle\n1\t007\tSalt, "fine"\n2\tNA\t\n'
JSONL = '{"user": "1", "item": "007", "title": "Salt, \\"fine\\""}\n\n{"user": "2", "item": "NA", "title": ""}\n'
ROWS = [{"user": "1", "item": "007", "title": 'Salt, "fine"'}, {"user": "2", "item": "NA", "title": ""}]


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("name", "text"), [("t.csv", CSV), ("t.tsv", TSV), ("t.jsonl", JSONL), ("t.json", JSONL)])
def test_every_text_kind_gives_the_same_rows(tmp_path: Path, name: str, text: str, ending: str) -> None:
    raw = read_table(write(tmp_path / (name + ending), text))
    assert raw.table.to_pylist() == ROWS


@pytest.mark.parametrize("name", ["t.parquet", "t.pq", "t.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "plain")
    assert read_table(write(tmp_path / name, (tmp_path / "plain").read_bytes())).table.to_pylist() == ROWS


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    raw = read_table(write(tmp_path / "t.csv", b"\xef\xbb\xbfuser,item\r\n1,a\r\n"))
    assert raw.table.to_pylist() == [{"user": "1", "item": "a"}]


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    raw = read_table(write(tmp_path / "t.tsv", 'item\ttitle\n1\t"12 Angry Men\n2\tb\n'))
    assert raw.table["title"].to_pylist() == ['"12 Angry Men', "b"]


def test_lines_are_those_an_editor_shows(tmp_path: Path) -> None:
    raw = read_table(write(tmp_path / "t.csv", 'item,title\n1,"two\nlines"\n\n2,b\n3,c\n'))
    assert [raw.where(i) for i in range(3)] == ["line 2", "line 5", "line 6"]
    raw = read_table(write(tmp_path / "t.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))
    assert [raw.where(i) for i in range(2)] == ["line 2", "line 4"]


def test_rows_of_parquet_count_from_one(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").where(1) == "row 2"


def test_json_column_of_mixed_types_becomes_text(tmp_path: Path) -> None:
    raw = read_table(write(tmp_path / "t.jsonl", '{"a": 1, "b": 1}\n{"a": 2, "b": "x"}\n{"a": 3, "b": [1]}\n'))
    assert raw.table.to_pydict() == {"a": [1, 2, 3], "b": ["1", "x", "[1]"]}


def test_json_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "t.jsonl", '{"a": "x\\ud800y"}\n')).table["a"].to_pylist() == ["x?y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv is empty"),
        ("t.csv", b"\xef\xbb\xbf\n", "t.csv is empty"),
        ("t.csv", b"user,item\n", "is empty: it has a header and no rows"),
        ("t.jsonl.gz", b"", "is empty"),
        ("t.csv", b"user,item\n1,a\n1,a,b\n", r"row 3 \(the header counts\): 3 values where the header has 2: '1,a,b'"),
        ("t.csv", b"user,user\n1,a\n", "'user' appears twice"),
        ("t.csv", b'user,item\n1,a\n2,"b\n3,c\n', "line 3: a quote that is not closed"),
        ("t.csv", b"user,item\n1,\xff\xfe\n", "is not UTF-8"),
        ("t.csv", b"us\xffer,item\n1,2\n", "is not UTF-8"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', 'line 2: not valid JSON: \'{"a":'),
        ("t.jsonl", b'[{"a": 1}]\n', "line 1: one JSON object per line"),
        ("t.jsonl", b"[" * 100000, "line 1: not valid JSON"),
        ("t.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("t.xlsx", b"x", "unknown kind of file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(GenrecError, match=message) as caught:
        read_table(write(tmp_path / name, content))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GenrecError, match=r"no\.csv is missing"):
        read_table(tmp_path / "no.csv")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(GenrecError, match="cannot read"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [gzip.compress(CSV.encode())[:-12], b"not gzip at all"])
def test_gzip_cut_off(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv.gz").write_bytes(content)
    with pytest.raises(GenrecError, match="not a complete gzip file"):
        read_table(tmp_path / "t.csv.gz")


def test_parquet_cut_off(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GenrecError, match="it may be cut off"):
        read_table(tmp_path / "t.parquet")


def test_shown_is_bounded_and_printable() -> None:
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(shown("x" * 10_000)) == SHOWN and len(shown("\x00" * 10_000)) == SHOWN
