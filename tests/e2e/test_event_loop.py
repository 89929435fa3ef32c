"""How long the event loop of a server is held up while 32 clients stream and eight send megabytes.

The server's own histogram says it; docs/reliability.md has the table that ``pytest --all -rP`` prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from commands import running
from servers import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
CLIENTS, STREAMS, BODIES = 8, 32, 64
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
    """Over an engine that takes no time for whatever is asked."""
    argv = [sys.executable, str(HERE / "quick_server.py"), "--port", "0"]
    with running(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield Server(process.stdout.readline().split()[-1].removesuffix("/v1"), process)


def lags(server: Server) -> list[float]:
    """Beats that were late by at most each of BUCKETS; all of them last."""
    name = "penstock_event_loop_lag_seconds"
    return [*(server.metric(f"{name}_bucket", f'le="{each}"') for each in BUCKETS), server.metric(f"{name}_count")]


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

            def send(i: int) -> int:
                body = bodies[i % CLIENTS]
                return client.post(f"{server.url}/v1/completions", content=body, headers=headers).status_code

            statuses = set(pool.map(send, range(BODIES)))
        after = lags(server)
        told = json.loads(beside.communicate(timeout=300)[0])
    assert statuses <= {200, 400} and told["errors"] == [] and all(len(texts) == 1 for texts in told["texts"])
    beats = [now - then for now, then in zip(after, before, strict=True)]
    late = [1 - each / beats[-1] for each in beats[:-1]]
    shares = " | ".join(f"{100 * share:.2f}" for share in late)
    print(f"\n| {load} | {beats[-1]:.0f} | {shares} | {1e3 * told['gaps'][int(0.99 * len(told['gaps']))]:.0f} |")
    assert late[-2] <= 0.01, "one beat in a hundred came 0.2 s late"
