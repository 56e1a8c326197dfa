from typing import Any

import pytest

from genrec.errors import GenrecError
from genrec.instructions.schema import check_schema, violation

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "minLength": 1, "maxLength": 5},
        "b": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": "x", "b": ["y"]}, None),
        ({"a": "12345", "b": ["", "y"]}, None),
        ([], "reply is not an object"),
        ("x", "reply is not an object"),
        (None, "reply is not an object"),
        ({"a": "x"}, "reply.b is missing"),
        ({"a": "x", "b": ["y"], "c": 1}, "reply.c is not asked for"),
        ({"a": 1, "b": ["y"]}, "reply.a is not a string"),
        ({"a": "", "b": ["y"]}, "reply.a has 0 characters"),
        ({"a": "123456", "b": ["y"]}, "reply.a has 6 characters"),
        ({"a": "x", "b": "y"}, "reply.b is not a list"),
        ({"a": "x", "b": []}, "reply.b has 0 entries"),
        ({"a": "x", "b": ["y"] * 3}, "reply.b has 3 entries"),
        ({"a": "x", "b": ["y", None]}, "reply.b[1] is not a string"),
    ],
)
def test_violation(value: Any, words: str | None) -> None:
    assert violation(value, SCHEMA) == words


def test_a_supported_schema_passes() -> None:
    before = repr(SCHEMA)
    check_schema(SCHEMA, "here")
    assert repr(SCHEMA) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "number"}, "needs a type"),
        ({"pattern": "x"}, "unsupported schema keyword 'pattern'"),
        ({"additionalProperties": True}, "additionalProperties false"),
        ({"required": ["a"]}, "every property must be required"),
        ({"properties": {"a": {"type": "string", "format": "date"}, "b": SCHEMA["properties"]["b"]}}, "here.a: unsup"),
        ({"properties": {"a": {"type": "array"}, "b": SCHEMA["properties"]["b"]}}, "here.a.items: a schema needs"),
    ],
)
def test_schema_drift_is_refused_with_its_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(GenrecError, match=words):
        check_schema(SCHEMA | change, "here")
