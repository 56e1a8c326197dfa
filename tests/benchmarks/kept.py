"""Finished parts of a comparison, and what made them: no run takes another's results for its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from genrec.data import Dataset
from genrec.errors import GenrecError
from genrec.io import read_json, write_json


def fingerprint(dataset: Dataset) -> str:
    """The hex digest of all events and of the items' identifiers and texts."""
    s, found = dataset.sequences, hashlib.sha256()
    for array in (s.offsets, s.items, s.times, s.weights, s.ratings):
        found.update(np.ascontiguousarray(array).tobytes())
    found.update("\n".join([*dataset.catalog.items, *dataset.catalog.texts]).encode("utf-8"))
    return found.hexdigest()


def claim(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether this part is finished. Raises GenrecError where the folder holds one of another identity (plain JSON)."""
    path = folder / "identity.json"
    if not path.is_file():
        write_json(path, identity)
    if changed := differing(read_json(path), identity):
        raise GenrecError(f"{folder} was made with other {', '.join(changed)}; take another --work or remove it")
    return (folder / "done.json").is_file()


def check(folders: list[Path], identity: dict[str, Any]) -> None:
    """Raises GenrecError where one of the folders was made with other values of these fields."""
    for folder in folders:
        found = read_json(folder / "identity.json")
        if changed := differing({name: found.get(name) for name in identity}, identity):
            raise GenrecError(f"{folder} was made with other {', '.join(changed)}; the table needs the same for all")


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names under which two objects differ; of two objects inside them, the names inside."""
    found: list[str] = []
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differing(x, y)
        elif x != y:
            found.append(name)
    return found
