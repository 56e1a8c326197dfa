"""A data set on disk: three Parquet files and a manifest, as bundles keep it. Whole or absent, never pickle.

The manifest is written last and holds the files' digests: without it, or with a file that does not match it,
nothing is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from genrec.data.dataset import Catalog, Dataset, Sequences
from genrec.errors import GenrecError
from genrec.io import atomic, check_shape, read_json, sha256, write_json

MANIFEST = "dataset.json"
FORMAT = 1
SHAPE = {"name": str, "fields": list, "scenarios": list, "notes": dict, "sha256": dict}
ATTRIBUTES = pa.list_(pa.struct({"name": pa.string(), "value": pa.string()}))
FILES = ("catalog.parquet", "users.parquet", "events.parquet")


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Writes a data set into a folder, over an older one if there is one."""
    s = dataset.sequences
    (folder / MANIFEST).unlink(missing_ok=True)
    tables = (
        dataset.catalog.table,
        pa.table(
            {
                "user": pa.array(s.users, pa.string()),
                "events": pa.array(s.lengths.astype(np.int64)),
                "attributes": pa.array([_structs(a) for a in s.attributes or [()] * len(s)], ATTRIBUTES),
            }
        ),
        pa.table({"item": s.items, "time": s.times, "weight": s.weights, "rating": s.ratings}),
    )
    for file, table in zip(FILES, tables, strict=True):
        with atomic(folder / file) as temporary:
            pa.parquet.write_table(table, temporary, compression="zstd")
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "name": dataset.name,
            "fields": list(dataset.catalog.fields),
            "scenarios": list(dataset.scenarios),
            "notes": dataset.notes,
            "sha256": {file: sha256(folder / file) for file in FILES},
        },
    )


def read_dataset(folder: Path) -> Dataset:
    """Reads what save_dataset wrote. Raises GenrecError when it is missing, cut off, changed, or of another format."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GenrecError(f"{folder / MANIFEST} is not a data set of format {FORMAT}; make it again with this version")
    check_shape(folder / MANIFEST, manifest, SHAPE)
    for file in FILES:
        path = folder / file
        if not path.is_file():
            raise GenrecError(f"{path} is missing; make the data set again")
        if sha256(path) != manifest["sha256"].get(file):
            raise GenrecError(f"{path} does not match its checksum (cut off or changed); make the data set again")
    catalog, users, events = (pa.parquet.read_table(folder / file) for file in FILES)
    sequences = Sequences(
        users=users["user"].to_pylist(),
        offsets=np.concatenate([[0], np.cumsum(users["events"].to_numpy())]).astype(np.int64),
        items=events["item"].to_numpy(),
        times=events["time"].to_numpy(),
        weights=events["weight"].to_numpy(),
        ratings=events["rating"].to_numpy(),
        attributes=_attributes(users),
    )
    return Dataset(
        name=str(manifest["name"]),
        catalog=Catalog(catalog, tuple(manifest["fields"])),
        sequences=sequences,
        scenarios=tuple(manifest["scenarios"]),
        notes=dict(manifest["notes"]),
    )


def _structs(attributes: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in attributes]


def _attributes(users: pa.Table) -> list[tuple[tuple[str, str], ...]]:
    """What every user's row says; empty where none says anything, or the file is from before attributes were kept."""
    if "attributes" not in users.column_names:
        return []
    found = [tuple((a["name"], a["value"]) for a in row) for row in users["attributes"].to_pylist()]
    return found if any(found) else []
