"""What hostile clients send: each gets a 4xx with a code or is cut off, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints
from unittest import mock

import httpx
import msgspec
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import AsyncLLM
from penstock.bench.load.machine import family, resident_bytes
from penstock.core.trace import Trace
from penstock.serving import (
    build_app,
    conversations,
    kserve,
    limits,
    ollama_schemas,
    response_schemas,
    schemas,
    vectors,
)
from penstock.serving import server as serving
from penstock.serving.chrome import STALLED, chrome_trace
from penstock.serving.edge import nested_too_deeply
from penstock.serving.limits import MAX_JSON_DEPTH
from penstock.serving.model_routes import ModelChoice
from penstock.spec import EngineConfig
from penstock.spec.sampling import BOUNDS
from servers import MODEL, PROMPT, Server

COMPLETIONS = "/v1/completions"
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
STREAM = {"model": MODEL, "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), dtype="float32", num_threads=1))
    yield llm
    llm.close()


def descriptors(server: Server) -> int:
    """Open in the process that answers, without one for each of its own: those that tokenize start when needed."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd")) - len(family(server.process.pid))


def memory(server: Server) -> int:
    """Resident bytes of the process that answers and of its engine."""
    return resident_bytes(server.process.pid)


@pytest.fixture(autouse=True)
def nothing_left_behind(server: Server) -> Iterator[None]:
    """Blocks, room in the queue and descriptors are back to where they were."""
    server.wait_until_idle()
    httpx.get(f"{server.url}/v1/files")  # opens the store, which stays open
    before = descriptors(server)
    yield
    deadline = time.monotonic() + 20
    while descriptors(server) > before or server.metric("penstock_queue_requests"):
        assert time.monotonic() < deadline, (descriptors(server), before)
        time.sleep(0.05)
    server.wait_until_idle()
    assert server.metric("penstock_kv_blocks_used") == server.metric("penstock_queue_tokens") == 0


def head_of(body: bytes, path: str = COMPLETIONS, *more: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json", *more]
    return b"\r\n".join([*lines, f"Content-Length: {len(body)}".encode(), b"", b""])


def reset(connection: socket.socket) -> None:
    """Closes with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# -- the numbers and the shape of a request ----------------------------------------------------------------------------


def numbers_of(shape: type) -> Iterator[tuple[str, type, tuple[float, float] | None]]:
    """(field, int or float, its declared least and most) of a request's own numbers."""
    for name, hint in get_type_hints(shape, include_extras=True).items():
        for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
            kind, *marks = get_args(part) if get_origin(part) is Annotated else (part,)
            if kind not in (int, float):
                continue
            metas = [mark for mark in marks if isinstance(mark, msgspec.Meta)]
            own = [(mark.ge, mark.le) for mark in metas if mark.ge is not None and mark.le is not None]
            yield name, kind, own[0] if own else BOUNDS.get(name)


REQUESTS = {
    COMPLETIONS: schemas.CompletionRequest,
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/embeddings": vectors.EmbeddingRequest,
    "/v1/score": vectors.ScoreRequest,
    "/v1/rerank": vectors.RerankRequest,
    "/api/chat": ollama_schemas.OllamaChat,
    "/api/generate": ollama_schemas.OllamaGenerate,
    "/api/embed": ollama_schemas.OllamaEmbed,
    f"/v2/models/{MODEL}/generate": kserve.GenerateRequest,
    f"/v2/models/{MODEL}/infer": kserve.InferRequest,
    "/models/load": ModelChoice,
    "/v1/responses": response_schemas.ResponsesRequest,
    "/v1/responses/input_tokens": response_schemas.InputTokensRequest,
    "/v1/conversations": conversations.ConversationRequest,
    "/v1/conversations/conv_1": conversations.MetadataRequest,
    "/v1/conversations/conv_1/items": conversations.ItemsRequest,
}
BASE = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/api/chat": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": False},
    "/api/generate": {"prompt": "a", "max_tokens": 1, "stream": False},
    "/api/embed": {"input": "a"},
    f"/v2/models/{MODEL}/generate": {
        "text_input": "a",
        "max_tokens": 1,
        "exclude_input_in_output": True,
    },  # else 0 is one
    f"/v2/models/{MODEL}/infer": {
        "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}],
        "parameters": {"max_tokens": 1},
    },
    "/models/load": {"model": MODEL},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "a"},
    "/v1/conversations": {"items": [{"role": "user", "content": "a"}]},
    "/v1/conversations/conv_1": {"metadata": {}},
    "/v1/conversations/conv_1/items": {"items": []},
}
NUMBERS = [(path, *number) for path, shape in REQUESTS.items() for number in numbers_of(shape)]


