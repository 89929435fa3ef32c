"""Disks that are full and memory that is short; docs/reliability.md has them in its table."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import BUNDLED
from servers import Server, start
from test_server_processes import ask, engine_of, stream

MB = 1 << 20


def until(done: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def logging(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    with (tmp_path / "stderr").open("w") as log:
        server = start(BUNDLED, "--log-file", str(tmp_path / "log"), log=log)
        with server.process:
            yield server, tmp_path
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0


def asked(server: Server, times: int) -> list[str]:
    body = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
    with httpx.Client(timeout=60) as client:
        answers = [client.post(f"{server.url}/v1/completions", json=body) for _ in range(times)]
    assert {each.status_code for each in answers} == {200}
    return [each.json()["choices"][0]["text"] for each in answers]


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_log(logging: tuple[Server, Path]) -> None:
    """No file of the server may grow by more than 5 KB; then it may. Torn lines end, and what is lost is counted."""
    server, folder = logging
    log, front = folder / "log", server.process.pid
    expected = asked(server, 20)
    until(lambda: log.read_bytes().count(b"\n") == 20)
    full = log.stat().st_size + 5000
    was = resource.prlimit(front, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    assert asked(server, 200) == expected[:1] * 200
    until(lambda: server.metric("penstock_log_lines_dropped_total") > 180)
    dropped, size = server.metric("penstock_log_lines_dropped_total"), log.stat().st_size
    assert size == full and not log.read_bytes().endswith(b"\n")
    resource.prlimit(front, resource.RLIMIT_FSIZE, was)
    asked(server, 30)
    until(lambda: log.read_bytes().count(b"\n") - 1 == 250 - dropped)
    broken = []
    for line in log.read_text().splitlines():
        try:
            json.loads(line)
        except ValueError:
            broken.append(line)
    assert len(broken) == 1  # the one that was torn
    said = (folder / "stderr").read_text()
    assert said.count("no longer logged: [Errno 27]") == said.count("logged again") == 1
    assert server.metric("penstock_log_lines_dropped_total") == dropped
    print(f"{dropped:.0f} of 200 lines dropped while the disk was full")


@pytest.mark.slow
def test_logs_on_a_device_that_is_always_full(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        server = start(BUNDLED, "--log-file", "/dev/full", log=full)
        with server.process:
            assert len(set(asked(server, 100))) == 1
            until(lambda: server.metric("penstock_log_lines_dropped_total") == 100)
            assert server.metric("penstock_stderr_lines_dropped_total") >= 1  # that it cannot log
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_gets_no_more_memory() -> None:
    """Its address space may not grow, while 32 streams of all kinds run: greedy, grammars, log-probabilities, n."""
    server = start(BUNDLED, "--max-num-seqs", "48")
    bodies = [ask(i) for i in range(32)]
    with server.process, ThreadPoolExecutor(32) as pool:
        undisturbed = list(pool.map(lambda body: stream(server, body, [0]), bodies))
        for room in (0, 8 * MB, 64 * MB):
            engine = engine_of(server)
            size = int(Path(f"/proc/{engine}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(engine, resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
            answers = list(pool.map(lambda body: stream(server, body, [0]), bodies))
            assert answers == undisturbed
            counts = [server.metric(f"penstock_{name}_total") for name in ("failed_steps", "engine_restarts")]
            print(f"{room // MB} MB: {counts[0]:.0f} failed steps, {counts[1]:.0f} restarts so far")
        server.wait_until_idle()
        assert server.metric("penstock_kv_blocks_used") == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_a_server_that_cannot_write_its_store(tmp_path: Path) -> None:
    """Files of clients: an upload that has no place is refused, others are not touched, and later there is place."""
    server = start(BUNDLED, "--store", str(tmp_path / "store"), log=subprocess.DEVNULL)  # type: ignore[arg-type]
    with server.process:

        def upload(size: int) -> httpx.Response:
            files = {"file": ("a.jsonl", b"x" * size), "purpose": (None, "batch")}
            return httpx.post(f"{server.url}/v1/files", files=files, timeout=60)

        kept = upload(1000)
        assert kept.status_code == 200, kept.text
        was = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2 * MB, resource.RLIM_INFINITY))
        refused = upload(8 * MB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unwritable")
        assert httpx.get(f"{server.url}/v1/files/{kept.json()['id']}/content").content == b"x" * 1000
        assert len(set(asked(server, 10))) == 1
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, was)
        assert upload(8 * MB).status_code == 200
        assert len(list((tmp_path / "store").rglob("*.part"))) == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
