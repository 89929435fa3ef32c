"""The server's own description of itself: valid, complete, and true of what it answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

from penstock.serving import admin, app
from penstock.serving.decoding import decode
from penstock.serving.errors import AnthropicErrorBody, ErrorBody, HTTPError, PlainErrorBody, shape_of_errors
from penstock.serving.kserve import GenerateRequest
from penstock.serving.messages import MessagesRequest
from penstock.serving.openapi import FILES, JSON, document
from penstock.serving.operations import operations_of
from penstock.serving.responses import ResponsesRequest
from penstock.serving.schemas import ChatRequest, ModelRequest
from penstock.serving.sse import DONE
from servers import Server

TABLES = {"server": app.ROUTES, "admin": admin.ROUTES}


@pytest.fixture(scope="module")
def told(hermes: Server) -> dict[str, Any]:
    return httpx.get(f"{hermes.url}/openapi.json").json()


def resolved(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": document["components"], **schema}
    jsonschema.Draft202012Validator(whole).validate(value)


def bodies(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(path, operation) of each that has an example."""
    posts = [(path, item["post"]) for path, item in document["paths"].items() if "post" in item]
    return [(p, o) for p, o in posts if "example" in o.get("requestBody", {}).get("content", {}).get(JSON, {})]


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_it_is_valid(name: str, keys: bool) -> None:
    made = json.loads(json.dumps(document(TABLES[name], keys=keys)))
    validate(made)
    secured = {path for path, item in made["paths"].items() for each in item.values() if "security" in each}
    assert secured == made["paths"].keys()
    for item in made["paths"].values():
        for each in item.values():
            if isinstance(each, dict):
                assert bool(each["security"]) == (keys and each["x-access"] != "public")


