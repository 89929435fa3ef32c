"""A real server process, spoken to as its users do: with OpenAI's own client."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.core.service import MAX_PRIORITY
from penstock.serving.decoding import decode
from penstock.serving.errors import HTTPError
from penstock.serving.priorities import rank
from penstock.serving.schemas import CompletionRequest
from servers import MODEL, PROMPT, TEMPLATE, Server, start


@pytest.fixture(autouse=True)
def nothing_left_behind(server: Server) -> Iterator[None]:
    """Whatever a test did, its requests are gone and hold no KV block afterwards."""
    yield
    server.wait_until_idle()
    assert server.metric("penstock_kv_blocks_used") == 0


def test_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_has_openai_s_shape(server: Server) -> None:
    answer = server.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < 60
    [choice] = answer.choices
    assert choice.index == 0 and choice.finish_reason == "length" and choice.logprobs is None
    assert choice.text.startswith(", there was a little girl named Lily")
    usage = answer.usage
    assert usage is not None and usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    assert (
        server.client.completions.create(model=MODEL, prompt=PROMPT).usage.completion_tokens <= 16
    )  # OpenAI's default


def test_prompts_and_samples_are_numbered(server: Server) -> None:
    """Choice i * n + j is sample j of prompt i, and is what that prompt gives alone."""
    prompts = [PROMPT, "The dog", "A cat"]
    ask = {"model": MODEL, "max_tokens": 12, "temperature": 0.9, "seed": 5, "n": 2}
    answer = server.client.completions.create(prompt=prompts, **ask)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    alone = [server.client.completions.create(prompt=prompt, **ask) for prompt in prompts]
    assert [c.text for c in answer.choices] == [c.text for one in alone for c in one.choices]
    assert len({c.text for c in answer.choices}) == 6
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)


def test_token_ids_are_prompts_too(server: Server) -> None:
    whole = server.client.completions.create(model=MODEL, prompt=[1, 403, 407], max_tokens=8, temperature=0, echo=True)
    assert whole.usage.prompt_tokens == 3
    several = server.client.completions.create(
        model=MODEL, prompt=[[1, 403, 407], [1, 403]], max_tokens=8, temperature=0, echo=True
    )
    assert several.choices[0].text == whole.choices[0].text and len(several.choices) == 2


def test_seeds(server: Server) -> None:
    def text(seed: int | None) -> str:
        ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "top_p": 0.95}
        return server.client.completions.create(**ask, seed=seed).choices[0].text

    assert text(7) == text(7)
    assert len({text(1), text(2), text(3)}) > 1
    assert len({text(None) for _ in range(3)}) > 1


def test_logprobs_of_completions(server: Server) -> None:
    answer = server.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(10)]
    for token, drawn, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3 and drawn == top[token] == max(top.values()) and drawn <= 0


def test_best_of(server: Server) -> None:
    """The samples are those of n = best_of; the ones that the model was surest of, token by token, are kept."""
    prompts = [PROMPT, "The dog"]
    ask = {"model": MODEL, "prompt": prompts, "max_tokens": 16, "temperature": 1.2, "seed": 5, "logprobs": 0}
    every = server.client.completions.create(**ask, n=5)
    best = server.client.completions.create(**ask, n=2, best_of=5, echo=False)
    expected = []
    for first in (0, 5):
        means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in every.choices[first:][:5]}
        expected += sorted(means, key=lambda text: -means[text])[:2]
    assert [(c.index, c.text) for c in best.choices] == list(enumerate(expected))
    assert best.usage == every.usage and {c.finish_reason for c in best.choices} <= {"length", "stop"}
    assert all("".join(c.logprobs.tokens) == c.text for c in best.choices)
    plain = server.client.completions.create(**{**ask, "logprobs": None}, n=1, best_of=5, echo=True)
    assert [c.text for c in plain.choices] == [p + text for p, text in zip(prompts, expected[::2], strict=True)]
    assert plain.choices[0].logprobs is None
    same = server.client.completions.create(**ask, n=2, best_of=2)
    assert [c.text for c in same.choices] == [every.choices[i].text for i in (0, 1, 5, 6)]
    for wrong in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 128, "prompt": ["a"] * 5}):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.completions.create(**{**ask, **wrong})
        assert caught.value.param == "best_of"


def test_stop_and_echo(server: Server) -> None:
    plain = server.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, echo=True)
    assert plain.choices[0].text.startswith(PROMPT + ", there was")
    stopped = server.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stop=[" girl"])
    assert stopped.choices[0].text == ", there was a little" and stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 24
    kept = server.client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        stop=" girl",
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == ", there was a little girl"


def test_vllm_s_extra_fields(server: Server) -> None:
    ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24}
    greedy = server.client.completions.create(**ask, temperature=0).choices[0].text
    top_1 = server.client.completions.create(**ask, temperature=2, seed=1, extra_body={"top_k": 1}).choices[0].text
    assert top_1 == greedy
    extra = {
        "min_tokens": 24,
        "ignore_eos": True,
        "repetition_penalty": 1.3,
        "min_p": 0.01,
        "priority": 1,
        "stop_token_ids": [5],
    }
    assert server.client.completions.create(**ask, temperature=0, extra_body=extra).usage.completion_tokens == 24
    banned = server.client.completions.create(**ask, temperature=0, logit_bias={"432": -100, "15": -100})
    assert banned.choices[0].text != greedy


def test_service_tiers_are_priorities() -> None:
    def priority(least: int = -MAX_PRIORITY, **fields: Any) -> int | None:
        asked = decode(json.dumps({"prompt": "a"} | fields).encode(), CompletionRequest)
        rank(asked, least)
        return asked.priority

    assert priority(service_tier="priority") == -priority(service_tier="flex") < 0  # type: ignore[operator]
    assert priority(service_tier="priority", priority=3) == 3 and priority(service_tier="auto") == priority() == 0
    for least, told in ((0, 0), (-6, -6), (-5, 0), (4, 4)):
        assert priority(least, service_tier="priority") == told and priority(least, service_tier="flex") == 6
        assert priority(least) == max(0, least) and priority(least, priority=least) == least
        with pytest.raises(HTTPError, match="priority_not_allowed"):
            priority(least, priority=least - 1)
    with pytest.raises(HTTPError) as refused:
        priority(service_tier="gold")
    assert refused.value.param == "service_tier"


def test_answers_tell_their_tier_and_what_computed_them(server: Server, hermes: Server) -> None:
    told = set()
    for tier, used in (("flex", "flex"), ("priority", "priority"), ("auto", "default"), (None, "default")):
        for path, asked in (
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            body: dict[str, Any] = {"max_tokens": 2, "service_tier": tier} | asked
            chunks = httpx.post(f"{server.url}/v1/{path}", json=body | {"stream": True}).text.split("\n\n")[:-2]
            answers = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
            answers.append(httpx.post(f"{server.url}/v1/{path}", json=body).json())
            assert len(answers) > 1 and {answer["service_tier"] for answer in answers} == {used}
            told |= {answer["system_fingerprint"] for answer in answers}
    (fingerprint,) = told
    assert re.fullmatch("fp_[0-9a-f]{16}", fingerprint)
    other = hermes.client.completions.create(model="m", prompt="a", max_tokens=1)
    assert other.system_fingerprint not in {fingerprint, None}
    response = hermes.client.responses.create(model="m", input="a", max_output_tokens=1, service_tier="flex")
    assert response.service_tier == "flex"


def test_an_engine_that_goes_by_arrival_has_one_tier(stories: Path, tmp_path: Path) -> None:
    """Nothing was served earlier or later, and its answers do not say so."""
    template, said = tmp_path / "template", [{"role": "user", "content": "a"}]
    template.write_text(TEMPLATE)
    server = start(stories, "--scheduling-policy", "fcfs", "--chat-template", str(template))
    told = []
    for path, asked in (
        ("completions", {"prompt": "a", "max_tokens": 1}),
        ("chat/completions", {"messages": said, "max_tokens": 1}),
        ("responses", {"input": "a", "max_output_tokens": 1}),
        ("messages", {"messages": said, "max_tokens": 1}),
    ):
        for tier in ("priority", "flex"):
            answer = httpx.post(f"{server.url}/v1/{path}", json={"service_tier": tier} | asked).json()
            told.append(answer["usage" if path == "messages" else "service_tier"])
    server.process.kill()
    server.process.wait()
    assert told[:6] == ["default"] * 6 and [usage["service_tier"] for usage in told[6:]] == ["standard"] * 2


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    ask = {
        "model": MODEL,
        "prompt": [PROMPT, "The dog"],
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 3,
        "n": 2,
        "logprobs": 1,
    }
    whole = server.client.completions.create(**ask)
    chunks = list(server.client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert len(pieces) > 3
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
        assert [x for piece in pieces for x in piece.logprobs.tokens] == choice.logprobs.tokens
        assert [x for piece in pieces for x in piece.logprobs.text_offset] == choice.logprobs.text_offset


def test_chat(server: Server) -> None:
    messages = [
        {"role": "system", "content": "Tell"},
        {"role": "user", "content": [{"type": "text", "text": "a story"}]},
    ]
    ask = {
        "model": MODEL,
        "messages": messages,
        "max_completion_tokens": 16,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.client.chat.completions.create(**ask)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    rendered = "<s>system: Tell\nuser: a story\nassistant:"
    same = server.client.completions.create(
        model=MODEL, prompt=rendered, max_tokens=16, temperature=0, extra_body={"add_special_tokens": False}
    )
    assert choice.message.content == same.choices[0].text and whole.usage.prompt_tokens == same.usage.prompt_tokens
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
    assert spelled.lstrip() == choice.message.content.lstrip()
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob  # greedy

    chunks = list(server.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_continues_to_the_end_of_the_context_by_default(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = server.client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 512


def test_sse_framing(server: Server) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "my-id"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-request-id"] == "my-id" and "content-length" not in response.headers
    events = response.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert len(events) == 5 and all(event.startswith("data: {") and "\n" not in event for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_many_at_once_get_what_they_get_alone(server: Server) -> None:
    def text(seed: int) -> str:
        stream = server.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0.7, seed=seed, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(text, range(16)))
    assert together[:4] == [text(seed) for seed in range(4)]


def _long_request(stream: bool, url: str) -> tuple[socket.socket, bytes]:
    body = json.dumps(
        {"model": MODEL, "prompt": PROMPT, "max_tokens": 400, "n": 4, "ignore_eos": True, "stream": stream}
    ).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection, connection.recv(65536) if stream else b""


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: Server, stream: bool) -> None:
    aborted = server.metric("penstock_samples_finished_total", 'reason="abort"')
    generated = server.metric("penstock_generation_tokens_total")
    connection, first = _long_request(stream, server.url)
    assert not stream or b"200 OK" in first
    deadline = time.monotonic() + 20
    while server.metric("penstock_requests_running") == 0:
        assert time.monotonic() < deadline
    connection.close()
    server.wait_until_idle()
    assert server.metric("penstock_samples_finished_total", 'reason="abort"') == aborted + 4
    assert server.metric("penstock_generation_tokens_total") < generated + 1600


def test_metrics_count(server: Server) -> None:
    names = ("penstock_generation_tokens_total", "penstock_prompt_tokens_total", "penstock_prefix_hit_tokens_total")
    before = [server.metric(name) for name in names]
    first_tokens = server.metric("penstock_time_to_first_token_seconds_count")
    prompt = "Lily and Tom went to the park. They saw a big red ball. Tom said, can we play with the ball?"
    for _ in range(2):
        answer = server.client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0)
    after = [server.metric(name) for name in names]
    assert after[0] - before[0] == 12 and after[1] - before[1] == 2 * answer.usage.prompt_tokens
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert after[2] - before[2] == cached >= 16 and cached % 16 == 0
    assert server.metric("penstock_time_to_first_token_seconds_count") == first_tokens + 2
    assert 'path="/v1/completions",status="200"' in httpx.get(f"{server.url}/metrics").text


def test_probes(server: Server) -> None:
    for path in ("/live", "/ready"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.text) == (200, "ok\n")
    told = httpx.get(f"{server.url}/health")
    assert told.status_code == 200 and told.json() == {
        "status": "ready",
        "version": version("penstock"),
        "models": [{"name": MODEL, "state": "loaded", "alive": True, "progress": None, "failure": None}],
    }


def test_sigterm_lets_running_requests_finish(stories: Path) -> None:
    doomed = start(stories, "--dtype", "float32")
    ask = {
        "model": "stories260k",
        "prompt": PROMPT,
        "max_tokens": 300,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    expected = doomed.client.completions.create(**ask).choices[0].text
    stream = doomed.client.completions.create(**ask, stream=True)
    pieces = [next(stream).choices[0].text]
    doomed.process.send_signal(signal.SIGTERM)
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == expected
    assert doomed.process.wait(30) == 0
    with pytest.raises(openai.APIConnectionError):
        doomed.client.models.list()
