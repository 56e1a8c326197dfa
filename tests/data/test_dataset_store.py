"""A data set on disk: what was saved is what is read, and a damaged folder says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.data import Dataset, from_arrow, read_dataset, save_dataset
from genrec.data.store import FILES, MANIFEST
from genrec.errors import GenrecError
from genrec.io import sha256


@pytest.fixture
def data() -> Dataset:
    return from_arrow(
        pa.table(
            {
                "user": ["ü", "v", "v"],
                "item": ["a", "b", "a"],
                "timestamp": [1.5, 2, 3],
                "rating": [4.0, None, 2.0],
                "weight": [1.0, 2.0, 0.5],
            }
        ),
        pa.table({"item": ["a", "b"], "title": ["Salt", ""], "category": [["X", "Y"], []], "brand": ["OPI", ""]}),
        name="Läden/1",
        users=pa.table({"user": ["v", "x", "w"], "plan": ["free", None, "free"]}),
    )


def test_round_trip(data: Dataset, tmp_path: Path) -> None:
    save_dataset(data, tmp_path / "d")
    back = read_dataset(tmp_path / "d")
    assert back.catalog.table.equals(data.catalog.table) and back.catalog.fields == ("brand",)
    assert (back.name, back.scenarios, back.notes) == (data.name, data.scenarios, data.notes)
    assert back.sequences.users == data.sequences.users
    assert back.sequences.attributes == data.sequences.attributes == [(), (("plan", "free"),)]
    for name in ("offsets", "items", "times", "weights", "ratings"):
        ours, theirs = getattr(data.sequences, name), getattr(back.sequences, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=True), name
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == sorted([*FILES, MANIFEST])


def test_a_folder_from_before_attributes_were_kept(data: Dataset, tmp_path: Path) -> None:
    save_dataset(data, tmp_path)
    users = pq.read_table(tmp_path / "users.parquet").drop_columns("attributes")
    pq.write_table(users, tmp_path / "users.parquet")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["sha256"]["users.parquet"] = sha256(tmp_path / "users.parquet")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert read_dataset(tmp_path).sequences.attributes == []


def test_users_without_events_stay(data: Dataset, tmp_path: Path) -> None:
    from dataclasses import replace

    emptied = replace(data, sequences=data.sequences.keep(np.array([False, True, True])))
    save_dataset(emptied, tmp_path)
    assert read_dataset(tmp_path).sequences.lengths.tolist() == [0, 2]


def test_saving_twice_gives_the_same_bytes(data: Dataset, tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        save_dataset(data, tmp_path / folder)
    for file in (*FILES, MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("file", FILES)
def test_cut_off_or_missing_file(data: Dataset, tmp_path: Path, file: str) -> None:
    save_dataset(data, tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GenrecError, match=f"{file} does not match its checksum"):
        read_dataset(tmp_path)
    path.unlink()
    with pytest.raises(GenrecError, match=f"{file} is missing"):
        read_dataset(tmp_path)


def test_manifest_missing_cut_off_or_of_another_format(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(GenrecError, match=r"dataset\.json is missing"):
        read_dataset(tmp_path)
    save_dataset(data, tmp_path)
    manifest = tmp_path / MANIFEST
    whole = manifest.read_text()
    manifest.write_text(whole[:50])
    with pytest.raises(GenrecError, match="not valid JSON"):
        read_dataset(tmp_path)
    manifest.write_text(json.dumps(json.loads(whole) | {"format": 2}))
    with pytest.raises(GenrecError, match="not a data set of format 1"):
        read_dataset(tmp_path)
    for change, says in (
        ([], "not a data set of format 1"),
        (json.loads(whole) | {"sha256": []}, "'sha256' is not of type dict"),
        ({k: v for k, v in json.loads(whole).items() if k != "fields"}, "'fields' is missing"),
    ):
        manifest.write_text(json.dumps(change))
        with pytest.raises(GenrecError, match=says):
            read_dataset(tmp_path)


def test_a_save_that_dies_leaves_nothing_readable(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dataset(data, tmp_path)

    def die(table: pa.Table, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pa.parquet, "write_table", die)
    with pytest.raises(KeyboardInterrupt):
        save_dataset(data, tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(GenrecError, match="is missing"):
        read_dataset(tmp_path)
