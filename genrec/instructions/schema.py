"""The part of JSON Schema that our output schemas use, checked by hand: no dependency, every keyword known.

Supported: type (object, string, array), properties, required, additionalProperties false, minLength, maxLength,
items, minItems, maxItems, description. A schema with anything else is refused when it is loaded, so that what is
checked here and what an engine's grammar enforces cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genrec.errors import GenrecError

_KEYWORDS = {
    "object": {"type", "description", "properties", "required", "additionalProperties"},
    "array": {"type", "description", "items", "minItems", "maxItems"},
    "string": {"type", "description", "minLength", "maxLength"},
}


def check_schema(schema: Any, where: str) -> None:
    """Raises GenrecError unless `schema` uses only the supported keywords. where: named in the message."""
    if not isinstance(schema, Mapping) or schema.get("type") not in _KEYWORDS:
        raise GenrecError(f"{where}: a schema needs a type, one of object, array or string")
    kind = schema["type"]
    unknown = sorted(set(schema) - _KEYWORDS[kind])
    if unknown:
        raise GenrecError(f"{where}: unsupported schema keyword {unknown[0]!r} for a {kind}")
    if kind == "array":
        check_schema(schema.get("items"), f"{where}.items")
    if kind == "object":
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or schema.get("additionalProperties") is not False:
            raise GenrecError(f"{where}: an object needs properties, and additionalProperties false")
        if set(schema.get("required", ())) != set(properties):
            raise GenrecError(f"{where}: every property must be required")
        for name, inner in properties.items():
            check_schema(inner, f"{where}.{name}")


def violation(value: Any, schema: Mapping[str, Any], where: str = "reply") -> str | None:
    """What is wrong with `value`, as one phrase, or None when it follows the schema (see check_schema)."""
    kind = schema["type"]
    if kind == "string":
        if not isinstance(value, str):
            return f"{where} is not a string"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return f"{where} has {len(value)} characters"
        return None
    if kind == "array":
        if not isinstance(value, list):
            return f"{where} is not a list"
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} entries"
        parts = [(f"{where}[{i}]", v, schema["items"]) for i, v in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{where} is not an object"
        properties = schema["properties"]
        if set(value) != set(properties):
            wrong = sorted(set(value) ^ set(properties))[0]
            return f"{where}.{wrong[:40]} is {'missing' if wrong in properties else 'not asked for'}"
        parts = [(f"{where}.{name}", value[name], inner) for name, inner in properties.items()]
    return next((w for name, v, inner in parts if (w := violation(v, inner, name)) is not None), None)
