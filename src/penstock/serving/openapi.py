"""GET /openapi.json: routes, fields, bounds, answers and errors, all of it from what the code itself declares."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.context import context_of
from penstock.serving.errors import shape_of_errors
from penstock.serving.gate import Access
from penstock.serving.limits import MAX_BODY_BYTES, MAX_JSON_VALUES
from penstock.serving.operations import (
    IDEMPOTENCY_KEY,
    KEY,
    UNSAID,
    Endpoint,
    Operation,
    Routes,
    operation,
    operations_of,
)
from penstock.spec.sampling import BOUNDS, POSITIVE

Schema = dict[str, Any]
Refs = Mapping[Any, Schema]
"""By shape: where its schema is."""

FILES = re.compile(r"/(page/.*)?")
"""Paths of the dashboard, which are no API."""

REFUSALS = {
    400: "The request cannot be understood, or asks for what cannot be had",
    401: "There is no key, or none of this server's",
    403: "The key is not for this, or the request comes from elsewhere",
    404: "There is no such thing",
    408: "The body did not arrive in time",
    409: "What it is about is in another state",
    413: "The body is too large",
    415: "The body is of another type",
    429: "This client has had its share for the moment",
    431: "There are too many headers",
    500: "The fault is the server's; its log has the cause, under the request's id",
    503: "Not now: the server is full, or starting, or ending",
}
"""What each status says; the code in the body says more."""

MOST = {
    "string": ("maxLength", MAX_BODY_BYTES),
    "array": ("maxItems", MAX_BODY_BYTES // 2),
    "object": ("maxProperties", MAX_JSON_VALUES),
}
"""What a body has room for: the bound of each field that has none of its own. An item takes two bytes at least."""

LATER = (429, 503)
JSON = "application/json"


def document(routes: Routes, *, keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. ``keys``: callers are asked for one."""
    api = {path: route for path, route in routes.items() if not FILES.fullmatch(path)}
    said = [each for _, endpoint, *_ in api.values() for each in operations_of(endpoint).values()]
    used = [shape for each in said for shape in (each.takes, each.form, *each.given, *each.streams)]
    errors = dict.fromkeys(map(shape_of_errors, api))
    shapes = dict.fromkeys([*filter(_is_shape, used), *errors])
    found, schemas = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    refs = dict(zip(shapes, found, strict=True))
    schemas, known = deepcopy(schemas), set[str]()  # parts of them are constants
    for each in said:
        if each.form is not None:
            for field in schemas[each.form.__name__]["properties"].values():
                if field.pop("contentEncoding", None):  # a part of a form is sent as it is
                    field["format"] = "binary"
        for shape in filter(None, (each.takes, each.form)):
            _bound(refs[shape], "", schemas, known)
            for name, harmless in getattr(shape, "HARMLESS", {}).items():
                field = {"enum": [*harmless, None], "description": "Not supported: it may ask for nothing only."}
                schemas[shape.__name__]["properties"][name] = field
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": version("penstock"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "A field that is left out or null has its default. Unknown fields are ignored.",
        },
        "paths": {path.replace(":path", ""): _path(refs, path, *route, keys=keys) for path, route in api.items()},
        "components": {
            "schemas": schemas,
            "responses": {_refused(shape, s): _refusal(refs[shape], s) for shape in errors for s in REFUSALS},
            "headers": _HEADERS,
            "securitySchemes": _KEYS,
        },
    }


