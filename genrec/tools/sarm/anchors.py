"""Semantic anchors (SARM, papers/tools.md 2.1): six short fields per item, written from its text, and their store.

The paper has a multimodal model write them once a day from frames, speech and comments. Here a language model writes
them from the item's text (serving/anchors.py runs the batches; prompts/anchors has the prompt), and where there is no
model, or its reply breaks the schema, a template fills them from the catalogue's own fields. Which of the two wrote an
anchor is kept with it.

All text is a stranger's: it is cleaned and bounded here, whoever wrote it. The store is a file of JSON lines that is
appended to a chunk at a time; a chunk that a kill cut off is not read, and the next run writes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions.schema import violation
from genrec.instructions.text import clean
from genrec.io import UNWRITABLE

FIELD_BYTES = 60  # of one field
TEXT_BYTES = 300  # of the item's text, in a prompt
TEMPLATE = "template"
WRITER = "anchor-v1"  # of the template; raised when it changes


@dataclass(frozen=True)
class Anchor:
    """The six fields, each one cleaned line, perhaps empty; source: the hash of what it was written from; model: who
    wrote it."""

    point: str = ""
    theme: str = ""
    topic: str = ""
    audience: str = ""
    format: str = ""
    scene: str = ""
    source: str = ""
    model: str = TEMPLATE

    @property
    def values(self) -> tuple[str, ...]:
        return self.point, self.theme, self.topic, self.audience, self.format, self.scene

    @property
    def text(self) -> str:
        """One line for the encoder: the fields that say something, in order, each once."""
        return " ; ".join(dict.fromkeys(v for v in self.values if v))


FIELDS = tuple(f.name for f in fields(Anchor))[:6]


def item_values(catalog: Catalog, row: int) -> dict[str, str]:
    """What a prompt is told about an item: title, kinds and other text, cleaned and bounded."""
    rest = [str(catalog.table[f][row].as_py() or "") for f in catalog.fields]
    return {
        "title": f'"{clean(catalog.title(row), 2 * FIELD_BYTES)}"',
        "kinds": clean(", ".join(catalog.categories[row]), TEXT_BYTES),
        "text": clean(". ".join(r for r in rest if r), TEXT_BYTES),
    }


def source_hash(catalog: Catalog, row: int, version: str) -> str:
    """sha256 (hex, 16 digits) of an item's text and of what writes the anchor: another one means stale."""
    parts = [version, catalog.title(row), catalog.categories[row], catalog.texts[row]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def template_anchor(catalog: Catalog, row: int) -> Anchor:
    """The fallback: the title is the point of interest, the narrowest category the theme, all of them the topic, and
    the first further fields stand for format and scene. It invents nothing, so audience stays empty."""
    kinds = catalog.categories[row]
    rest = [str(catalog.table[f][row].as_py() or "") for f in catalog.fields]
    rest = [r for r in rest if r and r != catalog.title(row)] + ["", ""]
    found = (catalog.title(row), kinds[-1] if kinds else "", ", ".join(kinds), "", rest[0], rest[1])
    return anchor_of(dict(zip(FIELDS, found, strict=True)), source_hash(catalog, row, WRITER))


def anchor_of(values: Mapping[str, Any], source: str, model: str = TEMPLATE) -> Anchor:
    """An anchor of six texts, cleaned, without the comma at the end that a small model leaves."""
    texts = {name: clean(str(values.get(name, "")), FIELD_BYTES).rstrip(" ,;:") for name in FIELDS}
    return Anchor(**texts, source=source, model=model)


def parse_anchor(reply: str, schema: Mapping[str, Any], source: str, model: str) -> Anchor | None:
    """A model's reply as an anchor: the first JSON object that follows the schema and says something, else None."""
    from genrec.instructions.parse import LONGEST_REPLY, objects

    for value in objects(reply[:LONGEST_REPLY]):
        if violation(value, schema) is None and (found := anchor_of(value, source, model)).text:
            return found
    return None


class AnchorStore:
    """Anchors by item identifier, in a file of JSON lines; of several for one item the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[str, Anchor]:
        """Raises GenrecError for a line that is no anchor; a last line without its end is passed over."""
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what has no line end was cut off by a kill
        out: dict[str, Anchor] = {}
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                stored = anchor_of(value, str(value["source"]), str(value["model"]))  # it may have been edited
                out[str(value["item"])] = stored
            except (ValueError, TypeError, KeyError):
                raise GenrecError(f"{self.path}, line {number}, is no anchor; remove the line or the file") from None
        return out

    def append(self, rows: Iterable[tuple[str, Anchor]]) -> None:
        """Adds (item, anchor) rows and brings them to the disk; a torn last line is cut off first. Raises GenrecError
        where the file cannot be written."""
        text = "".join(json.dumps({"item": item} | vars(anchor), ensure_ascii=False) + "\n" for item, anchor in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                end = self._whole(file)
                try:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)  # nothing half-written
                    raise
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise GenrecError(f"cannot write {self.path}: {error.strerror}; free some space") from error
            raise

    @staticmethod
    def _whole(file: Any) -> int:
        """Cuts off a line without end; returns the size."""
        size = int(file.seek(0, os.SEEK_END))
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < size:
            os.ftruncate(file.fileno(), end)
        return end


def stored_anchors(path: Path) -> dict[str, Anchor]:
    """A store that is meant to be there. Raises GenrecError where it is missing or empty."""
    found = AnchorStore(path).all()
    if not found:
        raise GenrecError(f"{path} holds no anchors; write them with `genrec rank sarm anchors`")
    return found


def anchors_for(catalog: Catalog, stored: Mapping[str, Anchor] | None = None) -> list[Anchor]:
    """One anchor per row: the stored one, else the template's."""
    stored = stored or {}
    return [stored.get(item) or template_anchor(catalog, row) for row, item in enumerate(catalog.items)]


def shuffled(anchors: Sequence[Anchor], seed: int = 0) -> list[Anchor]:
    """The control: every item with another's anchor, the same for training and test."""
    import numpy as np

    if len(anchors) < 2:
        return list(anchors)
    ring = np.random.default_rng(seed).permutation(len(anchors))
    out = list(anchors)
    for at, other in zip(ring, np.roll(ring, 1), strict=True):  # a ring: no item keeps its own
        out[at] = replace(anchors[other])
    return out
