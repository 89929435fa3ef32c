"""What a server answers, and how it ends, while its first model is being loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from commands import penstock, running

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
        tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
        (engine,) = " ".join((task / "children").read_text() for task in tasks).split()
        began = time.monotonic()
        server.process.send_signal(number)
        refused = server.asked.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert server.process.communicate(timeout=30) == ("", "") and server.process.returncode == code
        assert time.monotonic() - began < 20, "nobody waits for what cannot come"
        assert not Path(f"/proc/{engine}").exists()
