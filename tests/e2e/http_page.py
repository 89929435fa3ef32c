"""docs/reference/http.md, made of the OpenAPI document (``make docs``)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.serving import admin, app
from penstock.serving.gate import Access
from penstock.serving.openapi import FILES, MOST, REFUSALS, document
from penstock.serving.operations import Routes

HEAD = """# HTTP

What a server answers at, what it takes and what it gives. A running server says the same, as OpenAPI 3.1, at
`/openapi.json`, with an example of each body. What fields about the draw mean is in
[sampling parameters](sampling.md).

Bodies are JSON, declared so by `Content-Type: application/json`, but for files, which are forms; below `/api/`
[any type will do](../how-to/other-apis.md#ollama). A field that is left out or null has its default. Unknown fields
are ignored, and the log names them. Every answer carries `x-request-id`; 429 and 503 carry `retry-after` in seconds,
which official clients wait for before they try again, and a 500 with the code `request_quarantined` carries
`x-should-retry: false`, which keeps them from it. An upload or a new batch that carries an `Idempotency-Key` may
be sent again for a day: what it made the first time is the answer. The `system_fingerprint` of an answer names the
weights and their arithmetic: where the [backend promises one answer](../explanation/one-answer.md), the same tokens,
parameters and seed give the same bits while it is the same, and may give others when it changes. A body
has 8 MiB at most.

A stream of events in which there has been nothing for 15 s has a comment, in Anthropic's API a `ping`, so that no proxy
takes it for dead. What comes while a model is loaded is told in
[several models](../how-to/several-models.md#who-makes-room-and-who-waits).

"""
ACCESS = """
Where the server has a file of [keys](../how-to/keys.md), "public" asks for none, "inference" and "tenant" for any, as
`Authorization: Bearer` or `x-api-key`, "admin" for one of that role. Elsewhere nobody is asked, but "tenant" and
"admin" are refused where others than its machine can reach the server.
"""
ADMIN = """
With `--admin-port` the routes of "admin" are at that port and nowhere else, with these:
"""


def http_page(codes: Mapping[int, set[str]]) -> str:
    """``codes``: of errors, by their status."""
    own, other = document(app.ROUTES, keys=True), document(admin.ROUTES, keys=True)
    schemas = own["components"]["schemas"] | other["components"]["schemas"]
    asked = within([each.get("requestBody") for item in own["paths"].values() for each in operations(item)], schemas)
    pages = [HEAD, "## Routes\n", ACCESS, *routes(own), ADMIN, *routes(other)]
    pages += [
        "\n## Errors\n\n",
        *errors(codes),
        "\n## Shapes\n",
        *(s for name in schemas for s in shape(name, schemas, asked)),
    ]
    return "".join(pages)


def routes(told: dict[str, Any]) -> Iterator[str]:
    yield "\n| | access | | takes | gives |\n| --- | --- | --- | --- | --- |\n"
    for path, item in told["paths"].items():
        for method, each in item.items():
            if method == "parameters":
                continue
            taken = [content["schema"] for content in each.get("requestBody", {}).get("content", {}).values()]
            queries = [p for p in each.get("parameters", ()) if p["in"] == "query"]
            asked = [f"`?{p['name']}`: {kind(p['schema'])}" for p in queries]
            gives = [given(media, c["schema"]) for media, c in each["responses"]["200"].get("content", {}).items()]
            cells = (f"`{method.upper()} {path}`", each["x-access"], each["summary"])
            yield row(*cells, ", ".join([*map(kind, taken), *asked]), "; ".join(gives))


def roles() -> str:
    """A table of the paths that each kind of caller may use; what many begin with stands for all of them."""
    rows = {
        "no key": [*paths(app.ROUTES, "public"), "the files of the [dashboard](dashboard.md)"],
        "any key": paths(app.ROUTES, "inference", "tenant"),
        "a key of the role `admin`, without `--admin-port`": paths(app.ROUTES, "admin"),
        "a key of the role `admin`, at `--admin-port`": paths(admin.ROUTES, "admin"),
    }
    head = "| asks for | at |\n| --- | --- |\n"
    return head + "".join(row(who, ", ".join(listed)) for who, listed in rows.items())


def paths(table: Routes, *access: Access, enough: int = 4) -> list[str]:
    """``enough`` of them that begin alike are told as one."""
    named = [re.sub(r"{(\w+)[^}]*}", lambda found: found[1].upper(), path) for path in of_access(table, *access)]
    starts = Counter(path.split("/")[1] for path in named)
    short = (f"/{start}/..." if starts[start := path.split("/")[1]] >= enough else path for path in named)
    return [f"`{path}`" for path in dict.fromkeys(short)]


def of_access(table: Routes, *access: Access) -> list[str]:
    """Its paths that ask for so much, but for the files of the dashboard."""
    return [path for path, (asked, *_) in table.items() if asked in access and not FILES.fullmatch(path)]


def given(media: str, schema: dict[str, Any]) -> str:
    if media == "application/json":
        return kind(schema) or media
    if media != "text/event-stream":
        return media
    first = schema["properties"]["data"]["anyOf"][0]["contentSchema"]
    return f"or a stream of {kind(first)}"


def errors(codes: Mapping[int, set[str]]) -> Iterator[str]:
    yield (
        "A refusal has an `ErrorBody`, or under `/v1/messages` an `AnthropicErrorBody`. "
        "What each code says, and what to do, is in [error codes](../errors.md).\n\n"
    )
    yield "| status | | codes |\n| --- | --- | --- |\n"
    for status, says in REFUSALS.items():
        yield row(str(status), says, ", ".join(f"`{code}`" for code in sorted(codes.get(status, ()))))


def operations(item: Mapping[str, Any]) -> list[Any]:
    return [each for name, each in item.items() if name != "parameters"]


def within(node: Any, schemas: Mapping[str, Any]) -> set[str]:
    """Names of the schemas that a node refers to, and those refer to."""
    found, text = set[str](), json.dumps(node)
    while new := set(re.findall(r"#/components/schemas/(\w+)", text)) - found:
        found |= new
        text = json.dumps([schemas[name] for name in new])
    return found


def shape(name: str, schemas: Mapping[str, Any], asked: set[str]) -> Iterator[str]:
    """A section. ``asked``: names of those that are part of a request, where a field may be left out."""
    schema = schemas[name]
    if not schema.get("properties"):
        return
    yield f"\n### {title(name)}\n\n"
    if says := " ".join(schema.get("description", "").split()):
        yield says.replace("``", "`") + "\n\n"
    yield "| field | |\n| --- | --- |\n"
    nothing = []
    for field, of in schema["properties"].items():
        if of.get("description", "").startswith("Not supported"):
            nothing.append(f"`{field}`" + ("" if of["enum"] == [None] else f" ({kind({'enum': of['enum'][:-1]})})"))
        else:
            needed = "needed: " if name in asked and field in schema.get("required", ()) else ""
            absent = " or null" if name not in asked and {"type": "null"} in of.get("anyOf", ()) else ""
            yield row(f"`{field}`", needed + kind(of) + absent)
    if nothing:
        yield f"\nKnown, and may ask for nothing only: {', '.join(nothing)}.\n"


def kind(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        name = title(schema["$ref"].rpartition("/")[2])
        return f"[{name}](#{anchor(name)})"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(map(literal, values))
    if "anyOf" in schema and "items" not in schema:
        return " or ".join(dict.fromkeys(kind(one) for one in schema["anyOf"] if one.get("type") != "null"))
    match schema.get("type"):
        case "array":
            items = [one["items"] for one in schema["anyOf"]] if "anyOf" in schema else [schema.get("items", {})]
            return f"list of {' or of '.join(kind(each) or 'anything' for each in items)}{bounds(schema, 'Items')}"
        case "object":
            values = schema.get("additionalProperties")
            of = f" of {kind(values)}" if isinstance(values, dict) and values else ""
            return f"object{of}{bounds(schema, 'Properties')}"
        case "string":
            return f"{'bytes' if schema.get('format') == 'binary' else 'text'}{bounds(schema, 'Length')}"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "integer" | "number" as plain:
            return plain + between(schema)
    return ""


def literal(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else f"`{json.dumps(value)}`"


def bounds(schema: dict[str, Any], of: str) -> str:
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    if (f"max{of}", most) in MOST.values():  # said at the head of the page
        most = None
    what = {"Items": "", "Length": " characters", "Properties": " members"}[of]
    if least is None and most is None:
        return ""
    if most is None:
        return f", at least {least}{what}"
    return f", {f'{least} to' if least is not None else 'at most'} {most:,}{what}"


def between(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if least is None:
        return ""
    above = "above " if "exclusiveMinimum" in schema else ""
    return f", {above}{plainly(least)}" + (" or more" if most is None else f" to {plainly(most)}")


def plainly(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def title(name: str) -> str:
    """``Page_FileObject_`` is a Page of FileObject."""
    outer, _, inner = name.rstrip("_").partition("_")
    return f"{outer} of {inner}" if inner else outer


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
