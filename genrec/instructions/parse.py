"""A language model's reply -> Instruction, or None: the one gate between generated text and the store.

A backend with a grammar engine returns exactly one JSON object; others wrap it in prose or code fences, or stop in
the middle. The first object that follows the schema wins; a reply without one is invalid and the caller counts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from genrec.contracts import Instruction
from genrec.instructions.schema import violation
from genrec.instructions.text import clean

LONGEST_REPLY = 8_000  # characters looked at; a schema-bound reply has a few hundred


def parse(text: str, schema: Mapping[str, Any]) -> Instruction | None:
    """The first JSON object in `text` that follows `schema`, as an Instruction without provenance, else None.

    The schema must have the properties situation, intents and look_for. Strings are cleaned as untrusted text: the
    model may repeat what a title told it. A string that fills its whole bound was cut by the grammar, so its broken
    last word is dropped. A reply whose strings hold nothing but spaces and marks is invalid.
    """
    for value in _objects(text[:LONGEST_REPLY]):
        if violation(value, schema) is None:
            bounds = {k: (v.get("items") or v).get("maxLength", 400) for k, v in schema["properties"].items()}
            situation = _tidy(value["situation"], bounds["situation"])
            look_for = _tidy(value["look_for"], bounds["look_for"])
            intents = tuple(dict.fromkeys(filter(None, (_tidy(i, bounds["intents"]) for i in value["intents"]))))
            if situation and look_for and intents:
                return Instruction(situation=situation, intents=intents, look_for=look_for)
    return None


def _objects(text: str) -> Iterator[Any]:
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _tidy(text: str, bound: int) -> str:
    """Cleaned text without the word that the bound cut in two and without trailing marks; "" if no letter is left."""
    words = clean(text, 4 * bound)
    if len(text) >= bound and " " in words:
        words = words[: words.rfind(" ")]
    words = words.strip(" ,;:-/.'(")
    return words if any(c.isalnum() for c in words) else ""
