"""Attacks on a server of the bundled model while four clients who behave go on; docs/reliability.md has the table.

Each attack is repeated for some seconds. The four get what they get when nobody attacks; how long they wait for a token
is measured in a process of their own (bystanders.py). Afterwards blocks, room and descriptors are where they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import BUNDLED
from penstock.serving.limits import MAX_UPLOADING
from servers import Server, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STREAM = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 0}
SECONDS, FEWEST = 4.0, 2
FLOOR_S, TIMES = 0.25, 5
"""The 99th percentile of the time between tokens may rise to so many times its undisturbed value, or to the floor."""
GROWTH = 64 << 20
MB = 1 << 20

Seen = Counter[str]
"""What answered an attack, and how often: a status with its code, or "cut off"."""


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


class Bystanders:
    def __init__(self, server: Server) -> None:
        script = [sys.executable, str(Path(__file__).with_name("bystanders.py")), server.url, "4"]
        self.process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=300)
        found: dict[str, Any] = json.loads(out)
        assert found["errors"] == [] and all(len(texts) == 1 for texts in found["texts"])
        return found


class Attacked:
    """A server, what its processes hold, and what the four are told when nobody attacks."""

    def __init__(self, server: Server) -> None:
        self.server = server
        tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks).split()
        self.engine = next(int(pid) for pid in children if "host" in Path(f"/proc/{pid}/cmdline").read_text())
        httpx.get(f"{server.url}/v1/files")  # what is opened when it is first needed is no leak
        post(server, {"prompt": "Once upon a time. " * 58_000})
        self.attack("nobody", lambda _: Counter({"": 1}) if not time.sleep(1) else Counter(), None)
        self.quiet = self.attack("nobody", lambda _: Counter({"": 1}) if not time.sleep(1) else Counter(), None)

    def held(self) -> tuple[int, int]:
        pids = (self.server.process.pid, self.engine)
        return tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)  # type: ignore[return-value]

    def settled(self, before: tuple[int, int]) -> bool:
        empty = not self.server.metric("penstock_queue_requests") and not self.server.metric("penstock_queue_tokens")
        return (
            empty
            and not self.server.metric("penstock_kv_blocks_used")
            and all(now <= then for now, then in zip(self.held(), before, strict=True))
        )

    def attack(self, name: str, once: Callable[[Server], Seen], expected: set[str] | None) -> dict[str, Any]:
        server, before = self.server, self.held()
        sizes = memory(server.process.pid), memory(self.engine)
        beside, seen, tries = Bystanders(server), Counter[str](), 0
        until(lambda: server.metric("penstock_queue_requests") >= 4)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline or tries < FEWEST:
            seen += once(server)
            tries += 1
        told = beside.told()
        until(lambda: self.settled(before))
        grown = memory(server.process.pid) - sizes[0], memory(self.engine) - sizes[1]
        p99, worst = percentile(told["gaps"], 0.99), told["gaps"][-1]
        what = ", ".join(f"{answer} ({times})" for answer, times in sorted(seen.items()))
        print(f"| {name} | {tries} | {what} | {1e3 * p99:.0f} | {1e3 * worst:.0f} | {told['answers']} "
              f"| {grown[0] / MB:+.0f}, {grown[1] / MB:+.0f} |")  # fmt: skip
        if expected is not None:
            assert set(seen) <= expected, seen
            assert told["texts"] == self.quiet["texts"]
            assert p99 <= max(TIMES * percentile(self.quiet["gaps"], 0.99), FLOOR_S)
            assert max(grown) < GROWTH + (MAX_UPLOADING if name == "uploads" else 0)
        return told


def until(done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    server = start(BUNDLED)
    try:
        yield Attacked(server)
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0


def post(server: Server, fields: dict[str, Any] | bytes, path: str = COMPLETIONS) -> str:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + path, content=body, headers=headers, timeout=120)
    return verdict(response)


def verdict(response: httpx.Response) -> str:
    return str(response.status_code if response.status_code == 200 else
               f"{response.status_code} {response.json()['error']['code']}")  # fmt: skip


def connected(server: Server, sent: bytes, buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(60)
    connection.connect(server.address)
    with contextlib.suppress(ConnectionError, TimeoutError):
        connection.sendall(sent)
    return connection


def answer_of(connection: socket.socket) -> str:
    """Status and code of what comes, or that the connection was cut off."""
    with connection, contextlib.suppress(ConnectionError, TimeoutError):
        head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
        if head:
            status = head.split()[1].decode()
            with contextlib.suppress(ValueError, LookupError, TypeError):
                return f"{status} {json.loads(body)['error']['code']}"
            return status
    return "cut off"


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def raw(body: bytes, length: int | None = None) -> bytes:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


# -- the attacks -------------------------------------------------------------------------------------------------------


def headers(server: Server) -> Seen:
    floods = (b"x-big: " + b"a" * (64 * MB), (b"x-" + b"h" * 60 + b": v\r\n") * 100_000)
    start = b"GET /live HTTP/1.1\r\nHost: localhost\r\n"
    return Counter(answer_of(connected(server, start + flood + b"\r\n\r\n")) for flood in floods)


def deep(server: Server) -> Seen:
    bodies = [b'{"prompt":"a","metadata":' + b"[" * depth + b"]" * depth + b"}" for depth in (200, 10_000, 3_000_000)]
    return Counter(post(server, body) for body in bodies)


def huge(server: Server) -> Seen:
    bodies: list[dict[str, Any]] = [
        {"n": 10**18}, {"logprobs": 10**18}, {"best_of": 10**18}, {"stop": ["a"] * 100_000},
        {"stop_token_ids": [1] * 1_000_000}, {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"response_format": {str(i): [{}] * 9 for i in range(50_000)}}, {f"field {i}": i for i in range(100_000)},
        {"metadata": [1] * 3_000_000},
    ]  # fmt: skip
    return Counter(post(server, {"prompt": "a", "max_tokens": 1} | fields) for fields in bodies)


def forms(server: Server) -> Seen:
    schema: dict[str, Any] = {}
    for _ in range(70):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    deeper = '{"properties":{"a":' * 10_000 + "{}" + "}}" * 10_000
    wide = {"anyOf": [{"type": "string", "pattern": f"^(a|a?)+{i}$"} for i in range(2000)]}
    bodies: list[dict[str, Any]] = [
        {"guided_regex": "(a+)+" * 2000 + "$"}, {"guided_regex": "(a|a)*" * 500 + "b{1,1000}{1,1000}"},
        {"guided_regex": "(" * 5000 + ")" * 5000}, {"guided_grammar": "(" * 100_000}, {"guided_json": deeper},
        {"guided_json": wide}, {"guided_grammar": "start: start start | start"}, {"guided_choice": ["a" * 20] * 60_000},
        {"guided_json": {"type": "string", "pattern": "^((a{0,200}){0,200}){0,200}$"}},
    ]  # fmt: skip
    return Counter(post(server, {"prompt": "a", "max_tokens": 4} | fields) for fields in bodies)


def templates(server: Server) -> Seen:
    payload = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}{% endfor %}"
    user = {"role": "user", "content": payload}
    bodies: list[dict[str, Any]] = [
        {"chat_template": payload}, {"chat_template_kwargs": {"tokenize": True, "chat_template": payload}},
        {"chat_template_kwargs": {"messages": [payload], "bos_token": payload}},
        {"chat_template_kwargs": {f"v{i}": payload for i in range(99)}}, {},
    ]  # fmt: skip
    return Counter(post(server, {"messages": [user], "max_tokens": 1} | fields, CHAT) for fields in bodies)


def specials(server: Server) -> Seen:
    """What looks like a special token of any family is text in a conversation: as many special ids as without."""

    def ids(text: str) -> list[int]:
        body = {"messages": [{"role": "user", "content": text}]}
        tokens: list[int] = httpx.post(f"{server.url}/tokenize", json=body, timeout=60).json()["tokens"]
        return tokens

    added = {
        each["id"]: each["content"] for each in json.loads((BUNDLED / "tokenizer.json").read_text())["added_tokens"]
    }
    plain = [id for id in ids("a") if id in added]
    for text in (*added.values(), "<|im_start|>system", "<|eot_id|>", "[INST]", "</s>", "<bos>" * 1000):
        assert [id for id in ids(text) if id in added] == plain, text
    return Counter({"200": len(added) + 5})


def paths(server: Server) -> Seen:
    names = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a%00b", "%e2%80%ae", "．．/etc", "C:\\x"]
    places = ["/v1/models/", "/v1/responses/", "/v1/conversations/", "/v1/files/", "/v1/batches/", "/page/"]
    seen = Counter[str]()
    for name in names:
        for place in places:
            response = httpx.get(f"{server.url}{place}{name}")
            assert "root:" not in response.text
            seen[verdict(response)] += 1
        seen[post(server, {"prompt": "a", "model": name})] += 1
    return seen


def hosts(server: Server) -> Seen:
    names = [
        "evil",
        "localhost.evil",
        "127.0.0.1.evil",
        "localhost@evil",
        "localhost#evil",
        "[::1",
        "2130706433",
        "",
        "localhost\x00",
    ]
    heads = [b"GET /v1/models HTTP/1.1\r\nHost: %s\r\n\r\n" % name.encode() for name in names]
    heads += [b"GET http://evil/v1/models HTTP/1.1\r\nHost: evil\r\n\r\n", b"GET /v1/models HTTP/1.1\r\n\r\n"]
    return Counter(answer_of(connected(server, head)) for head in heads)


def slow_readers(server: Server) -> Seen:
    body = json.dumps(STREAM | {"n": 2, "logprobs": 5}).encode()
    readers = [connected(server, raw(body), buffer=2048) for _ in range(8)]
    time.sleep(2)
    for reader in readers:
        reader.close()
    return Counter({"read nothing": len(readers)})


def resets(server: Server) -> Seen:
    connections = [connected(server, raw(json.dumps(STREAM).encode())) for _ in range(100)]
    for connection in connections[::4]:
        connection.recv(100)
    for connection in connections:
        reset(connection)
    return Counter({"reset": len(connections)})


def uploads(server: Server) -> Seen:
    """Bodies of 7 MB that stop a byte before their end."""
    body = b'{"prompt":"' + b"a" * (7 * MB)
    halves = [connected(server, raw(body, len(body) + 1)) for _ in range(48)]
    seen = Counter[str]()
    for half in halves:
        half.settimeout(0.01)
        with contextlib.suppress(TimeoutError, ConnectionError):
            seen[f"503 {'uploads_full'}" if b"uploads_full" in half.recv(2000) else "?"] += 1
        reset(half)
    return seen


def long_prompts(server: Server) -> Seen:
    """Of more tokens than the context has, as ids and as text, up to the largest body."""
    bodies: list[Any] = ["Once upon a time. " * 58_000, [7] * 500_000, [7] * 4_000_000, [[7] * 1000] * 500]
    return Counter(post(server, json.dumps({"prompt": body}, separators=(",", ":")).encode()) for body in bodies)


INVALID = {"400 invalid_json", "400 invalid_parameter", "400 too_many_values"}
FORMS = {"200", "400 invalid_regex", "400 invalid_grammar", "400 invalid_schema", "400 grammar_too_large"}
ATTACKS: dict[Callable[[Server], Seen], set[str]] = {
    headers: {"cut off", "400", "431", "431 headers_too_large"},
    deep: {"400 invalid_json"},
    huge: INVALID | {"413 body_too_large"},
    forms: INVALID | FORMS,
    templates: INVALID | {"200", "400 unsupported_parameter"},
    specials: {"200"},
    paths: {"404 model_not_found", "404 unknown_path", "404 response_not_found", "404 file_not_found",
            "404 batch_not_found", "404 conversation_not_found"},
    hosts: {"403 host_not_allowed", "400", "cut off"},
    slow_readers: {"read nothing"},
    resets: {"reset"},
    uploads: {"503 uploads_full"},
    long_prompts: {"400 context_length_exceeded", "400 invalid_parameter", "503 queue_full"},
}  # fmt: skip


@pytest.mark.parametrize("once", ATTACKS, ids=lambda once: once.__name__)
def test_who_behaves_is_served_as_ever(attacked: Attacked, once: Callable[[Server], Seen]) -> None:
    attacked.attack(once.__name__, once, ATTACKS[once])
