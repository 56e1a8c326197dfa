"""Folders, files, Amazon's own JSON and the datasets package, all from tiny fixtures; nothing is fetched."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.data import Dataset, from_datasets, load_dataset, save_dataset
from genrec.errors import GenrecError

EVENTS = "user,item,timestamp\nu,a,1\nu,b,2\nv,b,3\n"
ITEMS = "item,title,category\na,Salt,Food|Spice\nb,Pan,Kitchen\n"


def summary(data: Dataset) -> tuple[object, ...]:
    s = data.sequences
    return data.catalog.table.to_pylist(), s.users, s.offsets.tolist(), s.items.tolist(), s.times.tolist()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "interactions.csv").write_text(EVENTS)
    (folder / "items.csv").write_text(ITEMS)
    (folder / "README.md").write_text("not data")
    return folder


def test_folder_of_two_csv_files(shop: Path) -> None:
    data = load_dataset(str(shop))
    assert data.name == "shop" and data.sequences.users == ["u", "v"]
    assert data.catalog.texts == ["Salt. Food, Spice", "Pan. Kitchen"]
    assert data.scenarios == ("home", "item", "search", "discovery")


def test_a_third_file_says_who_the_users_are(shop: Path) -> None:
    (shop / "users.csv").write_text("user,plan,mail\nv,free,v@x\nu,free,u@x\n")
    data = load_dataset(shop)
    assert data.sequences.attributes == [(("plan", "free"),)] * 2
    assert data.notes["attributes"] == "plan; left out: mail; of 2 of 2 users"
    (shop / "users.csv").write_text("user,plan\nv,free\nv,paid\n")
    with pytest.raises(GenrecError, match=r"users.csv: user 'v' is there twice, in line 2 and line 3"):
        load_dataset(shop)


def test_folder_in_other_kinds_is_the_same(shop: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    rows = pa.table({"user": ["u", "u", "v"], "item": ["a", "b", "b"], "timestamp": [1, 2, 3]})
    pq.write_table(rows, other / "interactions.parquet")
    items = [{"item": "a", "title": "Salt", "category": ["Food", "Spice"]}]
    items += [{"item": "b", "title": "Pan", "category": ["Kitchen"]}]
    (other / "catalog.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, items)).encode()))
    assert summary(load_dataset(other)) == summary(load_dataset(shop))


def test_one_file_derives_its_catalogue(shop: Path) -> None:
    data = load_dataset(shop / "interactions.csv")
    assert data.name == "interactions" and data.catalog.items == ["a", "b"] and data.catalog.titles == ["a", "b"]


def test_saved_folder_loads_again(shop: Path, tmp_path: Path) -> None:
    data = load_dataset(shop)
    save_dataset(data, tmp_path / "saved")
    assert summary(load_dataset(tmp_path / "saved")) == summary(data)


def test_errors_name_the_file_of_the_folder(shop: Path) -> None:
    (shop / "interactions.csv").write_text(EVENTS + "v,nowhere,4\n")
    with pytest.raises(GenrecError, match=r"interactions\.csv, line 5: item 'nowhere' is not in .*items\.csv"):
        load_dataset(shop)


def test_two_files_of_one_sort(shop: Path) -> None:
    (shop / "interactions.tsv").write_text(EVENTS.replace(",", "\t"))
    with pytest.raises(GenrecError, match=r"interactions\.csv and interactions\.tsv; keep one"):
        load_dataset(shop)


def test_folder_without_events(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(GenrecError, match=r"has no interactions\.\*.*there is: notes\.txt"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("source", ["ml100k", "no/such/folder", "amazon14:no/such/folder"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(GenrecError, match=r"^no (file or )?folder") as caught:
        load_dataset(source)
    assert ("Did you mean 'ml-100k'?" in str(caught.value)) == (source == "ml100k")


# --- Amazon 2014


def test_amazon_in_our_two_files(tmp_path: Path) -> None:
    tsv = "user\titem\ttimestamp\tpos\n1\t1\t86400\t0\n1\t2\t86400\t1\n"
    (tmp_path / "interactions.tsv.gz").write_bytes(gzip.compress(tsv.encode()))
    items = [{"item": i, "asin": f"B{i}", "title": f"T{i}", "brand": None, "categories": ["Makeup"]} for i in (1, 2)]
    items[0]["brand"] = "OPI"
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, items)).encode()))
    for source in (tmp_path, f"amazon14:{tmp_path}"):
        data = load_dataset(source)
        assert data.catalog.items == ["1", "2"] and data.catalog.fields == ("brand",)
        assert data.catalog.texts == ["T1. OPI. Makeup", "T2. Makeup"]
        assert data.sequences.items.tolist() == [0, 1]


@pytest.fixture
def amazon(tmp_path: Path) -> Path:
    reviews = [
        {"reviewerID": "A1", "asin": "B2", "helpful": [0, 1], "overall": 5.0, "unixReviewTime": 1390000000},
        {"reviewerID": "A1", "asin": "B1", "helpful": [0, 0], "overall": 2.0, "unixReviewTime": 1380000000},
        {"reviewerID": "A2", "asin": "B3", "helpful": [0, 0], "overall": 3.0, "unixReviewTime": 1370000000},
    ]
    meta = [
        "{'asin': 'B1', 'title': \"Tom &amp; Jerry's\", 'price': 1.5, 'categories': [['Beauty', 'Nails'], ['Gifts']]}",
        "{'asin': 'B9', 'title': __import__('os').getcwd()}",  # not reviewed: never parsed
        "{'asin': 'B2', 'brand': 'OPI', 'categories': [['Beauty']], 'related': {'also_bought': ['B1']}}",
    ]
    (tmp_path / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, reviews)).encode()))
    (tmp_path / "meta_Beauty.json.gz").write_bytes(gzip.compress("\n".join(meta).encode()))
    return tmp_path


def test_amazon_publishers_json(amazon: Path) -> None:
    data = load_dataset(f"amazon14:{amazon}")
    assert data.catalog.items == ["B2", "B1", "B3"]
    assert data.catalog.titles == ["B2", "Tom & Jerry's", "B3"]
    assert data.catalog.categories == [["Beauty"], ["Beauty", "Nails"], []]
    assert data.catalog.table["brand"].to_pylist() == ["OPI", "", ""]
    assert data.sequences.users == ["A1", "A2"] and data.sequences.items.tolist() == [1, 0, 2]
    assert data.sequences.ratings.tolist() == [2.0, 5.0, 3.0] and data.sequences.weights.tolist() == [1.0] * 3
    assert "favourites" in data.scenarios


def test_amazon_without_metadata(amazon: Path) -> None:
    (amazon / "meta_Beauty.json.gz").unlink()
    assert load_dataset(amazon).catalog.titles == ["B2", "B1", "B3"]


def test_amazon_metadata_is_data_never_code(amazon: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    line = f"{{'asin': 'B1', 'title': open({str(marker)!r}, 'w').write('x')}}"
    (amazon / "meta_Beauty.json.gz").write_bytes(gzip.compress(line.encode()))
    with pytest.raises(GenrecError, match='line 1: neither JSON nor a Python literal: "'):
        load_dataset(amazon)
    assert not marker.exists()


def test_amazon_two_categories_in_one_folder(amazon: Path) -> None:
    (amazon / "reviews_Toys_5.json").write_text("{}")
    with pytest.raises(GenrecError, match="2 reviews_"):
        load_dataset(amazon)


# --- the datasets package


def test_datasets_objects(shop: Path) -> None:
    import datasets

    events = datasets.Dataset.from_dict({"user": ["u", "u", "v"], "item": ["a", "b", "b"], "timestamp": [1, 2, 3]})
    items = datasets.Dataset.from_dict(
        {"item": ["a", "b"], "title": ["Salt", "Pan"], "category": [["Food", "Spice"], ["Kitchen"]]}
    )
    wanted = summary(load_dataset(shop))
    assert summary(from_datasets(events, items)) == wanted
    assert summary(from_datasets(datasets.DatasetDict(interactions=events, items=items))) == wanted
    users = datasets.Dataset.from_dict({"user": ["u", "v"], "plan": ["free", "free"]})
    told = from_datasets(datasets.DatasetDict(interactions=events, items=items, users=users))
    assert summary(told) == wanted and told.sequences.attributes_of(0) == (("plan", "free"),)
    joined = from_datasets(datasets.DatasetDict(train=events.select([0, 1]), test=events.select([2])))
    assert joined.sequences.items.tolist() == [0, 1, 1]
    assert from_datasets(events.select([2, 0])).sequences.users == ["v", "u"]  # a selection, not the whole table


def test_hub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    events = datasets.Dataset.from_dict({"user": ["u"], "item": ["a"], "timestamp": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=events))
    assert load_dataset("hf:owner/name").name == "owner-name"


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(GenrecError, match=r"^hf:owner/name cannot be loaded: Couldn't reach .* on the Hub; check"):
        load_dataset("hf:owner/name")
    assert logging.getLogger("huggingface_hub").level == before


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, genrec.data; print([m for m in ('torch', 'pandas', 'datasets', 'scipy') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
