"""What a server tells of its engine: to administrators alone, without texts, and within bounds."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import penstock
from conftest import BUNDLED
from servers import PROMPT, Server, start

SECRET = "zymurgy"
KNOWN = re.compile(
    r"[XCM]|(process|thread)_name|engine|samples|requests|scheduler|executor|(plan|commit|publish|step) \d+"
    r"|forward|sample|KV blocks|tokens of the step|request|read|queue|prefill|decode|preempted|wait"
    r"|[0-9a-f]{32}|cmpl-[0-9a-f]{32}(-0 #\d)?|/v1/completions|length"
)
"""All that a trace may say."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    made = {"file": str(file)}
    for name, options in (("admin", ["--role", "admin"]), ("acme", ["--tenant", "acme"])):
        made[name] = penstock("keys", "add", file, *options).stdout.decode().strip()
    return made


@pytest.fixture(scope="module")
def served(keys: dict[str, str]) -> Iterator[Server]:
    running = start(BUNDLED, "--keys", keys["file"])
    yield running
    running.process.terminate()
    assert running.process.wait(30) == 0


def words(value: Any) -> Iterator[str]:
    """Every text in it."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from words(inner)


def ask(served: Server, path: str, key: str) -> httpx.Response:
    return httpx.get(served.url + path, headers={"x-api-key": key}, timeout=60)


def complete(served: Server, key: str, **fields: Any) -> httpx.Response:
    body = {"prompt": f"{PROMPT} {SECRET}", "max_tokens": 40, "n": 3, "seed": 1, "ignore_eos": True} | fields
    return httpx.post(f"{served.url}/v1/completions", json=body, headers={"x-api-key": key}, timeout=60)


def test_a_trace_has_each_request_and_none_of_its_words(served: Server, keys: dict[str, str], tmp_path: Path) -> None:
    answer = complete(served, keys["acme"])
    assert answer.status_code == 200, answer.text
    (told,) = ask(served, "/requests", keys["acme"]).json()["requests"]
    assert sum(told["phases"].values()) == pytest.approx(told["total_s"], abs=1e-4)
    done = penstock("trace", served.url, "--out", tmp_path / "t.json", "--seconds", "600", "--api-key", keys["admin"])
    assert done.returncode == 0 and b"ui.perfetto.dev" in done.stdout, done.stderr
    text = (tmp_path / "t.json").read_text()
    events = json.loads(text)["traceEvents"]
    assert SECRET not in text and not [word for word in words(events) if not KNOWN.fullmatch(word)]
    (request,) = (event for event in events if event["name"] == "request")
    assert request["args"]["answer"] == answer.json()["id"]
    assert request["dur"] == pytest.approx(1e6 * told["total_s"], abs=1)
    pieces = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (3, request["tid"])]
    assert sum(piece["dur"] for piece in pieces[1:] if "client" not in piece["name"]) == pytest.approx(
        request["dur"], abs=2
    )
    samples = [event for event in events if event["name"] == "thread_name" and event["pid"] == 2]
    assert sorted(event["args"]["name"] for event in samples) == [f"{answer.json()['id']}-0 #{i}" for i in range(3)]
    for sample in samples:  # they lie within what their client waited for
        lived = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (2, sample["tid"])]
        assert lived[0]["ts"] >= request["ts"] and sum(e["dur"] for e in lived) <= request["dur"]
        assert sum(e["args"].get("tokens", 0) for e in lived if e["name"] == "decode") >= 39


def test_the_engine_tells_its_steps_once_and_its_blocks(served: Server, keys: dict[str, str]) -> None:
    before = ask(served, "/debug/engine?seconds=3600", keys["admin"]).json()
    complete(served, keys["admin"], n=1, max_tokens=8)
    last = before["steps"][-1]["number"] if before["steps"] else -1
    told = ask(served, f"/debug/engine?seconds=3600&after={last}", keys["admin"]).json()
    assert [step["number"] for step in told["steps"]] == list(range(last + 1, last + 1 + len(told["steps"])))
    assert sum(step["prompt"] + step["decode"] + step["again"] for step in told["steps"]) >= 8
    assert all(step["us"]["forward"] > 0 and step["us"]["plan"] >= 0 for step in told["steps"])
    for pool in told["pools"]:
        assert pool["free"] + pool["open"] + pool["sealed"] + pool["idle"] == pool["total"]
        assert len(base64.b64decode(pool["map"])) == -(-pool["total"] // pool["stride"]) <= 4096
    assert told["live"] == 0 and told["requests"] == []


@pytest.mark.parametrize("path", ["/debug/engine", "/debug/trace"])
def test_odd_questions_are_refused(served: Server, keys: dict[str, str], path: str) -> None:
    for value in ("-1", "nan", "1e9", "x", "%00", "inf"):
        answer = ask(served, f"{path}?seconds={value}", keys["admin"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")


def test_only_administrators_may_ask(served: Server, keys: dict[str, str], tmp_path: Path) -> None:
    for path in ("/debug/engine?after=1", "/debug/trace"):
        assert ask(served, path, keys["acme"]).status_code == 403
        assert httpx.get(served.url + path).status_code == 401
    refused = penstock("trace", served.url, "--out", tmp_path / "t", "--api-key", keys["acme"])
    assert refused.returncode == 3 and b"trace_refused" in refused.stderr and not (tmp_path / "t").exists()
    for url, code in (("ftp://x", b"invalid_url"), ("http://127.0.0.1:9", b"server_unreachable")):
        assert code in penstock("trace", url, "--out", tmp_path / "t").stderr
    refused = penstock("trace", served.url, "--out", tmp_path / "no" / "t", "--api-key", keys["admin"])
    assert b"trace_not_written" in refused.stderr