def test_every_number_of_every_request_has_a_least_and_a_most() -> None:
    assert len(NUMBERS) > 40
    assert [(path, name) for path, name, _, bounds in NUMBERS if bounds is None] == []


@settings(max_examples=3 * settings.default.max_examples)
@given(number=st.sampled_from(NUMBERS), above=st.booleans(), beyond=st.integers(0, 3), far=st.booleans())
def test_numbers_at_their_limits_and_one_beyond(
    server: Server, number: tuple[str, str, type, tuple[float, float]], above: bool, beyond: int, far: bool
) -> None:
    path, name, kind, bounds = number
    edge = bounds[above]
    past = (10 ** (20 * beyond) if far else beyond) if kind is int else beyond * 0.5
    value = kind(edge + past if above else edge - past)
    response = CLIENT.post(server.url + path, json=BASE[path] | {name: value})
    body = {} if response.status_code == 200 else response.json()
    error = body if "code" in body else body.get("error", {})
    if value != edge:
        assert response.status_code == 400 and error["code"] == "invalid_parameter" and error["param"] == name, error
    elif response.status_code != 200:  # in range, and at odds with the model or with another field
        assert response.status_code == 400 and error["code"] != "invalid_json", error


def test_brackets_within_brackets(server: Server) -> None:
    def code(depth: int, filler: bytes = b"") -> str:
        body = b'{"prompt":"a","max_tokens":1,"metadata":' + filler + b"[" * depth + b"]" * depth + b"}"
        response = httpx.post(server.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
        return "ok" if response.status_code == 200 else str(response.json()["error"]["code"])

    assert code(MAX_JSON_DEPTH - 1) == "ok"
    assert code(MAX_JSON_DEPTH) == "invalid_json"
    assert code(3_000_000) == "invalid_json"


@given(
    parts=st.lists(
        st.sampled_from([b"[", b"]", b"{", b"}", b'"', b'\\"', b"\\\\", b"a", b"[" * 90, b"]" * 90, b'"["']),
        max_size=40,
    )
)
def test_depth_is_counted_outside_of_strings(parts: list[bytes]) -> None:
    body, depth, deepest, quoted, escaped = b"".join(parts), 0, 0, False, False
    for byte in body.decode():
        if escaped:
            escaped = False
        elif byte == "\\":
            escaped = True
        elif byte == '"':
            quoted = not quoted
        elif not quoted:
            depth += (byte in "[{") - (byte in "]}")
            deepest = max(deepest, depth)
    assert nested_too_deeply(body) == (deepest > MAX_JSON_DEPTH)
    with mock.patch("penstock.serving.edge.INLINE_BYTES", 7):  # wherever a body is cut
        assert nested_too_deeply(body) == (deepest > MAX_JSON_DEPTH)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**18}, {"logprobs": 10**18}, {"best_of": 10**18}, {"max_tokens": 2**64}, {"stop": ["a"] * 100_000},
        {"stop": "a" * 1_000_000}, {"stop_token_ids": [1] * 1_000_000}, {"prompt": ["a"] * 100_000},
        {"logit_bias": {str(i): 1 for i in range(100_000)}}, {"dry_sequence_breakers": ["a" * 1000] * 1000},
        {"guided_regex": "(a+)+" * 2000 + "$"}, {"guided_choice": ["a" * 20] * 100_000},
        {"guided_grammar": "(" * 100_000}, {"logits_rules": {str(i): i for i in range(10_000)}},
        {"model": "m" * 1_000_000}, {"thinking_start": [1] * 100_000},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_huge_values_are_refused_at_once(server: Server, fields: dict[str, Any]) -> None:
    before = memory(server)
    response = httpx.post(server.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1} | fields, timeout=60)
    assert 400 <= response.status_code < 500 and response.json()["error"]["code"], response.text
    assert memory(server) - before < 200 << 20


