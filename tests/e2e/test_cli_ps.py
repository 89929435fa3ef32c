"""What runs on this machine, what it does, and what it did."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import argv, penstock, running
from penstock.cli.logs import readings
from penstock.core.trace import RequestTrace
from penstock.fleet import Admission
from penstock.serving.gate import Gate
from penstock.serving.presence import Presence, began, present, servers
from penstock.serving.status import by_answer, phase_of
from servers import PROMPT, Server, start


@dataclass(frozen=True)
class Logged:
    url: str
    key: str
    folder: Path
    process: subprocess.Popen[str]

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 3} | fields
        return httpx.post(f"{self.url}/completions", json=body, headers={"x-api-key": self.key}, timeout=60)

    def lines(self, count: int, name: str = "log") -> list[dict[str, Any]]:
        deadline = time.monotonic() + 20
        while True:
            text = (self.folder / name).read_text()
            if len(found := text.splitlines()) >= count:
                return [json.loads(line) for line in found]
            assert time.monotonic() < deadline, text
            time.sleep(0.02)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for running servers that no other server of this machine uses."""
    folder = tmp_path_factory.mktemp("runtime")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    yield folder / "penstock"
    del os.environ["XDG_RUNTIME_DIR"]
    if before is not None:
        os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture(scope="module")
