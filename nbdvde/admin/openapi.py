"""The control interface as an OpenAPI 3.1 document, made from its routes and types.

`python -m nbdvde.admin.openapi > docs/openapi.json`
"""

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, get_type_hints

import msgspec

from nbdvde.admin import catalog, service, web
from nbdvde.admin.calls import End, Feed, Nothing, Query
from nbdvde.admin.messages import (
    AddExport,
    CopyRequest,
    DictionaryRequest,
    DiffRequest,
    Failure,
    Health,
    KeyRequest,
    OptimizeRequest,
    RemoveExport,
    ScrubRequest,
    VolumeRequest,
)
from nbdvde.version import VERSION

REQUESTS: dict[str, type] = {
    "/v1/exports/add": AddExport,
    "/v1/exports/remove": RemoveExport,
    "/v1/scrub": ScrubRequest,
    "/v1/optimize": OptimizeRequest,
    "/v1/import": CopyRequest,
    "/v1/export": CopyRequest,
    "/v1/snapshots/diff": DiffRequest,
    **{f"/v1/disks/{action}": VolumeRequest for action in ("create", "clone", "resize", "delete")},
    **{f"/v1/snapshots/{action}": VolumeRequest for action in ("create", "delete", "rollback")},
    **{f"/v1/dictionaries/{action}": DictionaryRequest for action in ("train", "replace", "remove")},
    **{f"/v1/keys/{action}": KeyRequest for action in ("add", "remove", "change")},
}
"""Bodies that the handlers of `service` take; those of the calls say it themselves."""
_DESCRIPTION = """The control interface of a running nbdvde server: HTTP/1.1, one request a connection.

It is answered at the control socket, a Unix socket of mode 0600 beside each image
(`curl --unix-socket disk.vde.ctl http://localhost/v1/status`), and what is marked `x-nbdvde-admin` also at the address
of `nbdvde serve --admin`: `read` by anybody who can connect, `change` where changes are allowed.

Answers of type `application/jsonl` are objects in lines: the last one is the result, or tells what failed; those before
it tell of progress or are part of it. Closing the connection cancels. In paths of files, bytes that are no text are
surrogates."""
_REF = "#/components/schemas/{name}"
Schema: TypeAlias = dict[str, Any]
References: TypeAlias = Mapping[type, Schema]


@dataclass(frozen=True, slots=True)
class _Route:
    path: str
    method: str
    identity: str
    text: str
    request: type | None
    answers: tuple[type, ...]
    """Types of the lines, of which the last is the result."""


@cache
def document() -> Schema:
    """The document."""
    routes = sorted(_routes(), key=lambda route: route.path)
    used = {kind for route in routes for kind in (route.request, *route.answers) if kind is not None}
    types = sorted(_all_types(used | {Failure, Health}), key=lambda kind: kind.__name__)
    found, components = msgspec.json.schema_components(types, ref_template=_REF)
    references = dict(zip(types, found, strict=True))
    for kind, reference in references.items():
        _describe(components[reference["$ref"].rpartition("/")[2]], kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nbdvde", "version": VERSION, "description": _DESCRIPTION},
        "servers": [{"url": "http://localhost", "description": "control socket, or address of the dashboard"}],
        "paths": {route.path: {route.method.lower(): _operation(route, references)} for route in routes},
        "components": {"schemas": dict(sorted(components.items()))},
    }


def _routes() -> Iterator[_Route]:
    for path, (method, handler) in service.handlers().items():
        answers = () if path in _SPECIAL else (get_type_hints(handler)["return"],)
        yield _Route(
            path, method, handler.__name__.strip("_"), inspect.getdoc(handler) or "", REQUESTS.get(path), answers
        )
    for call in catalog.CALLS:
        request = None if call.request is Nothing else call.request
        lines = (call.answer, End) if isinstance(call, Feed) else (call.answer,)
        text = inspect.getdoc(call.work) or ""
        yield _Route(f"/v1/{call.path}", call.method, call.path.replace("/", "_"), text, request, lines)


def _operation(route: _Route, references: References) -> Schema:
    operation: Schema = {"operationId": route.identity, "summary": " ".join(route.text.split())}
    if route.path in web.READABLE or route.path in web.CHANGES:
        operation["x-nbdvde-admin"] = "read" if route.path in web.READABLE else "change"
    if route.request is not None and issubclass(route.request, Query):
        operation["parameters"] = list(_parameters(route.request))
    elif route.request is not None:
        operation["requestBody"] = {"required": True, "content": _json(references[route.request])}
    special = _SPECIAL.get(route.path)
    operation["responses"] = {
        **(special(references) if special else {"200": _answer(route, references)}),
        "default": {"description": "What went wrong.", "content": _json(references[Failure])},
    }
    return operation


def _parameters(request: type[Query]) -> Iterator[Schema]:
    texts = _texts(request)
    for name in request.__struct_fields__:
        yield {"name": name, "in": "query", "description": texts[name], "schema": {"type": "string"}}


def _answer(route: _Route, references: References) -> Schema:
    schemas = [references[kind] for kind in route.answers]
    if len(schemas) == 1 and not route.answers[0].__name__.endswith("Line"):
        return {"description": "The result.", "content": _json(schemas[0])}
    lines = {"anyOf": [*schemas, references[Failure]]}
    content = {**_json(schemas[-1]), "application/jsonl": {"schema": lines}}
    return {"description": "Lines of this kind; as JSON when there is only one.", "content": content}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


_SPECIAL: dict[str, Callable[[References], Schema]] = {
    "/metrics": lambda _: {
        "200": {
            "description": "Text format 0.0.4 of Prometheus.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
    "/healthz": lambda references: {"200": {"description": "It is alive.", "content": _json(references[Health])}},
    "/readyz": lambda references: {
        "200": {"description": "It serves.", "content": _json(references[Health])},
        "503": {"description": "It does not, for the reasons given.", "content": _json(references[Health])},
    },
    "/v1/openapi.json": lambda _: {"200": {"description": "This document.", "content": _json({"type": "object"})}},
}
"""Answers that are not one type of ours."""


def _all_types(types: Iterable[type]) -> set[type]:
    """The structs that some types are made of, themselves included."""
    seen: set[type] = set()
    waiting: list[Any] = list(msgspec.inspect.multi_type_info(types))
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls in seen:
                continue
            seen.add(info.cls)
            waiting += [field.type for field in info.fields]
        for name in ("item_type", "key_type", "value_type"):
            if hasattr(info, name):
                waiting.append(getattr(info, name))
        for name in ("item_types", "types"):
            waiting += getattr(info, name, ())
    return seen


def _describe(schema: Schema, kind: type) -> None:
    """Put into a schema what the code says of its fields."""
    texts = _texts(kind)
    for name, field in schema.get("properties", {}).items():
        if name in texts:
            field["description"] = texts[name]


def _texts(kind: type) -> dict[str, str]:
    bases = [base for base in reversed(kind.__mro__) if base.__module__.startswith("nbdvde")]
    return {name: " ".join(text.split()) for base in bases for name, text in docstrings(base).items()}


def docstrings(kind: type) -> dict[str, str]:
    """The string below each member of a class, which Python itself forgets."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for member, text in itertools.pairwise(body.body):
        match member, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                found[name] = words
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=1) + "\n")