@pytest.mark.parametrize(
    ("syntax", "definition"),
    [
        ("regex", "(a+)+" * 2000), ("regex", "(" * 5000 + ")" * 5000), ("regex", "[a"),
        ("regex", "(?!a)b"), ("regex", "a)|(?:b"), ("regex", "." * 100_000), ("regex", "a\\"),
        ("lark", "start: " + "(" * 100_000), ("lark", "start: start start | start"), ("lark", "start: <[0-500]>"),
        ("lark", "start: /" + "\\/" * 50_000), ("lark", 'start: "\\ud800"'), ("lark", 'start: "' + "a" * 200_000),
        ("lark", "start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000), ("lark", "start: @start"),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_grammars_of_tools_are_refused_at_once(server: Server, syntax: str, definition: str) -> None:
    before, began = memory(server), time.monotonic()
    grammar = {"type": "grammar", "syntax": syntax, "definition": definition}
    tool = {"type": "custom", "name": "f", "format": grammar}
    response = CLIENT.post(f"{server.url}/v1/responses", json={"input": "a", "tools": [tool], "max_output_tokens": 1})
    codes = ("grammar_too_large", "invalid_grammar", "invalid_regex", "context_length_exceeded", "tools_too_large")
    assert response.status_code == 400 and response.json()["error"]["code"] in codes, response.text
    assert memory(server) - before < 200 << 20 and time.monotonic() - began < 20


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a%00b", "%e2%80%ae", "．．/etc", "~root", "C:\\x"],
)
def test_names_are_never_paths(server: Server, name: str) -> None:
    """A model is found by comparing its name; nothing of a request is joined to a path."""
    response = httpx.get(f"{server.url}/v1/models/{name}")
    assert response.status_code == 404 and "root:" not in response.text
    response = httpx.post(server.url + COMPLETIONS, json={"prompt": "a", "model": name})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


# -- heads, bodies and connections -------------------------------------------------------------------------------------


def test_a_flood_of_headers_is_cut_off(server: Server) -> None:
    before = memory(server)
    line = b"x-" + b"h" * 60 + b": v\r\n"
    for flood in (b"x-big: " + b"a" * (64 << 20), line * 100_000):
        with socket.create_connection(server.address, timeout=30) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n\r\n")
                answer = connection.recv(1000)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")), answer[:100]
    assert memory(server) - before < 32 << 20


def test_200_resets_in_the_middle_of_streams(server: Server) -> None:
    body, before = json.dumps(STREAM | {"max_tokens": 150}).encode(), memory(server)
    connections = []
    for i in range(200):
        connection = socket.create_connection(server.address, timeout=60)
        connection.sendall(head_of(body) + body)
        connections.append(connection)
        if i % 2 == 0:
            assert b"200 OK" in connection.recv(100)
    alone = httpx.post(server.url + COMPLETIONS, json=STREAM | {"stream": False, "temperature": 0}, timeout=60)
    for connection in connections:
        reset(connection)
    again = httpx.post(server.url + COMPLETIONS, json=STREAM | {"stream": False, "temperature": 0}, timeout=60)
    assert alone.json()["choices"] == again.json()["choices"]
    assert memory(server) - before < 128 << 20


def test_uploads_that_stop_half_way_leave_nothing(server: Server) -> None:
    body, before = json.dumps(STREAM | {"prompt": "a" * 100_000}).encode(), memory(server)
    for sent in (1, 100, 50_000, len(body) - 1):
        for close in (socket.socket.close, reset):
            for _ in range(10):
                connection = socket.create_connection(server.address, timeout=30)
                connection.sendall(head_of(body) + body[:sent])
                close(connection)
    assert httpx.get(f"{server.url}/ready").status_code == 200 and memory(server) - before < 64 << 20


def test_bodies_of_a_declared_and_another_length(server: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for head, expected in (
        (head_of(body, COMPLETIONS, b"Transfer-Encoding: chunked"), {400}),
        (head_of(body).replace(b"Content-Length: ", b"Content-Length: +"), {400}),
        (head_of(body).replace(b"Content-Length: ", b"Content-Length: 1, "), {400}),
        (head_of(body, COMPLETIONS, b"Content-Length: 3"), {400}),
        (head_of(body, COMPLETIONS, b"X: a\rb"), {400}),
        (head_of(body).replace(b"Host: localhost", b"Host: localhost\r\nHost: evil"), {400, 403}),
    ):
        with socket.create_connection(server.address, timeout=30) as connection:
            connection.sendall(head + body)
            assert int(connection.recv(1000).split()[1]) in expected, head


# -- patience, in this process, where it can be made short -------------------------------------------------------------


@pytest.fixture
def impatient(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Any]]:
    """The port and the context of a server whose patience is half a second."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.5)
    with here(llm) as served:
        yield served


@contextlib.contextmanager
def here(llm: AsyncLLM, **settings: Any) -> Iterator[tuple[int, Any]]:
    """The port and the context of a server in this process."""
    app, context = build_app(llm)
    bound = serving.listen("127.0.0.1", 0)
    running = uvicorn.Server(serving._settings(app, **settings))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[bound])))
    thread.start()
    try:
        yield bound.getsockname()[1], context
    finally:
        running.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def test_who_is_one_connection_too_many_is_told_so_as_its_api_does(llm: AsyncLLM) -> None:
    """And it is counted. When another has gone there is room again."""
    with here(llm, connections=3) as (port, _), contextlib.ExitStack() as others:
        url, held = f"http://127.0.0.1:{port}", [httpx.Client() for _ in range(2)]
        for client in held:
            assert others.enter_context(client).get(f"{url}/live").status_code == 200
        for path, names, told in (
            (
                COMPLETIONS,
                {"x-request-id"},
                {"type": "overloaded_error", "param": None, "code": "too_many_connections"},
            ),
            ("/v1/messages", {"x-request-id", "request-id"}, {"type": "overloaded_error"}),
        ):
            answer = httpx.post(f"{url}{path}", json={"prompt": "a" * 100_000}, headers={"x-request-id": "mine"})
            assert answer.status_code == 503 and 2 <= int(answer.headers["retry-after"]) <= 3
            assert {answer.headers[name] for name in names} == {"mine"} and answer.headers["connection"] == "close"
            error = answer.json()["error"]
            assert "3 of them" in error.pop("message") and error == told
        held[0].close()
        deadline = time.monotonic() + 20
        while (answer := httpx.get(f"{url}/metrics")).status_code != 200:
            assert time.monotonic() < deadline
        refused = [line for line in answer.text.splitlines() if '"503"' in line]
        assert any(COMPLETIONS in line and line.endswith(" 1.0") for line in refused), refused


def test_a_head_that_trickles_is_not_waited_for(impatient: tuple[int, Any]) -> None:
    port, _ = impatient
    whole = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for first in (b"", whole):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            if first:
                connection.sendall(first)
                assert b"200 OK" in connection.recv(1000)
            deadline, sent = time.monotonic() + 60, 0
            with pytest.raises(ConnectionError):  # cut off, however long that takes on a busy machine
                while time.monotonic() < deadline:
                    connection.sendall(whole[sent % 4 : sent % 4 + 1] if sent < 4 else b"x")
                    sent += 1
                    time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
        assert silent.recv(10) == b""


@pytest.mark.parametrize("drips", [False, True])
@pytest.mark.parametrize(("path", "status"), [("/v1/x", b"404"), (COMPLETIONS, b"413")])
def test_a_body_that_nobody_reads_is_not_waited_for(
    impatient: tuple[int, Any], path: str, status: bytes, drips: bool
) -> None:
    """It was answered already: one byte of it, or one now and then, keeps no connection."""
    port, _ = impatient
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head_of(b"", path).replace(b"Length: 0", b"Length: 999999999"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)
        connection.sendall(b"x")
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while drips and time.monotonic() < deadline:
                connection.sendall(b"x")
                time.sleep(0.05)
            assert connection.recv(1) == b""
        assert time.monotonic() < deadline


def test_a_body_that_nobody_read_but_that_ends_costs_no_connection(
    impatient: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _ = impatient
    monkeypatch.setattr(limits, "HEAD_SECONDS", 2.0)
    body = b"x" * 100_000
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(head_of(body, "/v1/x"))
            assert connection.recv(4096).startswith(b"HTTP/1.1 404")
            connection.sendall(body[:50_000])
            time.sleep(1.2)
            connection.sendall(body[50_000:])
            time.sleep(1.2)  # the next head has all of its time


def test_a_client_that_reads_nothing_is_cut_off_and_its_request_ends(impatient: tuple[int, Any]) -> None:
    port, context = impatient
    body = json.dumps(STREAM | {"model": None, "n": 128, "logprobs": 100}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head_of(body) + body)
        deadline = time.monotonic() + 30
        while context.gate.admission.running == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as other:
            other.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in other.recv(1000)
        while context.gate.admission.running or context.llm.engine.service.status().running:
            assert time.monotonic() < deadline, "a client that does not read keeps its request"
            time.sleep(0.05)
        assert context.gate.admission.held == 0
        while not context.history.visits:
            assert time.monotonic() < deadline, "a request that was cut off is not told of"
            time.sleep(0.01)
        ((since, seconds),) = context.history.visits[0].stalls
        assert seconds > 0.4 and context.history.visits[0].line.client_s == round(seconds, 6)
        assert chrome_trace(Trace(now=since), context.history.visits)["traceEvents"][-1]["name"] == STALLED
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 20):
                pass