_HEADERS = {
    "request-id": {
        "description": "Of this request; the client's own if it sent one",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
    },
    "retry-after": {
        "description": "Seconds after which it is worth another try",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key that `penstock keys add` made"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def _is_shape(given: Any) -> bool:
    return given is not None and not isinstance(given, str)


def _path(
    refs: Refs, path: str, access: Access, endpoint: Endpoint, methods: str = "GET", *, keys: bool
) -> dict[str, Any]:
    item: dict[str, Any] = {}
    if names := re.findall(r"{(\w+)", path):
        item["parameters"] = [_parameter("path", name, {"type": "string"}) for name in names]
    said = operations_of(endpoint)
    asked: list[dict[str, list[str]]] = [{"bearer": []}, {"key": []}] if keys and access != "public" else []
    for method in methods.split():
        told = _operation(refs, path, method, said.get(method, UNSAID))
        item[method.lower()] = told | {"security": asked, "x-access": access}
    return item


def _operation(refs: Refs, path: str, method: str, said: Operation) -> dict[str, Any]:
    told: dict[str, Any] = {"operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]), "summary": said.says}
    if said.query is not None:
        fields = msgspec.json.schema(said.query)["$defs"][said.query.__name__]["properties"]
        for name, field in fields.items():
            _bound(field, name, {}, set())
        told["parameters"] = [_parameter("query", name, _without_null(field)) for name, field in fields.items()]
    if said.once:
        told.setdefault("parameters", []).append(
            _parameter("header", IDEMPOTENCY_KEY, {"type": "string", "pattern": f"^{KEY}$"})
        )
    if said.takes or said.form or (said is UNSAID and method == "POST"):
        content: dict[str, Any] = {"schema": {} if said is UNSAID else refs[said.takes or said.form]}
        if said.example is not None:
            content["example"] = said.example
        told["requestBody"] = {"required": True, "content": {"multipart/form-data" if said.form else JSON: content}}
    refused = [400, 401, 403, 431, 500, 503]
    refused += [408, 409, 413, 415, 429] if method == "POST" else []
    of_model = said.query is not None and "model" in said.query.__annotations__
    refused += [404] if method == "POST" or "{" in path or of_model else []
    named = {str(status): _refused(shape_of_errors(path), status) for status in sorted(refused)}
    told["responses"] = {"200": _answer(refs, said)}
    told["responses"] |= {status: {"$ref": f"#/components/responses/{name}"} for status, name in named.items()}
    return told


def _parameter(place: str, name: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _without_null(field: Schema) -> Schema:
    """Of a query, where nothing can be null."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    return {name: value for name, value in kinds[0].items() if name != "default"} if len(kinds) == 1 else field


def _answer(refs: Refs, said: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(said.gives, str):
        content[said.gives] = {"schema": {"type": "string"}}
    elif said is not UNSAID:
        shapes = [refs[given] for given in said.given]
        content[JSON] = {"schema": {"anyOf": shapes} if len(shapes) > 1 else shapes[0]}
    if said.lines:
        content["application/x-ndjson"] = {"schema": {"anyOf": [refs[given] for given in said.streams]}}
    elif said.streams:
        data = [
            {"const": given} if isinstance(given, str) else {"contentMediaType": JSON, "contentSchema": refs[given]}
            for given in said.streams
        ]
        content["text/event-stream"] = {"schema": _event(data)}
    answer: dict[str, Any] = {"description": "Done", "headers": {"x-request-id": _header("request-id")}}
    return answer | ({"content": content} if content else {})


def _event(data: list[Schema]) -> Schema:
    """Of each event of a stream: what the schema of such a body is about (OpenAPI 3.2 calls it ``itemSchema``)."""
    fields = {"event": {"type": "string"}, "data": {"type": "string", "anyOf": data}}
    return {"type": "object", "required": ["data"], "properties": fields}


def _refused(shape: type, status: int) -> str:
    return f"{shape.__name__}_{status}"


def _refusal(schema: Schema, status: int) -> dict[str, Any]:
    headers = {"x-request-id": _header("request-id")}
    if status in LATER:
        headers["retry-after"] = _header("retry-after")
    return {"description": REFUSALS[status], "headers": headers, "content": {JSON: {"schema": schema}}}


def _header(name: str) -> Schema:
    return {"$ref": f"#/components/headers/{name}"}


def _bound(schema: Schema, name: str, schemas: Mapping[str, Schema], known: set[str]) -> None:
    """Adds what types of a request do not say: bounds of sampling parameters, and what a body has room for.

    Args:
        name: of the field.
        schemas: of the shapes it may refer to; ``known``: those of them that have been here.
    """
    if "$ref" in schema:
        if (shape := schema["$ref"].rpartition("/")[2]) not in known:
            known.add(shape)
            _bound(schemas[shape], name, schemas, known)
        return
    kind = schema.get("type")
    if kind in ("integer", "number") and name in BOUNDS and "minimum" not in schema:
        least, most = BOUNDS[name]
        schema |= {"exclusiveMinimum" if name in POSITIVE else "minimum": least, "maximum": most}
    elif kind in MOST and schema.get("format") != "binary" and schema.keys().isdisjoint(("enum", "properties")):
        schema.setdefault(*MOST[kind])
    for field, inner in schema.get("properties", {}).items():
        _bound(inner, field, schemas, known)
    for inner in (*schema.get("anyOf", ()), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            _bound(inner, name, schemas, known)


@operation("This document.", gives=dict[str, Any])
async def openapi(request: Request) -> Response:
    """Made when it is first asked for."""
    state = request.app.state
    if not hasattr(state, "document"):
        keys = context_of(request).gate.ring is not None
        state.document = await asyncio.to_thread(lambda: msgspec.json.encode(document(state.routes, keys=keys)))
    return Response(state.document, media_type=JSON)
