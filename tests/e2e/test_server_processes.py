"""A server is two processes. What answers loads no torch; what computes may die, and no stream learns of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import penstock
from servers import Server, start

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 40}}, "required": ["name"]}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.1, "top_p": 0.9, "frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 0.9, "n": 2, "min_tokens": 20},
    {"temperature": 1.0, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"temperature": 0.8, "logprobs": 3, "dry_multiplier": 0.8},
    {"temperature": 1.0, "stop": [" the "], "top_k": 20},
    {"temperature": 1.3, "seed": 77, "n": 3, "logprobs": 0},
    {"temperature": 1.0, "min_p": 0.05, "stop": ["."], "min_tokens": 30},
]


def engine_of(server: Server) -> int:
    """Each thread of a process has its own children."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return int(" ".join((task / "children").read_text() for task in tasks).split()[0])


def ask(index: int) -> dict[str, Any]:
    prompt = f"Chapter {index}. Once upon a time" + " there was a house," * (index % 5 * 10)
    kind = {"seed": index, "max_tokens": 60 + index % 7 * 10, **KINDS[index % len(KINDS)]}
    return {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **kind}


def stream(server: Server, body: dict[str, Any], seen: list[int]) -> list[tuple[Any, ...]]:
    """By choice: text, log-probabilities, why it ended; then the number of tokens."""
    choices: dict[int, list[Any]] = {}
    usage = None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                seen[0] += 1
                so_far = choices.setdefault(choice["index"], ["", [], None])
                so_far[0] += choice["text"]
                if choice["logprobs"]:
                    so_far[1] += zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
                    so_far[1] += choice["logprobs"]["top_logprobs"] or []
                so_far[2] = choice["finish_reason"] or so_far[2]
    assert usage is not None
    return [*(tuple(choices[i]) for i in sorted(choices)), (usage["completion_tokens"],)]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    model = Path(penstock.__file__).parent / "bundled_nano"
    path = tmp_path_factory.mktemp("server") / "log"
    with path.open("w") as log:
        server = start(model, "--max-num-seqs", "48", log=log)
        yield server, path
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_the_front_loads_no_torch(bundled: tuple[Server, Path]) -> None:
    server, _ = bundled
    engine = engine_of(server)
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, engine)}
    assert "libtorch" not in maps[server.process.pid] and "libtorch" in maps[engine]


@pytest.mark.timeout(600)
def test_kill_9_of_the_engine_under_32_streams(bundled: tuple[Server, Path]) -> None:
    """Every stream ends with the text, the log-probabilities and the reason of a run that nothing happened to."""
    server, log = bundled
    bodies = [ask(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        undisturbed = list(pool.map(lambda body: stream(server, body, [0]), bodies))
        total = sum(sum(len(choice[0]) for choice in answer[:-1]) for answer in undisturbed)
        assert total > 5000
        for kills in (1, 2):
            seen = [0]
            running = [pool.submit(stream, server, body, seen) for body in bodies]
            for number in range(kills):
                until(lambda seen=seen, enough=200 + 700 * number: seen[0] > enough)  # type: ignore[misc]
                os.kill(engine_of(server), signal.SIGKILL)
                until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
                until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
            assert any(not answer.done() for answer in running)
            assert [answer.result() for answer in running] == undisturbed
    server.wait_until_idle()
    assert server.metric("penstock_kv_blocks_used") == 0 and server.metric("penstock_engine_restarts_total") == 3
    assert log.read_text().count("was killed by signal 9") == 3


def test_all_tasks_cross(bundled: tuple[Server, Path]) -> None:
    server, _ = bundled
    best = {"prompt": "The house", "max_tokens": 12, "temperature": 1.0, "seed": 1, "best_of": 4, "n": 2}
    answers = [httpx.post(f"{server.url}/v1/completions", json=best).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1] and len(answers[0]) == 2
    vectors = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["The house", "A dog"]}).json()["data"]
    assert len(vectors) == 2 and sum(x * x for x in vectors[0]["embedding"]) == pytest.approx(1.0)
    twice = {"prompt": "The house by the sea was old. " * 12, "max_tokens": 1}
    usages = [httpx.post(f"{server.url}/v1/completions", json=twice).json()["usage"] for _ in range(2)]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] > 0
    wrong = {"prompt": "a", "structured_outputs": {"regex": "("}}
    refused = httpx.post(f"{server.url}/v1/completions", json=wrong)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_regex")


def test_an_engine_that_cannot_load_says_why() -> None:
    argv = [sys.executable, "-m", "penstock.cli", "serve", "--port", "0", "--kv-memory", "1K"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert ended.returncode and "Traceback" not in ended.stderr and "kv" in ended.stderr.lower()


def until(done: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)