def parts(
    document: dict[str, Any], schema: dict[str, Any], where: str, known: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all below it, each with where it stands; one that has a name comes once."""
    if "$ref" in schema:
        where = schema["$ref"].rpartition("/")[2]
        if where in known:
            return
        known.add(where)
        schema = resolved(document, schema)
    yield where, schema
    for field, inner in schema.get("properties", {}).items():
        yield from parts(document, inner, f"{where}.{field}", known)
    several = (*schema.get("anyOf", ()), *schema.get("oneOf", ()))
    for inner in (*several, schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from parts(document, inner, f"{where}[]", known)


def loose(document: dict[str, Any], schema: dict[str, Any], where: str, known: set[str]) -> Iterator[str]:
    """Fields below a schema that may be as large, or as many, as their sender likes."""
    ends = {"integer": "minimum maximum", "number": "minimum maximum", "string": "maxLength", "array": "maxItems"}
    for place, part in parts(document, schema, where, known):
        kind = part.get("type")
        wanted = (ends | {"object": "maxProperties"}).get(kind, "").split()
        if part.keys().isdisjoint(("enum", "const", "properties")) and part.get("format") != "binary":
            had = {each.replace("exclusiveM", "m") for each in part}
            yield from (f"{place}: {kind} without {each}" for each in wanted if each not in had)


@pytest.mark.parametrize("name", TABLES)
def test_every_field_of_a_request_has_bounds(name: str) -> None:
    """A number, a text, a list or an object without them is a new field that nobody has thought about."""
    made, known, found, seen = document(TABLES[name], keys=True), set[str](), list[str](), 0
    for path, item in made["paths"].items():
        for each in (operation for method, operation in item.items() if method != "parameters"):
            asked = [content["schema"] for content in each.get("requestBody", {}).get("content", {}).values()]
            asked += [query["schema"] for query in each.get("parameters", ()) if query["in"] == "query"]
            seen += len(asked)
            found += [told for schema in asked for told in loose(made, schema, path, known)]
    assert found == [] and seen >= 3
    wide = {"type": "object", "properties": {"n": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}}}
    assert len(list(loose(made, wide, "wide", set()))) == 2


MACHINE = re.compile(
    r"(?<![a-z])(shm|shared|memory|mem|sockets?|device|devices|cuda|gpu|slots?|kv|blocks?|fd|descriptor|handle|pointer"
    r"|address|offset|region|pid|path|host|port|url|uri)(?![a-z])"
)
"""What the fields of requests that name a place of the machine are called elsewhere."""


@pytest.mark.parametrize("name", TABLES)
def test_no_field_of_a_request_names_a_place_of_the_machine(name: str) -> None:
    """Shared memory, sockets, devices, slots and KV blocks are not a client's to name."""
    made, known, found = document(TABLES[name], keys=True), set[str](), set[str]()
    for path, item in made["paths"].items():
        found |= set(re.findall(r"{(\w+)}", path))
        for each in (operation for method, operation in item.items() if method != "parameters"):
            found |= {query["name"] for query in each.get("parameters", ())}
            for content in each.get("requestBody", {}).get("content", {}).values():
                for _, part in parts(made, content["schema"], path, known):
                    found |= part.get("properties", {}).keys()
    assert [field for field in found if MACHINE.search(field)] == [] and len(found) > 3
    assert MACHINE.search("shared_memory_region") and MACHINE.search("kv_block") and not MACHINE.search("reports")


def test_shared_memory_of_triton_s_extension_is_not_there(hermes: Server) -> None:
    region = {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 0}
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": region}
    without = httpx.post(f"{hermes.url}/v2/models/m/infer", json={"inputs": [tensor]})
    assert (without.status_code, without.json()["param"]) == (400, "inputs[0].data")
    for kind in ("system", "cuda"):
        for verb in ("register", "unregister", "status"):
            path = f"{hermes.url}/v2/{kind}sharedmemory/region/r/{verb}"
            assert httpx.post(path, json={"key": "/r", "offset": 0, "byte_size": 8}).status_code == 404


@pytest.mark.parametrize(
    ("shape", "body", "param"),
    [
        (GenerateRequest, {"text_input": "a", "max_tokens": -1}, "max_tokens"),
        (GenerateRequest, {"text_input": "a", "temperature": 1e5}, "temperature"),
        (ResponsesRequest, {"input": "a", "metadata": {"a": "b" * 513}}, "metadata"),
        (ResponsesRequest, {"input": "a", "include": ["a"] * 65}, "include"),
        (ResponsesRequest, {"input": "a", "user": "a" * 513}, "user"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 2049}]}, "messages"),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": [{}] * 2049}]}, "messages"),
    ],
)
def test_what_is_beyond_a_bound_is_refused(shape: type[ModelRequest], body: dict[str, Any], param: str) -> None:
    with pytest.raises(HTTPError, match="invalid_parameter") as refused:
        decode(json.dumps(body).encode(), shape)
    assert (refused.value.param or "").startswith(param)


@pytest.mark.parametrize("name", TABLES)
def test_every_route_says_what_it_takes_and_gives(name: str) -> None:
    """A new one says it with ``@operation``; until then it stands in the document by its path alone."""
    unsaid = [
        f"{method} {path}"
        for path, (_, endpoint, *methods) in TABLES[name].items()
        if not FILES.fullmatch(path)
        for method in (methods[0] if methods else "GET").split()
        if method not in operations_of(endpoint)
    ]
    assert unsaid == []


