"""How long the event loop of a server is held up while 32 clients stream and eight send megabytes.

The server's own histogram says it; docs/reliability.md has the table that ``pytest --all -rP`` prints, and the bar.
What fails here is a loop that is held up on any machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import BUNDLED
from servers import Server, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
CLIENTS, STREAMS, SECONDS = 8, 32, 15.0
BUCKETS = ("0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5")

Body = Callable[[int], bytes]
TEXT = "Once upon a time there was a house. "


def of(**fields: object) -> bytes:
    return json.dumps({"max_tokens": 1, **fields}, separators=(",", ":")).encode()


LOADS: dict[str, Body] = {
    "nobody": lambda i: of(prompt=f"{i}"),
    "texts of 1 MB": lambda i: of(prompt=f"{i} " + TEXT * 29_000),
    "ids of 1 MB": lambda i: of(prompt=[i, *range(300, 4300)] * 52),
    "ids of 8 MB": lambda i: of(prompt=[i, *range(300, 4300)] * 400),
    "brackets of 6 MB": lambda i: of(prompt="a", metadata=i).replace(b"}", b',"x":' + b"[" * (6 << 20) + b"}"),
    "values of 8 MB": lambda i: of(prompt="a", stop_token_ids=[i] * 4_000_000),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of the bundled model. An engine that takes no time would keep the loop busy by itself."""
    server = start(BUNDLED, "--num-threads", "1", log=subprocess.DEVNULL)
    yield server
    server.process.terminate()
    assert server.process.wait(60) == 0


def lags(server: Server) -> list[float]:
    """Beats that were late by at most each of BUCKETS; all of them last."""
    told = httpx.get(f"{server.url}/metrics", timeout=60).text
    name = "penstock_event_loop_lag_seconds"
    lines = [*(f'{name}_bucket{{le="{each}"}}' for each in BUCKETS), f"{name}_count"]
    return [float(told.partition(f"\n{line} ")[2].split()[0]) for line in lines]


@pytest.mark.parametrize("load", LOADS)
def test_the_loop_is_free_while_bodies_come(server: Server, load: str) -> None:
    bodies = [LOADS[load](i) for i in range(CLIENTS)]
    script = [sys.executable, str(HERE / "bystanders.py"), server.url, str(STREAMS)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as beside:
        while server.metric("penstock_queue_requests") < STREAMS / 2:
            threading.Event().wait(0.05)
        before = lags(server)
        with ThreadPoolExecutor(CLIENTS) as pool, httpx.Client(timeout=300) as client:
            headers = {"content-type": "application/json"}

            def send(body: bytes) -> set[int]:
                """Again and again."""
                seen = set()
                while time.monotonic() < deadline:
                    answer = client.post(f"{server.url}/v1/completions", content=body, headers=headers)
                    seen.add(answer.status_code)
                return seen

            deadline = time.monotonic() + SECONDS
            statuses = set().union(*pool.map(send, bodies))
        after = lags(server)
        told = json.loads(beside.communicate(timeout=300)[0])
    assert statuses <= {200, 400, 503} and told["errors"] == [] and all(len(texts) == 1 for texts in told["texts"])
    beats = [now - then for now, then in zip(after, before, strict=True)]
    late = [1 - each / beats[-1] for each in beats[:-1]]
    shares = " | ".join(f"{100 * share:.2f}" for share in late)
    print(f"\n| {load} | {beats[-1]:.0f} | {shares} | {1e3 * told['gaps'][int(0.99 * len(told['gaps']))]:.0f} |")
    assert late[-2] <= 0.01, "one beat in a hundred came 0.2 s late"
