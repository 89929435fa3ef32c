"""HTTPS and web pages of other origins, at a real server and by real clients."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from commands import argv, penstock, running
from penstock.base import ConfigError
from penstock.serving import limits, protocol
from penstock.serving.limits import HEAD_SECONDS
from penstock.serving.transport import Certificate, origins_of

ORIGIN = "https://chat.example"


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """A new certificate for localhost and its key; ``name`` says which one it is."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    words = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name}"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        missing = "no openssl to make certificates with"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    folder = tmp_path_factory.mktemp("tls")
    for name in ("first", "second"):
        certify(folder, name)
    return folder


@dataclass(frozen=True)
class Secure:
    url: str
    cert: Path
    key: Path
    process: subprocess.Popen[str]
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=ssl.create_default_context(cafile=self.cert))

    def name(self) -> str:
        """Of the certificate that it shows now."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        port = int(self.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), 20) as plain, context.wrap_socket(plain) as shown:
            given = shown.getpeercert(binary_form=True)
        assert given is not None
        return next(name for name in ("first", "second") if name.encode() in given)


@pytest.fixture(scope="module")
def secure(stories: Path, folder: Path) -> Iterator[Secure]:
    cert, key, log = folder / "cert.pem", folder / "key.pem", folder / "log"
    shutil.copy(folder / "first.pem", cert)
    shutil.copy(folder / "first.key", key)
    keys = folder / "keys"
    rates = ("--requests-per-minute", "1000", "--tokens-per-minute", "100000")
    secret = penstock("keys", "add", keys, *rates).stdout.decode().strip()
    options = [
        "--port",
        "0",
        "--num-threads",
        "1",
        "--keys",
        str(keys),
        "--cors-origin",
        f"{ORIGIN},http://localhost:3000",
    ]
    arguments = argv("serve", stories, *options, "--tls-cert", cert, "--tls-key", key, "--store", folder / "store")
    with log.open("w") as errors, running(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        assert url.startswith("https://"), log.read_text()
        (folder / "secret").write_text(secret)
        yield Secure(url, cert, key, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_the_official_client_over_https(secure: Secure, folder: Path) -> None:
    key, context = (folder / "secret").read_text(), ssl.create_default_context(cafile=secure.cert)
    client = openai.OpenAI(base_url=f"{secure.url}/v1", api_key=key, http_client=httpx.Client(verify=context))
    stream = client.completions.create(model="stories260k", prompt="Once", max_tokens=40, stream=True, seed=1)
    assert sum(bool(event.choices[0].text) for event in stream) > 10
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{secure.url}/live")  # nobody vouches for it
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{secure.url}/live".replace("https", "http"))
    listed = [json.loads(line) for line in penstock("ps", "--json").stdout.splitlines()]
    (shown,) = [each for each in listed if each["pid"] == secure.process.pid]
    assert shown["url"] == secure.url and shown["status"]["alive"]
    traced = penstock("trace", secure.url, "--out", folder / "trace.json")
    assert traced.returncode == 0 and json.loads((folder / "trace.json").read_text())["traceEvents"], traced.stderr


def test_another_certificate_without_a_connection_lost(secure: Secure, folder: Path) -> None:
    assert secure.name() == "first"
    with secure.client() as kept:
        assert kept.get("/live").status_code == 200
        secure.cert.write_text("nonsense")
        secure.process.send_signal(signal.SIGHUP)
        until(lambda: "tls_unusable" in secure.log.read_text())
        assert secure.name() == "first"  # and so it is with a key of another certificate
        secure.cert.write_bytes((folder / "second.pem").read_bytes())
        secure.process.send_signal(signal.SIGHUP)
        until(lambda: secure.log.read_text().count("tls_unusable") == 2)
        assert secure.name() == "first"
        secure.key.write_bytes((folder / "second.key").read_bytes())
        secure.process.send_signal(signal.SIGHUP)
        until(lambda: secure.name() == "second")
        assert kept.get("/live").status_code == 200


@pytest.mark.slow  # it waits for as long as a client may take
def test_who_says_nothing_instead_of_a_handshake(secure: Secure) -> None:
    """Is there for as long as a request's head may take to arrive, and no longer; so is who stops in the middle."""
    port = int(secure.url.rsplit(":", 1)[1])
    began = time.monotonic()
    silent = [socket.create_connection(("127.0.0.1", port), 40) for _ in range(20)]
    for some in silent[10:]:
        some.sendall(b"\x16\x03\x01\x02\x00\x01")  # of a ClientHello
    with secure.client() as client:
        assert client.get("/live").status_code == 200
    for some in silent:
        with some, suppress(ConnectionResetError):
            assert some.recv(1) == b""
    assert HEAD_SECONDS - 1 < time.monotonic() - began < 40, "asyncio's own patience is a minute"
    with secure.client() as client:
        assert client.get("/live").status_code == 200