def logged(stories: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    folder = tmp_path_factory.mktemp("logged")
    key = penstock("keys", "add", folder / "keys", "--tenant", "acme").stdout.decode().strip()
    options = ("--port", "0", "--num-threads", "1", "--keys", folder / "keys", "--log-file", folder / "log")
    with running(argv("serve", stories, *options), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Logged(process.stdout.readline().split()[-1], key, folder, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert list(runtime.iterdir()) == []
    assert key not in (folder / "log").read_text()


def test_a_line_for_each_request(logged: Logged) -> None:
    before = len(logged.lines(0))
    logged.ask(n=2, ignore_eos=True)
    logged.ask(max_tokens=0)
    httpx.post(f"{logged.url}/completions", json={}, headers={"x-api-key": "wrong", "x-request-id": "mine"})
    httpx.get(f"{logged.url.removesuffix('/v1')}/live")
    httpx.get(f"{logged.url.removesuffix('/v1')}/ready/stories260k", headers={"x-api-key": logged.key})
    good, bad, foreign = logged.lines(before + 3)[before:]
    assert (good["status"], good["tenant"], good["model"], good["path"]) == (
        200,
        "acme",
        "stories260k",
        "/v1/completions",
    )
    assert (good["completion_tokens"], good["finish"]) == (6, "length") and good["prompt_tokens"] > 0
    assert 0 < good["admitted_s"] <= good["started_s"] <= good["first_token_s"] <= good["total_s"]
    assert re.fullmatch(r"key-[0-9a-f]{8}", good["key"])
    assert (bad["status"], bad["completion_tokens"], bad["first_token_s"]) == (400, 0, None)
    assert (foreign["status"], foreign["tenant"], foreign["key"], foreign["id"]) == (401, None, None, "mine")
    assert stat.S_IMODE((logged.folder / "log").stat().st_mode) == 0o600


def test_a_client_that_left_is_in_the_log(logged: Logged) -> None:
    before = len(logged.lines(0))
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{logged.url}/completions", json=body, headers={"x-api-key": logged.key}) as stream:
        next(stream.iter_lines())
    (line,) = logged.lines(before + 1)[before:]
    assert (line["status"], line["finish"]) == (200, "abort") and 0 < line["completion_tokens"] < 400


def test_the_log_goes_on_in_a_new_file(logged: Logged) -> None:
    logged.ask()
    (logged.folder / "log").rename(logged.folder / "log.1")
    logged.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while not (logged.folder / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    logged.ask()
    assert len(logged.lines(1)) == 1 and logged.ask().status_code == 200


def test_logs_filters_and_follows(logged: Logged) -> None:
    log = logged.folder / "log"
    before = len(logged.lines(0))
    logged.ask()
    logged.ask(max_tokens=0)
    lines = logged.lines(before + 2)

    def ids(*options: str | Path) -> list[str]:
        done = penstock("logs", log, "--json", *options)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["id"] for line in done.stdout.splitlines()]

    assert ids() == [line["id"] for line in lines]
    assert ids("--status", "4xx") == [line["id"] for line in lines if 400 <= line["status"] < 500] != []
    assert ids("--status", "400", "-n", "1") == [lines[-1]["id"]] == ids("--id", lines[-1]["id"])
    assert ids("--tenant", "nobody") == [] == ids("--slower", "999")
    text = penstock("logs", log, "-n", "1").stdout.decode()
    assert lines[-1]["id"] in text and " 400 " in text and "acme" in text
    with running(argv("logs", log, "--follow", "--json", "-n", "1"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["id"] == lines[-1]["id"]
        logged.ask()
        assert json.loads(process.stdout.readline())["id"] == logged.lines(len(lines) + 1)[-1]["id"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_logs_follows_into_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name that is moved away, with a new file at once or by and by; or by a file that is cut."""
    monkeypatch.setattr("penstock.cli.logs.POLL_SECONDS", 0)
    log, old = tmp_path / "log", tmp_path / "log.1"

    def write(file: Path, *ids: str) -> None:
        with file.open("a") as stream:
            for id in ids:
                stream.write(json.dumps({"time": "", "id": id, "tenant": None, "status": 200, "total_s": 1}) + "\n")

    write(log, "a", "b")
    found = ([line["id"] for line in records] for records in readings(log, follow=True))
    assert [next(found), next(found)] == [["a", "b"], []]
    log.rename(old)
    write(old, "c")
    assert [next(found), next(found)] == [["c"], []], "no file is there for a while"
    log.touch()
    assert next(found) == []
    write(old, "d")
    write(log, "e")
    assert [next(found), next(found), next(found)] == [["d"], ["e"], []], "the end of the old one, then the new one"
    log.write_bytes(b"")
    assert next(found) == []
    write(log, "f")
    assert [next(found), next(found)] == [["f"], []]


def test_logs_passes_over_what_is_no_line(tmp_path: Path) -> None:
    line = {
        "time": "2026-01-01T00:00:00Z",
        "id": "a",
        "tenant": None,
        "status": 200,
        "total_s": 1.0,
        "path": "/\x1b[2J",
    }
    (tmp_path / "log").write_bytes(b"{\n\xff\n[]\n{}\n" + json.dumps(line).encode() + b"\n" + json.dumps(line).encode())
    done = penstock("logs", tmp_path / "log")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and b"\x1b" not in done.stdout
    assert penstock("logs", tmp_path / "none").returncode == 3


def test_a_log_that_cannot_be_had_stops_the_start(stories: Path, tmp_path: Path) -> None:
    done = penstock("serve", stories, "--port", "0", "--log-file", tmp_path)
    assert done.returncode == 3 and b"log_not_written" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_costs_lines_and_nothing_else(stories: Path, runtime: Path) -> None:
    options = ("--port", "0", "--num-threads", "1", "--log-file", "/dev/full")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(argv("serve", stories, *options), **pipes, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        for _ in range(3):
            body = {"prompt": PROMPT, "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        deadline = time.monotonic() + 20
        while "penstock_log_lines_dropped_total 3.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read().count("no longer logged") == 1


def test_ps_and_top_see_a_server_with_keys(logged: Logged) -> None:
    done = penstock("ps", "--json")
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["pid"], row["model"]) == (logged.process.pid, "stories260k")
    assert row["url"] == logged.url.removesuffix("/v1") and row["status"]["alive"] and b"penstock-" not in done.stdout
    listed = penstock("ps").stdout.decode().splitlines()
    assert len(listed) == 2 and re.search(r"stories260k  http://127\S+  ready +0 +0%$", listed[1]), listed
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(logged.ask, max_tokens=480, n=16, ignore_eos=True)
        shown = ""
        while "decode" not in shown and not busy.done():
            shown = penstock("top", "--once", "--interval", "0.1").stdout.decode()
        assert re.search(r"batch +16 running, 0 waiting", shown), shown
        assert re.search(r"tokens/s +[1-9]\d* generated", shown) and "acme" in shown
        assert busy.result().status_code == 200
    assert penstock("top", "--once", "1").stderr.endswith(b"code: server_not_found\n")


@pytest.fixture
def one_at_a_time(runtime: Path, tmp_path: Path) -> Iterator[Server]:
    server = start(Path("penstock-tiny"), "--max-num-seqs", "1", "--store", str(tmp_path / "store"))
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_a_request_in_line_is_told_from_one_that_is_computed(one_at_a_time: Server) -> None:
    """Two that take long: not all that has no token yet is a prompt that is being computed."""
    url = one_at_a_time.url
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}

    def phases() -> list[str]:
        return [request["phase"] for request in httpx.get(f"{url}/status").json()["requests"]]

    def ask(stack: ExitStack) -> Iterator[str]:
        """Lines; whoever drops them closes the stream."""
        return stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)).iter_lines()

    with ThreadPoolExecutor(1) as pool, ExitStack() as streams:
        first = ask(streams)
        next(first)
        later = pool.submit(lambda: next(ask(streams)))
        while len(seen := phases()) < 2 or seen[1] == "read":
            assert not later.done(), seen
        shown = penstock("top", str(one_at_a_time.process.pid), "--once", "--interval", "0.1").stdout.decode()
        assert seen == ["decode", "queue"]
        assert re.search(r"^ *decode .*\n *queue ", shown, re.MULTILINE), shown
        assert len([*first]) > 900
        later.result()


def test_phases() -> None:
    """Of two samples one is in line again: it is decoded. Of both: it waits for memory."""

    def sample(id: str, queued: float | None, state: str) -> RequestTrace:
        return RequestTrace(0, id, 0, 4, 0, 5, 4, 1, 0.0, queued, 0, 0.0, state, None)

    caller = Gate(Admission(100)).caller([], "1")
    assert phase_of(caller, []) == "read"
    caller.admitted = 1.0
    assert phase_of(caller, []) == "prompt", "a vector's: nobody knows which are its own"
    caller.answer = "cmpl-a"
    own, other, strange = (sample(id, 0.1, "running") for id in ("cmpl-a-0-1", "cmpl-ab-0", "x"))
    assert by_answer({"cmpl-a", "cmpl-ab"}, [own, other, strange]) == {
        "cmpl-a": [own],
        "cmpl-ab": [other],
        "": [strange],
    }
    assert phase_of(caller, []) == "queue"
    assert phase_of(caller, [sample("cmpl-a-0", None, "running")]) == "queue", "it has been in no step"
    assert phase_of(caller, [sample("cmpl-a-0", 0.1, "running")]) == "prompt"
    caller.first_token = 2.0
    two = [sample("cmpl-a-0", 0.1, "waiting"), sample("cmpl-a-0", 0.1, "running")]
    assert phase_of(caller, two) == phase_of(caller, []) == "decode" and phase_of(caller, two[:1]) == "memory"
    caller.waits = True
    assert phase_of(caller, two) == "load"


def test_files_of_servers_are_private_and_those_of_the_dead_go(runtime: Path) -> None:
    known = {server.pid for server in servers()}
    me = Presence(pid=os.getpid(), began=began(os.getpid()) or 0, model="m", url="u", admin="u", token="t")
    with present(me):
        path = runtime / f"{os.getpid()}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert {server.pid for server in servers()} == known | {os.getpid()}
        (runtime / "1.json").write_text('{"pid":1,"began":1,"model":"m","url":"u","admin":"u"}')  # another process now
        (runtime / "2.json").write_text("{")
        assert {server.pid for server in servers()} == known | {os.getpid()}
        assert not (runtime / "1.json").exists()
        (runtime / "2.json").unlink()
    assert {server.pid for server in servers()} == known
    runtime.chmod(0o755)  # others could write here before, so nothing here is believed
    try:
        assert servers() == []
    finally:
        runtime.chmod(0o700)


def test_a_server_that_hangs_is_shown_as_such(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        me = Presence(pid=os.getpid(), began=began(os.getpid()) or 0, model="hung", url=url, admin=url)
        with present(me):
            listed = penstock("ps").stdout.decode()
            assert re.search(r"hung +\S+ +no answer", listed), listed
            assert b"server_gone" in penstock("top", str(os.getpid())).stderr
