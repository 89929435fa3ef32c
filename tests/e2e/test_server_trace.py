"""What a server tells of its engine: to administrators alone, without texts, and within bounds."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from collector import Collector, told
from commands import penstock
from conftest import BUNDLED
from penstock.base import ConfigError
from penstock.cli import serve
from penstock.serving import spans as module
from penstock.serving.history import Visit
from penstock.serving.requestlog import Line
from penstock.serving.spans import Spans
from servers import PROMPT, Server, start

SECRET = "zymurgy"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
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
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def served(keys: dict[str, str], collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        mock.patch.dict(os.environ, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url),
        (tmp_path_factory.mktemp("traced") / "log").open("w+") as log,
    ):
        running = start(BUNDLED, "--keys", keys["file"], log=log)
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        log.seek(0)
        assert log.read() == ""


def traced(served: Server, keys: dict[str, str], id: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    named = {"x-request-id": id, "x-api-key": keys["acme"]} | headers
    return httpx.post(f"{served.url}/v1/completions", json={"prompt": PROMPT} | body, headers=named, timeout=60)


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
    (record,) = ask(served, "/requests", keys["acme"]).json()["requests"]
    assert sum(record["phases"].values()) == pytest.approx(record["total_s"], abs=1e-4)
    exposed = ask(served, "/metrics", keys["admin"]).text
    for phase, seconds in record["phases"].items():  # the only request so far
        sums = re.findall(rf'^penstock_request_phase_seconds_sum{{phase="{phase}"}} (\S+)$', exposed, re.MULTILINE)
        assert [float(value) for value in sums] == [pytest.approx(seconds, abs=1e-9)]
    done = penstock("trace", served.url, "--out", tmp_path / "t.json", "--seconds", "600", "--api-key", keys["admin"])
    assert done.returncode == 0 and b"ui.perfetto.dev" in done.stdout, done.stderr
    text = (tmp_path / "t.json").read_text()
    events = json.loads(text)["traceEvents"]
    assert SECRET not in text and not [word for word in words(events) if not KNOWN.fullmatch(word)]
    (request,) = (event for event in events if event["name"] == "request")
    assert request["args"]["answer"] == answer.json()["id"]
    assert request["dur"] == pytest.approx(1e6 * record["total_s"], abs=1)
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
    before = ask(served, "/debug/engine?seconds=60", keys["admin"]).json()
    complete(served, keys["admin"], n=1, max_tokens=8)
    last = before["steps"][-1]["number"] if before["steps"] else -1
    seen = ask(served, f"/debug/engine?seconds=60&after={last}", keys["admin"]).json()
    assert [step["number"] for step in seen["steps"]] == list(range(last + 1, last + 1 + len(seen["steps"])))
    assert sum(step["prompt"] + step["decode"] + step["again"] for step in seen["steps"]) >= 8
    assert all(step["us"]["forward"] > 0 and step["us"]["plan"] >= 0 for step in seen["steps"])
    for pool in seen["pools"]:
        assert pool["free"] + pool["open"] + pool["sealed"] + pool["idle"] == pool["total"]
        assert len(base64.b64decode(pool["map"])) == -(-pool["total"] // pool["stride"]) <= 4096
    assert seen["live"] == 0 and seen["requests"] == []


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


def test_a_run_without_a_server_can_be_traced(tmp_path: Path) -> None:
    done = penstock("run", f"{PROMPT} {SECRET}", "--max-tokens", "5", "--num-threads", "1", "--trace", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    assert not [word for word in words(events) if SECRET in word]
    steps = [event["args"] for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
    assert steps[0]["prompt"] > 3 and sum(step["prompt"] + step["decode"] for step in steps) >= steps[0]["prompt"] + 4
    (tmp_path / "prompts").write_text("a\n")
    refused = penstock("run", "--input", tmp_path / "prompts", "--trace", tmp_path / "t")
    assert refused.returncode == 2 and b"trace_of_one" in refused.stderr


# -- spans -----------------------------------------------------------------------------------------------------------


def test_a_request_has_a_span_in_its_callers_trace_and_its_phases_below(
    served: Server, keys: dict[str, str], collector: Collector
) -> None:
    before = time.time()
    parent = f"00-{TRACE}-{PARENT}-01"
    answer = traced(
        served, keys, "a", {"max_tokens": 8, "seed": 1}, traceparent=parent, tracestate="congo=t61rcWkgMzE"
    ).json()
    span, children = collector.of("a")
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "congo=t61rcWkgMzE")
    assert (span.name, span.kind) == (f"text_completion {BUNDLED.name}", Span.SPAN_KIND_SERVER)
    said = told(span)
    finish = said.pop("gen_ai.response.finish_reasons")
    assert [value.string_value for value in finish.values] == [answer["choices"][0]["finish_reason"]]
    expected = {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": BUNDLED.name, "gen_ai.response.model": BUNDLED.name, "gen_ai.response.id": answer["id"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0, "http.response.status_code": 200, "url.path": "/v1/completions",
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    assert PROMPT not in str(span) and answer["choices"][0]["text"].split()[0] not in said.values()

    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    queue, prefill, decode = children
    assert span.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano == span.end_time_unix_nano
    first = 1e9 * said["gen_ai.response.time_to_first_chunk"]
    assert prefill.end_time_unix_nano == pytest.approx(span.start_time_unix_nano + first, abs=1)
    assert 1e9 * before <= span.start_time_unix_nano + 1e7 and span.end_time_unix_nano <= 1e9 * (time.time() + 0.01)
    (resource,) = collector.requests[0].resource_spans
    assert "penstock" in [
        pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"
    ]


def test_odd_trace_headers_begin_a_trace_of_their_own(
    served: Server, keys: dict[str, str], collector: Collector
) -> None:
    odd = ["00-" + "0" * 32 + f"-{PARENT}-01", "x" * 5000, "00--", "ff-" + TRACE + f"-{PARENT}-01", "é"]
    for number, parent in enumerate(odd):
        with httpx.Client() as client:
            headers = [
                ("x-api-key", keys["acme"]),
                ("x-request-id", f"odd{number}"),
                ("traceparent", parent.encode("latin-1")),
                ("tracestate", "="),
            ]
            asked = {"prompt": PROMPT, "max_tokens": 1}
            assert client.post(f"{served.url}/v1/completions", json=asked, headers=headers).status_code == 200  # type: ignore[arg-type]
    for number in range(len(odd)):
        span, _ = collector.of(f"odd{number}")
        assert span.parent_span_id == b"" and span.trace_id.hex() != TRACE


def test_a_refused_request_has_a_span_and_an_unsampled_one_has_none(
    served: Server, keys: dict[str, str], collector: Collector
) -> None:
    assert traced(served, keys, "bad", {"max_tokens": -1}).status_code == 400
    traced(served, keys, "unsampled", {"max_tokens": 1}, traceparent=f"00-{TRACE}-{PARENT}-00")
    traced(served, keys, "later", {"max_tokens": 1})
    span, children = collector.of("bad")
    assert told(span)["error.type"] == "400" and children == []
    assert span.status.code == 0, "a fault of the client is none of the server's"
    collector.of("later")
    assert "unsampled" not in [told(span).get("penstock.request.id") for span in collector.spans()]


def line() -> Line:
    return Line(
        time=datetime.now(UTC), id="a", tenant=None, key=None, path="/v1/rerank", status=500, model="m",
        prompt_tokens=9, cached_tokens=4, completion_tokens=0, finish=None, admitted_s=0.25, started_s=None,
        first_token_s=None, total_s=4.0, ahead=0, longest_gap_s=0.1,
    )  # fmt: skip


def test_spans_that_nobody_takes_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.0)
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    sent = Spans("http://127.0.0.1:9")
    began = time.monotonic()
    for _ in range(5):
        sent.add(Visit(line(), 0.0), [(b"traceparent", b"a"), (b"traceparent", b"b")])
    assert time.monotonic() - began < 1  # whoever adds does not wait
    deadline = time.monotonic() + 60
    while sent.dropped < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sent.close()
    assert sent.dropped == 5

    monkeypatch.setattr(module, "MAX_PENDING", 0)
    sent.add(Visit(line(), 0.0), [])
    assert sent.dropped == 6


def test_what_is_pending_is_sent_at_the_end(collector: Collector) -> None:
    sent = Spans(collector.url + "/")
    sent.add(Visit(line(), 0.0), [])
    sent.close()
    (span,) = (span for span in collector.spans() if span.name == "/v1/rerank m")
    assert span.status.code == 2 and sent.dropped == 0


def test_wrong_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not begin with http"):
        Spans("collector:4317")
    assert serve._spans(None) is None
    monkeypatch.setitem(sys.modules, "penstock.serving.spans", None)  # as where the extra is not installed
    with pytest.raises(ConfigError, match=r"Pip install 'penstock\[otel\]'.*otel_missing"):
        serve._spans("http://127.0.0.1:9")