def test_a_handshake_counts_as_a_connection(folder: Path) -> None:
    """And none begins above MAX_CONNECTIONS. At the end of a server those that are under way end, too."""
    context = Certificate(folder / "first.pem", folder / "first.key").context

    async def run() -> None:
        state = ServerState()
        config = uvicorn.Config(lambda: None, ws="none", lifespan="off", log_config=None, limit_concurrency=3)  # type: ignore[arg-type, return-value]
        made = partial(protocol.secured, context, config=config, server_state=state, app_state={})
        server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        assert await clients[3][0].read(1) == b"" and len(state.connections) == 3
        clients[0][1].close()
        while len(state.connections) == 3:
            await asyncio.sleep(0.01)
        for connection in list(state.connections):
            connection.shutdown()
        for reader, _ in clients[1:3]:
            assert await reader.read(1) == b""
        assert not state.connections
        server.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_the_end_of_an_answer_that_nobody_reads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of it is left: between two lengths here is less than a transport holds without a word."""
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.3)
    lengths = range(64 << 10, 5 << 20, 60 << 10)
    asked: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(int(scope["path"][1:]))
        asked.append(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        state = ServerState()
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        made = partial(protocol.Connection, config=config, server_state=state, app_state={})
        server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        clients = []
        for length in lengths:
            client = socket.create_connection(server.sockets[0].getsockname())
            client.sendall(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % length)
            clients.append(client)
        while state.connections or len(asked) < len(lengths):
            await asyncio.sleep(0.01)
        server.close()
        for client in clients:
            client.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_pages_of_named_origins_and_of_no_others(secure: Secure) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with secure.client() as client:
        for origin in (ORIGIN, "http://localhost:3000"):
            allowed = client.options("/v1/completions", headers={"origin": origin} | asks)
            assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origin
            assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
            assert "POST" in allowed.headers["access-control-allow-methods"] and "Origin" in allowed.headers["vary"]
            refused = client.post("/v1/completions", json={}, headers={"origin": origin})  # a page reads why
            assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in refused.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in allowed.headers.keys() | refused.headers.keys()
        for origin in ("https://evil.example", "http://chat.example", f"{ORIGIN}:444", f"{ORIGIN}.evil", "null", ""):
            for answer in (
                client.options("/v1/completions", headers={"origin": origin} | asks),
                client.get("/live", headers={"origin": origin}),
            ):
                assert "access-control-allow-origin" not in answer.headers
        assert client.options("/v1/completions", headers={"origin": "https://evil.example"} | asks).status_code == 400


def test_a_page_of_a_named_origin_uploads_and_reads_what_is_left(secure: Secure, folder: Path) -> None:
    key = {"x-api-key": (folder / "secret").read_text()}
    form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}")}}
    with secure.client() as client:
        host = secure.url.removeprefix("https://")
        for origin in (ORIGIN, "http://localhost:3000", f"https://{host}", None):
            from_where = {} if origin is None else {"origin": origin}
            kept = client.post("/v1/files", **form, headers=key | from_where)
            assert kept.status_code == 200, (origin, kept.text)
            if origin in (ORIGIN, "http://localhost:3000"):
                told = {name for name in kept.headers if name.startswith(("x-ratelimit-", "x-request-id"))}
                assert len(told) == 7 and told < set(kept.headers["access-control-expose-headers"].split(", "))
        for origin in ("https://evil.example", f"{ORIGIN}.evil", "http://chat.example", "null", "", "http://["):
            refused = client.post("/v1/files", **form, headers=key | {"origin": origin})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed"), origin
            assert "--cors-origin" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["*", "https://*.example", "chat.example", "https://a.example/", "null", "https://", ""]
)
def test_an_origin_is_exact(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid_origin"):
        origins_of(f"https://a.example,{text}")


def test_certificates_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    first, second = folder / "first.pem", folder / "second.key"
    locked = tmp_path / "locked"
    subprocess.run(
        ["openssl", "pkey", "-in", folder / "first.key", "-aes128", "-passout", "pass:abcd", "-out", locked], check=True
    )
    for cert, key in ((first, None), (first, second), (tmp_path / "none", None), (tmp_path, None), (first, locked)):
        with pytest.raises(ConfigError, match="tls_unusable"):
            Certificate(cert, key)


def until(done: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