def test_examples_work_and_answers_are_as_described(hermes: Server, told: dict[str, Any]) -> None:
    assert len(bodies(told)) >= 9
    for path, each in bodies(told):
        content = each["requestBody"]["content"][JSON]
        check(told, content["schema"], content["example"])
        answer = httpx.post(hermes.url + path, json=content["example"], timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        code = str(answer.status_code)
        check(told, resolved(told, each["responses"][code])["content"][JSON]["schema"], answer.json())


def test_events_are_as_described(hermes: Server, told: dict[str, Any]) -> None:
    streams = [(p, o, o["responses"]["200"]["content"].get("text/event-stream")) for p, o in bodies(told)]
    seen = set()
    for path, each, stream in streams:
        if stream is None:
            continue
        seen.add(path)
        example = each["requestBody"]["content"][JSON]["example"] | {"stream": True}
        text = httpx.post(hermes.url + path, json=example, timeout=60).text
        shapes = stream["schema"]["properties"]["data"]["anyOf"]
        events = [event.rpartition("data: ")[2] for event in text.strip().split("\n\n")]
        assert len(events) > 3 and (events[-1] == DONE) == ({"const": DONE} in shapes)
        for event in events:
            if event != DONE:
                check(told, shapes[0]["contentSchema"], json.loads(event))
    assert seen == {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}


def test_refusals_are_as_described(hermes: Server, told: dict[str, Any]) -> None:
    for path, each in bodies(told):
        for answer in (httpx.post(hermes.url + path, json={}), httpx.post(hermes.url + path, content=b"{}")):
            if answer.status_code != 200:
                described = resolved(told, each["responses"][str(answer.status_code)])
                check(told, described["content"][JSON]["schema"], answer.json())
                assert answer.headers["x-request-id"]


def test_wrong_methods_and_paths_are_refused_in_each_api_s_own_form(hermes: Server, told: dict[str, Any]) -> None:
    client = httpx.Client(base_url=hermes.url)
    for path, item in told["paths"].items():
        here = path.replace("{model}", "m").replace("{version}", "1")
        wrong = "put" if "post" in item else "post"
        refused, nothing = client.request(wrong, here), client.post(f"{here}/no/such")
        allowed = {method.strip().lower() for method in refused.headers["allow"].split(",")}
        assert refused.status_code == 405 and item.keys() - {"parameters"} <= allowed and wrong not in allowed, path
        for answer in (refused, nothing):
            assert answer.status_code in (404, 405), (path, answer.text)
            assert type_of(answer) is shape_of_errors(path), (path, answer.text)
    for path in ("/v2/models/m", "/v2/models/m/versions/1"):
        assert client.get(f"{path}/infer").headers["allow"] == "POST"
    assert client.get("/v2/models/other/infer").status_code == 404


def test_queries_are_as_described(hermes: Server, told: dict[str, Any]) -> None:
    for path in ("/debug/engine", "/debug/trace"):
        assert "404" in told["paths"][path]["get"]["responses"]
        assert httpx.get(f"{hermes.url}{path}?model=").status_code == 404
    good, bad = ("0", "2.0", str(2**53 - 1)), ("0.5", "", "nan", "-1", str(2**53 + 1))
    for after, expected in (*((text, 200) for text in good), *((text, 400) for text in bad)):
        assert httpx.get(f"{hermes.url}/debug/engine?after={after}").status_code == expected, after


def type_of(answer: httpx.Response) -> type:
    """The form of a refusal, by its members."""
    match answer.json():
        case {"type": "error", "error": {"type": str(), "message": str()}}:
            return AnthropicErrorBody
        case {"error": {"message": str(), "type": str(), "param": _, "code": str()}}:
            return ErrorBody
        case {"error": str(), "code": str()}:
            return PlainErrorBody
    raise AssertionError(answer.text)


def test_bounds_and_what_must_ask_nothing_are_told(told: dict[str, Any]) -> None:
    fields = told["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"type": "number", "minimum": 0.0, "maximum": 1e4} in fields["temperature"]["anyOf"]
    assert {"type": "number", "exclusiveMinimum": 0.0, "maximum": 1.0} in fields["top_p"]["anyOf"]
    assert {"type": "integer", "minimum": 0, "maximum": 20} in fields["top_logprobs"]["anyOf"]
    assert fields["echo"]["enum"] == [False, None]


def test_flags_that_must_be_false_are_not_numbers(hermes: Server) -> None:
    """To Python, 0 is false."""
    for path, base, field in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "echo"),
        ("/v1/completions", {"prompt": "a"}, "use_beam_search"),
    ):
        for value, expected in ((False, 200), (None, 200), (0, 400), (True, 400)):
            answer = httpx.post(hermes.url + path, json=base | {"max_tokens": 1, field: value})
            assert answer.status_code == expected, answer.text
    wrong = httpx.post(f"{hermes.url}/tokenize", json={"messages": [{"role": "wizard", "content": "a"}]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "messages[0].role"
