"""A language model's reply -> Instruction, or None: the one gate between generated text and the store.

A backend with a grammar engine returns exactly one JSON object; others wrap it in prose or code fences, or stop in
the middle. The first object that follows the schema wins; a reply without one is invalid and the caller counts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from genrec.contracts import Instruction
from genrec.instructions.schema import violation
from genrec.instructions.text import clean

LONGEST_REPLY = 8_000  # characters looked at; a schema-bound reply has a few hundred


def parse(text: str, schema: Mapping[str, Any]) -> Instruction | None:
    """The first JSON object in `text` that follows `schema`, as an Instruction without provenance, else None.

    The schema must have the properties situation, intents (a list) and look_for. Strings are cleaned as untrusted
    text, since the model may repeat what a title told it, and tidied as small models need it: the word that the
    length bound cut in two is dropped, and so is every repetition in a list ("drama, drama and drama" is "drama").
    A reply in which a field says nothing then is invalid.
    """
    properties = schema["properties"]
    for value in objects(text[:LONGEST_REPLY]):
        if violation(value, schema) is None:
            situation = _tidy(value["situation"], properties["situation"])
            look_for = _tidy(value["look_for"], properties["look_for"])
            tidied = (_tidy(intent, properties["intents"]["items"]) for intent in value["intents"])
            intents = tuple(dict.fromkeys(filter(None, tidied)))
            if situation and look_for and intents:
                return Instruction(situation=situation, intents=intents, look_for=look_for)
    return None


def objects(text: str) -> Iterator[Any]:
    """The JSON values in a text that begin with a brace and are whole, in order."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


_MARKS = " ,;:-/.'("
_FIRST = " ,;:-/."  # a title may begin with the others: "'Til There Was You"


def _tidy(text: str, schema: Mapping[str, Any]) -> str:
    """Cleaned text without a cut last word, repetitions or marks at the end; "" where no letter or digit is left."""
    words = clean(text, 4 * len(text) + 4)
    if len(text) >= schema.get("maxLength", len(text) + 1) and " " in words:
        words = words[: words.rfind(" ")]
    parts = re.split(r"(,? and |, )", words.lstrip(_FIRST).rstrip(_MARKS))
    kept, seen = "", {""}
    for i in range(0, len(parts), 2):
        part = parts[i].lstrip(_FIRST).rstrip(_MARKS)
        if part.casefold() not in seen:
            seen.add(part.casefold())
            kept += (parts[i - 1] if kept else "") + part
    kept = re.sub(r"(?:\s+(?:and|or|with|of|the|a|for|about))+$", "", kept)
    return kept if any(c.isalnum() for c in kept) else ""
