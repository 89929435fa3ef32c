"""What a server answers, and how it ends, while its first model is being loaded."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from commands import penstock, running
from penstock.serving.limits import MAX_CONNECTIONS, OTHER_FILES, REFUSED_CONNECTIONS
from servers import Server

USER: Any = {"role": "user", "content": "Who has the key?"}
GREEDY = {"temperature": 0}
QUICK = [sys.executable, str(Path(__file__).with_name("quick_server.py")), "--port", "0"]


@dataclass(frozen=True)
class Loading:
    """A server whose model is loaded by two fifths. ``asked``: a request that came meanwhile."""

    url: str
    folder: Path
    process: subprocess.Popen[str]
    asked: Future[httpx.Response]

    def go_on(self, wrong: str = "") -> None:
        (self.folder / "draft").write_text(wrong)
        (self.folder / "draft").rename(self.folder / "hold")

    def ps(self) -> str:
        return penstock("ps", XDG_RUNTIME_DIR=str(self.folder)).stdout.decode()


@contextmanager
def loading(folder: Path) -> Iterator[Loading]:
    own = {"XDG_RUNTIME_DIR": str(folder), "QUICK_HOLD": str(folder / "hold")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = ("--store", str(folder / "store"))
    with (
        ThreadPoolExecutor(1) as pool,
        running([*QUICK, *options], text=True, env=os.environ | own, **pipes) as process,
    ):
        found = folder / "penstock" / f"{process.pid}.json"
        until(lambda: found.exists() and found.read_bytes().endswith(b"}"), process)
        url = json.loads(found.read_bytes())["url"]
        until(lambda: httpx.get(f"{url}/health", timeout=20).json()["models"][0]["progress"] == 0.4, process)
        body = {"prompt": "Once upon a time", "max_tokens": 4}
        asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        until(lambda: httpx.get(f"{url}/status").json()["queue"]["requests"] == 1, process)
        yield Loading(url, folder, process, asked)


def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_it_answers_while_it_loads_and_requests_wait(tmp_path: Path) -> None:
    with loading(tmp_path) as server:
        assert httpx.get(f"{server.url}/live").status_code == 200
        ready, health = (httpx.get(f"{server.url}/{path}") for path in ("ready", "health"))
        assert ready.status_code == health.status_code == 503 and ready.headers["retry-after"]
        error = ready.json()["error"]
        assert error["code"] == "not_in_memory" and "40% of it is there" in error["message"]
        told = health.json()
        assert (told["status"], told["error"]) == ("loading", error)
        assert told["models"] == [
            {"name": "penstock-tiny", "state": "loading", "alive": False, "progress": 0.4, "failure": None}
        ]
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 503
        assert "loading 40%" in server.ps()
        assert httpx.get(f"{server.url}/status").json()["requests"][0]["phase"] == "load"
        assert not server.asked.done()
        server.go_on()
        answer = server.asked.result()
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert server.process.stdout is not None
        lines = [server.process.stdout.readline() for _ in range(4)]
        assert lines[0] == f"Serving penstock-tiny at {server.url}/v1\n" and f"curl {server.url}/v1" in "".join(lines)
        assert httpx.get(f"{server.url}/ready").text == "ok\n" and "ready" in server.ps()
        limit = httpx.get(f"{server.url}/status").json()["queue"]["tokens_limit"]
        assert limit > 1 << 20, "the queue is as large as the engine's pools say"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    with loading(tmp_path) as server:
        server.go_on("The file is cut short")
        refused = server.asked.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        out, errors = server.process.communicate(timeout=30)
        assert server.process.returncode == 3 and out == ""
        fix = "download the file again"
        assert errors == f"Error: The file is cut short\n  fix:  {fix}\n  code: weights_truncated\n"
        assert server.ps().count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_it_loads_ends_it(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with loading(tmp_path) as server:
        (engine,) = children(server.process)
        began = time.monotonic()
        server.process.send_signal(number)
        refused = server.asked.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert server.process.communicate(timeout=30) == ("", "") and server.process.returncode == code
        assert time.monotonic() - began < 20, "nobody waits for what cannot come"
        assert not Path(f"/proc/{engine}").exists()


# -- streams that wait -------------------------------------------------------------------------------------------------

BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "Once"},
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/responses": {"input": "Once"},
    "/v1/messages": {"messages": [USER]},
    "/api/chat": {"messages": [USER]},
}
COMMENT = [": loading penstock-tiny 40 %", ""]
PING = ["event: ping", 'data: {"type":"ping"}', ""]


def told(url: str, path: str, seen: list[str], **fields: Any) -> int:
    """Its status. ``seen``: the lines of its answer, as they come."""
    body = BODIES[path] | {"stream": True, "max_tokens": 4} | fields
    with httpx.stream("POST", url + path, json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            seen.append(line)
        return answer.status_code


def completed(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = client.completions.create(model="penstock-tiny", prompt="Once", max_tokens=9, stream=True, **GREEDY)
    return "".join(chunk.choices[0].text for chunk in chunks)


def chatted(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "penstock-tiny", "messages": [USER], "max_tokens": 9, **GREEDY}
    return "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
    )


def responded(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "penstock-tiny", "input": "Once", "max_output_tokens": 9, **GREEDY}
    events = client.responses.create(**asked, stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


async def _chatted(url: str) -> str:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "penstock-tiny", "messages": [USER], "max_tokens": 9, **GREEDY}
    stream = await client.chat.completions.create(**asked, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def chatted_async(url: str) -> str:
    return asyncio.run(_chatted(url))


def messaged(url: str) -> str:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    asked: Any = {"model": "penstock-tiny", "messages": [USER], "max_tokens": 9}
    with client.messages.stream(**asked, extra_body=GREEDY) as stream:
        return "".join(stream.text_stream)


CLIENTS = [completed, chatted, chatted_async, responded, messaged]


def test_streams_are_told_how_far_their_model_is(tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {path: [] for path in BODIES}
    with loading(tmp_path) as server, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, server.url) for ask in CLIENTS]
        streams = {path: pool.submit(told, server.url, path, lines) for path, lines in seen.items()}
        refused = [
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": True} | wrong)
            for wrong in ({"model": "other"}, {"prompt": 5}, {"max_tokens": -1})
        ]
        assert [answer.status_code for answer in refused] == [404, 400, 400], "before anything is waited for"
        commented = [path for path in BODIES if path not in ("/v1/messages", "/api/chat")]
        until(lambda: all(len(seen[path]) >= 4 for path in commented), server.process)
        until(lambda: len(seen["/v1/messages"]) >= 6, server.process)
        assert all(seen[path][:4] == 2 * COMMENT for path in commented) and seen["/v1/messages"][:6] == 2 * PING
        assert seen["/api/chat"] == [] and not any(ask.done() for ask in asked)
        server.go_on()
        assert [stream.result() for stream in streams.values()] == [200] * len(BODIES)
        assert [ask.result() for ask in asked] == [ask(server.url) for ask in CLIENTS]
    assert all(ask.result() for ask in asked)
    assert seen["/v1/completions"][-2] == seen["/v1/chat/completions"][-2] == "data: [DONE]"
    assert "event: response.incomplete" in seen["/v1/responses"] and "event: message_stop" in seen["/v1/messages"]
    assert json.loads(seen["/api/chat"][-1])["done"] and all(json.loads(line) for line in seen["/api/chat"])


def test_a_model_that_fails_ends_streams_that_have_begun(tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {path: [] for path in BODIES}
    with loading(tmp_path) as server, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, server.url) for ask in (completed, chatted, messaged)]
        streams = {path: pool.submit(told, server.url, path, lines) for path, lines in seen.items()}
        until(lambda: all(lines for path, lines in seen.items() if path != "/api/chat"), server.process)
        server.go_on("The file is cut short")
        assert [stream.result() for stream in streams.values()] == [200] * 4 + [503]
        for ask, error in zip(asked, (openai.APIError, openai.APIError, anthropic.APIStatusError), strict=True):
            with pytest.raises(error, match="shutting down"):
                ask.result()
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert json.loads(seen[path][-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert seen["/v1/responses"][-3] == seen["/v1/messages"][-3] == "event: error"
    assert "shutting_down" in seen["/v1/responses"][-2] and "shutting_down" in seen["/v1/messages"][-2]


def test_a_silent_stream_is_pinged(tmp_path: Path) -> None:
    """An engine that stands still under streams that have begun, and under some that have not."""
    options = ("--store", str(tmp_path / "store"))
    own = {"QUICK_PING": "0.4", "XDG_RUNTIME_DIR": str(tmp_path)}
    long = {"max_tokens": 20_000, "ignore_eos": True, "temperature": 0}
    paths = ("/v1/completions", "/v1/messages")
    with (
        ThreadPoolExecutor(8) as pool,
        running([*QUICK, *options], text=True, env=os.environ | own, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        server = Server(process.stdout.readline().split()[-1].removesuffix("/v1"), process)
        (engine,) = children(process)
        begun: dict[str, list[str]] = {path: [] for path in paths}
        held: dict[str, list[str]] = {path: [] for path in paths}
        streams = [pool.submit(told, server.url, path, lines, **long) for path, lines in begun.items()]
        until(lambda: all(len(lines) > 8 for lines in begun.values()), process)
        os.kill(engine, signal.SIGSTOP)
        try:
            streams += [pool.submit(told, server.url, path, lines) for path, lines in held.items()]
            asked = [pool.submit(ask, server.url) for ask in CLIENTS]
            for lines in (begun, held):
                until(lambda lines=lines: lines[paths[0]][-4:] == 2 * [": ping", ""], process)
                until(lambda lines=lines: lines[paths[1]][-6:] == 2 * PING, process)
        finally:
            os.kill(engine, signal.SIGCONT)
        assert [stream.result() for stream in streams] == [200] * 4
        assert [ask.result() for ask in asked] == [ask(server.url) for ask in CLIENTS]
        assert held[paths[0]][:2] == [": ping", ""] and held[paths[1]][:3] == PING
        for lines in (begun, held):
            data = [line.removeprefix("data: ") for line in lines[paths[0]] if line.startswith("data: ")]
            assert data.pop() == "[DONE]" and all(map(json.loads, data)), "a ping is between events"
            assert lines[paths[1]][-3] == "event: message_stop"
        server.wait_until_idle()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def children(process: subprocess.Popen[str]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int(each) for each in " ".join((task / "children").read_text() for task in tasks).split()]


@pytest.mark.parametrize("hard", [700, 5000])
def test_connections_are_as_many_as_there_are_descriptors_for(tmp_path: Path, hard: int) -> None:
    """Of a soft limit that was low. Those above are answered 503, more are closed, and others go on."""
    limited = ["sh", "-c", f'ulimit -Sn 128 && ulimit -Hn {hard} && exec "$@"', "sh", *QUICK]
    log, options = tmp_path / "log", ("--store", str(tmp_path / "store"))
    with (
        log.open("w") as errors,
        ExitStack() as open_ones,
        running([*limited, *options], text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        wanted = min(hard, MAX_CONNECTIONS + REFUSED_CONNECTIONS + OTHER_FILES)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (wanted, hard)
        if hard > wanted:
            assert "there is room for" not in log.read_text()
            return
        assert "there is room for 380 connections instead of 4096" in log.read_text()
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        held = [open_ones.enter_context(socket.create_connection(address, 20)) for _ in range(443)]
        for one in held:
            one.sendall(b"G")
        until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) > 443, process)
        held[-1].sendall(b"ET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held[-1].recv(100).startswith(b"HTTP/1.1 503")
        above = [open_ones.enter_context(socket.create_connection(address, 5)) for _ in range(100)]
        for one in above[2:]:  # the one that was answered has left; HEAD_SECONDS are longer than 5
            with suppress(ConnectionError):
                assert one.recv(1) == b""
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < hard - 100
        for one in held[:100]:
            one.close()
        until(lambda: httpx.get(f"{url}/live").status_code == 200, process)
        assert "Too many open files" not in log.read_text()
