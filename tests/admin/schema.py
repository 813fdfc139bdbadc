"""A checker of the part of JSON Schema 2020-12 that our OpenAPI document uses, and of nothing else."""

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "enum": lambda value, limit: value in limit,
    "const": lambda value, limit: bool(value == limit),
    "minimum": lambda value, limit: not isinstance(value, int | float) or value >= limit,
    "maximum": lambda value, limit: not isinstance(value, int | float) or value <= limit,
    "exclusiveMinimum": lambda value, limit: not isinstance(value, int | float) or value > limit,
    "minLength": lambda value, limit: not isinstance(value, str) or len(value) >= limit,
    "maxLength": lambda value, limit: not isinstance(value, str) or len(value) <= limit,
    "pattern": lambda value, limit: not isinstance(value, str) or re.search(limit, value) is not None,
    "format": lambda value, limit: limit != "uuid" or not isinstance(value, str) or str(UUID(value)) == value,
}
TELLING = {"title", "description", "default", "contentEncoding"}
KNOWN = TELLING | {
    "$ref", "type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
    "anyOf", *LIMITS,
}  # fmt: skip


class Mismatch(Exception):
    """A value is not what its schema says."""


def check(value: Any, schema: Any, document: Any, where: str = "$") -> None:
    """Raise Mismatch unless a value is what a schema says; objects have no properties but those it names."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        check(value, resolved(schema["$ref"], document), document, where)
        return
    if "anyOf" in schema:
        if not any(fits(value, one, document) for one in schema["anyOf"]):
            raise Mismatch(f"{where}: {value!r} is none of those it may be")
        return
    for name in LIMITS.keys() & schema.keys():
        if not LIMITS[name](value, schema[name]):
            raise Mismatch(f"{where}: {value!r} breaks {name} {schema[name]}")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = tuple(kind for name in kinds for kind in TYPES[name])
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        raise Mismatch(f"{where}: {value!r} is no {kinds}")
    if isinstance(value, dict):
        _check_object(value, schema, document, where)
    elif isinstance(value, list):
        _check_array(value, schema, document, where)


def _check_object(value: dict[str, Any], schema: Any, document: Any, where: str) -> None:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
    if missing := set(schema.get("required", ())) - value.keys():
        raise Mismatch(f"{where}: without {missing}")
    for name, one in value.items():
        if name in properties:
            check(one, properties[name], document, f"{where}.{name}")
        elif isinstance(rest, dict):
            check(one, rest, document, f"{where}.{name}")
        elif not rest:
            raise Mismatch(f"{where}: with {name}")


def _check_array(value: list[Any], schema: Any, document: Any, where: str) -> None:
    first = schema.get("prefixItems", [])
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise Mismatch(f"{where}: {len(value)} items")
    for index, one in enumerate(value):
        rest = schema.get("items", {})
        if index >= len(first) and rest is False:
            raise Mismatch(f"{where}: more than {len(first)} items")
        check(one, first[index] if index < len(first) else rest, document, f"{where}[{index}]")


def fits(value: Any, schema: Any, document: Any) -> bool:
    """Whether `check` passes."""
    try:
        check(value, schema, document)
    except Mismatch:
        return False
    return True


def resolved(reference: str, document: Any) -> Any:
    """What a reference within the document leads to."""
    found = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found
