"""Versioned prompt templates with their output schemas; `python -m prompts NAME` shows one filled in.

`NAME.md` holds `recent: N`, `sentences: N` and `proposals: N` (how many history items and how much of the tools'
evidence it shows), notes for people, and then the chat: `## system`, `## user` and `## assistant` sections in order.
The first turns are examples; placeholders like {{history}} stand in the last turn alone, so all that comes before is
the same for everyone. `NAME.schema.json` is the schema of the reply. `anchors/` holds the prompts that describe an
item (SARM's anchors).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError
from genrec.instructions.context import FIELDS, Chat
from genrec.instructions.schema import check_schema, violation
from genrec.io import read_json

FOLDER = Path(__file__).parent
NEEDS = ("situation", "intents", "look_for")
ANCHOR_FIELDS = ("point", "theme", "topic", "audience", "format", "scene")  # genrec.tools.sarm.anchors.FIELDS
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptTemplate:
    """A chat with placeholders in its last turn.

    version: name and a hash of the two files, so that an edited prompt makes old instructions stale by itself.
    recent, sentences, proposals: how many of the last history items, of the tools' sentences and of their proposals it
    shows.
    schema: JSON Schema of the reply. turns: (role, text).
    """

    name: str
    version: str
    recent: int
    sentences: int
    proposals: int
    schema: Mapping[str, Any]
    turns: tuple[tuple[str, str], ...]

    @property
    def asks(self) -> frozenset[str]:
        """The placeholders of the last turn."""
        return frozenset(_PLACEHOLDER.findall(self.turns[-1][1]))

    def fill(self, values: Mapping[str, str]) -> Chat:
        """The chat with `values` in place of the placeholders, once: what looks like a placeholder in a value stays.

        A line whose placeholders are all empty is left out. Raises KeyError for a placeholder without a value.
        """
        role, text = self.turns[-1]
        lines = []
        for line in text.split("\n"):
            names = _PLACEHOLDER.findall(line)
            if not names or any(values[name] for name in names):
                lines.append(_PLACEHOLDER.sub(lambda match: values[match[1]], line))
        return [{"role": r, "content": t} for r, t in self.turns[:-1]] + [{"role": role, "content": "\n".join(lines)}]


def names() -> list[str]:
    """The templates that exist."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


@cache
def load(name: str) -> PromptTemplate:
    """The template `name`, checked. Raises GenrecError where it is unknown or its files are not as written above."""
    if name not in names():
        raise GenrecError(f"unknown prompt {name!r}; there are: {', '.join(names())}")
    return read(FOLDER / f"{name}.md")


@cache
def anchor(name: str = "anchor_v2") -> PromptTemplate:
    """The prompt that describes an item, checked. Raises GenrecError where it is unknown."""
    path = FOLDER / "anchors" / f"{name}.md"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.md")))
        raise GenrecError(f"unknown anchor prompt {name!r}; there are: {there}")
    return read(path, ("title", "kinds", "text"), ANCHOR_FIELDS)


def read(path: Path, fields: tuple[str, ...] = FIELDS, needs: tuple[str, ...] = NEEDS) -> PromptTemplate:
    """The template in `path`, with the schema from the file of the same name that ends in .schema.json.

    fields: placeholders it may have; needs: properties its schema must have."""
    text, schema_path = path.read_text(encoding="utf-8"), path.with_suffix(".schema.json")
    schema = read_json(schema_path)
    check_schema(schema, str(schema_path))
    missing = set(needs) - set(schema.get("properties", ()))
    if missing:
        raise GenrecError(f"{schema_path} has no property {min(missing)!r}")
    head, *sections = re.split(r"^## (\w+)\n", text, flags=re.M)
    limits = re.match(r"recent: (\d+)\nsentences: (\d+)\nproposals: (\d+)\n", head)
    turns = tuple((role, body.strip()) for role, body in zip(sections[::2], sections[1::2], strict=True))
    if limits is None:
        raise GenrecError(f"{path}: it must begin with 'recent: N', 'sentences: N' and 'proposals: N'")
    if not turns or turns[-1][0] != "user" or any(role not in _ROLES for role, _ in turns):
        raise GenrecError(f"{path}: sections must be system, user or assistant, and the last one user")
    for role, body in turns[:-1]:
        if _PLACEHOLDER.search(body):
            raise GenrecError(f"{path}: placeholders belong into the last turn, or no prefix can be shared")
        if role == "assistant" and (wrong := _example_violation(body, schema)):
            raise GenrecError(f"{path}: an example does not follow the schema: {wrong}")
    unknown = set(_PLACEHOLDER.findall(turns[-1][1])) - set(fields)
    if unknown:
        raise GenrecError(f"{path}: unknown placeholder {{{{{min(unknown)}}}}}; there are: {', '.join(fields)}")
    digest = hashlib.sha256((text + json.dumps(schema, sort_keys=True)).encode()).hexdigest()[:8]
    return PromptTemplate(
        path.stem, f"{path.stem}+{digest}", int(limits[1]), int(limits[2]), int(limits[3]), schema, turns
    )


def _example_violation(body: str, schema: Mapping[str, Any]) -> str | None:
    try:
        return violation(json.loads(body), schema, "example")
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
