"""What a server refuses, and that it says so in one shape: wrong, huge, deep, foreign, slow and malformed requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import AsyncLLM
from penstock.core.service import Sink, Submission, Update
from penstock.serving import build_app, edge
from penstock.serving.limits import (
    MAX_BODY_BYTES,
    MAX_CHOICES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_MESSAGES,
    MAX_PROMPTS,
)
from penstock.spec import EngineConfig
from penstock.text import ChatTemplate
from penstock.wire.faults import quarantined
from servers import MODEL, PROMPT, TEMPLATE, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), dtype="float32", num_threads=1))
    yield llm
    llm.close()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after checking that it has OpenAI's shape and can be found in a log."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) < 700
    error: dict[str, Any] = body["error"]
    return error


def post(server: Server, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": MODEL, "max_tokens": 2, **fields}, timeout=60)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 129), ("n", 10**30), ("max_tokens", 0), ("max_tokens", 2.5),
        ("seed", 2**70), ("presence_penalty", 2.1), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("typical_p", 0), ("dry_multiplier", -1), ("dry_sequence_breakers", [1]), ("thinking_budget", -1),
        ("thinking_soft", 2), ("logits_rules", []), ("logprobs", -1), ("logprobs", 129),
        ("best_of", 0), ("best_of", 129), ("stop", ""), ("stop", ["a"] * 65), ("stop", [1]), ("stop", "x" * 1025),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 1025), ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}), ("logit_bias", {str(i): 1 for i in range(1025)}), ("min_tokens", 3),
        ("priority", 10**9), ("stream", "yes"), ("stream_options", {"include_usage": True}), ("model", "m" * 513),
        ("prompt", []), ("prompt", [""] * (MAX_PROMPTS + 1)), ("prompt", ["a", 1]), ("prompt", None),
        ("prompt", [[1], "a"]), ("prompt", [[[1]]]), ("prompt", [1.5]), ("prompt", {"a": 1}), ("prompt", 5),
    ],
)  # fmt: skip
def test_bad_fields_are_named(server: Server, field: str, value: object) -> None:
    error = error_of(post(server, COMPLETIONS, **{"prompt": PROMPT, field: value}), 400)
    assert (error["code"], error["param"].split("[")[0]) == ("invalid_parameter", field), error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", [USER] * (MAX_MESSAGES + 1)), ("messages", [{"role": "pirate", "content": "a"}]),
        ("messages", [{"content": "a"}]), ("messages", "hi"), ("messages", [{"role": "user", "content": 5}]),
        ("top_logprobs", 21), ("top_logprobs", 3), ("logprobs", 2), ("max_completion_tokens", 0),
    ],
)  # fmt: skip
def test_bad_chat_fields_are_named(server: Server, field: str, value: object) -> None:
    error = error_of(post(server, CHAT, **{"messages": [USER], field: value}), 400)
    assert error["code"] == "invalid_parameter" and error["param"].startswith(field), error


def test_required_fields_and_allowed_values_are_told(server: Server) -> None:
    def said(path: str, **fields: Any) -> tuple[str, str]:
        error = error_of(post(server, path, **fields), 400)
        return error["message"], error["param"]

    assert said(COMPLETIONS) == ("prompt is required [invalid_parameter]", "prompt")
    assert said(CHAT)[1] == "messages"
    text, param = said(CHAT, messages=[USER, {"content": "a"}])
    assert text.startswith("messages[1].role is required") and param == "messages[1].role"
    text, param = said(CHAT, messages=[USER, {"role": "pirate", "content": "a"}])
    assert "system, developer, user, assistant, tool" in text and param == "messages[1].role"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "suffix", "x"), (COMPLETIONS, "prompt_logprobs", 1),
        (COMPLETIONS, "use_beam_search", True), (COMPLETIONS, "prompt_embeds", "x"),
        (CHAT, "functions", [{"name": "f"}]), (CHAT, "chat_template", "{{ 1 }}"),
        (CHAT, "response_format", {"type": "structural_tag"}), (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "chat_template_kwargs", {"tokenize": True}), (CHAT, "reasoning_effort", "high"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_and_not_ignored(server: Server, path: str, field: str, value: object) -> None:
    base = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [USER]}
    error = error_of(post(server, path, **base, **{field: value}), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)


def test_only_text_parts_are_supported(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://localhost/"}}]
    error = error_of(post(server, CHAT, messages=[{"role": "user", "content": parts}]), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages[0].content[1].type")


def test_values_that_ask_for_nothing_are_accepted(server: Server) -> None:
    harmless = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "u",
        "metadata": {"a": 1},
    }
    assert post(server, CHAT, messages=[USER], **harmless, store=False).status_code == 200
    asked = {"messages": [USER], "temperature": 0, "max_tokens": 4}
    vain = {"store": True, "verbosity": "low", "prediction": {"type": "content", "content": "a"}}
    answers = [post(server, CHAT, **asked, **fields).json()["choices"] for fields in ({}, vain)]
    assert answers[0] == answers[1]  # none of them can make an answer wrong
    nulls = dict.fromkeys(("temperature", "n", "stop", "seed", "logprobs", "stream", "logit_bias", "suffix", "best_of"))
    assert post(server, COMPLETIONS, prompt=PROMPT, **nulls).status_code == 200


def test_prompts_that_cannot_be_served(server: Server) -> None:
    aborted = server.metric("penstock_samples_finished_total", 'reason="abort"')
    for prompt, code in (
        ([5] * 512, "context_length_exceeded"), (PROMPT * 200, "context_length_exceeded"),
        ([512], "token_out_of_range"), ([-1], "token_out_of_range"), ([10**30], "token_out_of_range"),
        ([[]], "empty_prompt"),
    ):  # fmt: skip
        for stream in (False, True):  # before the first token a stream fails like any other request
            assert error_of(post(server, COMPLETIONS, prompt=prompt, stream=stream), 400)["code"] == code
    assert server.metric("penstock_samples_finished_total", 'reason="abort"') == aborted
    too_many = post(server, COMPLETIONS, prompt=["a"] * (MAX_CHOICES // 128 + 1), n=128)
    assert error_of(too_many, 400)["code"] == "too_many_choices"
    error = error_of(post(server, COMPLETIONS, prompt=PROMPT, model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_prompt_beyond_the_context_is_told_as_clients_know_it(server: Server) -> None:
    """LiteLLM and LangChain look for the code or for these very words."""
    for prompt, told in (([5] * 600, "600 tokens"), ("a" * (2 << 20), f"{2 << 20} characters")):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
        error = caught.value
        assert (error.code, error.type) == ("context_length_exceeded", "invalid_request_error")
        text = error.body["message"]  # type: ignore[index]
        assert "this model's maximum context length is 512 tokens" in text and told in text
        assert text.endswith("[prompt_too_long]")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"null", b'{"prompt": "a"} x', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}', b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"tools":' * 100_000, b"\0" * 100,
    ],
)  # fmt: skip
def test_bodies_that_are_not_json(server: Server, body: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"})
        assert error_of(response, 400)["code"] in ("invalid_json", "invalid_parameter", "too_many_values")


def test_bodies_have_a_limit(server: Server) -> None:
    def send(size: int, chunked: bool) -> httpx.Response:
        frame = len(b'{"prompt":""}')
        body = b'{"prompt":"' + b"a" * (size - frame) + b'"}'
        content = iter([body[i : i + 65536] for i in range(0, size, 65536)]) if chunked else body
        return httpx.post(
            server.url + COMPLETIONS, content=content, headers={"content-type": "application/json"}, timeout=60
        )

    for chunked in (False, True):
        assert error_of(send(MAX_BODY_BYTES, chunked), 400)["code"] == "context_length_exceeded"
        assert error_of(send(MAX_BODY_BYTES + 1, chunked), 413)["code"] == "body_too_large"


def test_a_body_declared_too_large_is_refused_unread(server: Server) -> None:
    with socket.create_connection(server.address, timeout=10) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_headers_have_limits(server: Server) -> None:
    def send(count: int, size: int) -> int:
        with httpx.Client() as client:
            own = client.build_request("GET", server.url + "/live").headers.raw
            used = sum(len(name) + len(value) for name, value in own)
            extra = {f"x-{i:03}": "v" for i in range(count - len(own) - 1)}
            used += sum(len(name) + len(value) for name, value in extra.items())
            return client.get(server.url + "/live", headers={**extra, "x-pad": "p" * (size - used - 5)}).status_code

    assert send(MAX_HEADERS, 8000) == 200
    assert send(MAX_HEADERS + 1, 8000) == 431
    assert send(10, MAX_HEADER_BYTES) == 200
    assert send(10, MAX_HEADER_BYTES + 1) == 431
    with contextlib.suppress(httpx.TransportError):  # it may be cut off before it has read the answer
        assert send(10, 1 << 20) in (400, 431)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example", ""]
)
def test_a_foreign_host_name_is_refused(server: Server, host: str) -> None:
    for path in ("/live", "/metrics", "/v1/models"):
        assert error_of(httpx.get(server.url + path, headers={"host": host}), 403)["code"] == "host_not_allowed"


def test_own_host_names_are_accepted(server: Server) -> None:
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000"):
        assert httpx.get(server.url + "/live", headers={"host": host}).status_code == 200


def test_only_json_is_read(server: Server) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        response = httpx.post(server.url + COMPLETIONS, content=body, headers={"content-type": kind})
        assert error_of(response, 415)["code"] == "unsupported_media_type"
    kind = "Application/JSON; charset=utf-8"
    assert httpx.post(server.url + COMPLETIONS, content=body, headers={"content-type": kind}).status_code == 200


def test_unknown_paths_and_methods(server: Server) -> None:
    assert error_of(httpx.get(server.url + "/nowhere"), 404)["code"] == "unknown_path"
    wrong = httpx.get(server.url + COMPLETIONS)
    assert error_of(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"
    assert error_of(httpx.get(server.url + "/v1/models/../../etc/passwd%00"), 404)
    assert 'path="other",status="404"' in httpx.get(server.url + "/metrics").text


def test_malformed_http_does_no_harm(server: Server) -> None:
    for junk in (
        b"\x16\x03\x01\x00\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"A" * 200_000,
    ):
        with socket.create_connection(server.address, timeout=10) as connection:
            try:
                connection.sendall(junk)
                assert connection.recv(100)[:12] in (b"", b"HTTP/1.1 400")
            except ConnectionError:
                pass
    assert httpx.get(server.url + "/live").status_code == 200


# -- in this process: what a real server does not do on demand ----------------------------------------


def ask(llm: AsyncLLM, path: str, body: object, hosts: frozenset[str] | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        app, context = build_app(llm, hosts=hosts)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            answer = await client.post(path, json=body)
        await context.batches.close()
        return answer

    return asyncio.run(send())


def test_chat_needs_a_template(llm: AsyncLLM) -> None:
    assert error_of(ask(llm, CHAT, {"messages": [USER]}), 400)["code"] == "no_chat_template"


def test_unknown_fields_are_ignored_and_logged(llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "user": "u", "suffix": None}
    assert ask(llm, COMPLETIONS, body).status_code == 200 and not caplog.records
    assert ask(llm, COMPLETIONS, body | {"unheard_of": [1], "line\nbreak": 2}).status_code == 200
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith(r"['line\nbreak', 'unheard_of']")
    ask(llm, COMPLETIONS, body | {"x" * 9999: 1})
    assert len(caplog.records[-1].getMessage()) < 400


def test_the_model_may_be_named_as_it_was_given(llm: AsyncLLM, stories: Path) -> None:
    for name, status in ((stories.name, 200), (str(stories), 200), (str(stories.parent), 404)):
        assert ask(llm, COMPLETIONS, {"model": name, "prompt": PROMPT, "max_tokens": 1}).status_code == status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_ended_a_choice_is_told(server: Server, path: str, stream: bool) -> None:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [USER]}
    for fields, reason in (({"stop": ["e"]}, "e"), ({"stop_token_ids": list(range(3, 512))}, int), ({}, None)):
        response = post(server, path, **asked, **({"max_tokens": 40} | fields if fields else {}), stream=stream)
        text = response.text.rstrip().split("\n\n")[-2].removeprefix("data: ") if stream else response.text
        found = json.loads(text)["choices"][0]["stop_reason"]
        assert isinstance(found, int) if reason is int else found == reason, (fields, found)


def test_texts_of_other_exceptions_stay_inside(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(submission: Submission, sink: Sink) -> None:
        raise RuntimeError("canary at 0xdeadbeef")

    monkeypatch.setattr(llm.engine.service, "submit", broken)
    for stream in (False, True):
        response = ask(llm, COMPLETIONS, {"prompt": PROMPT, "stream": stream})
        assert error_of(response, 500)["code"] == "internal_error"
        assert "canary" not in response.text
    assert "canary" in caplog.text


def test_official_clients_do_not_send_again_what_kills_engines(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """They try twice more what was answered 500."""
    sent: list[str] = []

    def deadly(submission: Submission, sink: Sink) -> None:
        sent.append(submission.id)
        sink(Update(submission.id, 0, finish_reason="error", error=quarantined(3)))

    monkeypatch.setattr(llm.engine.service, "submit", deadly)

    async def ask_both() -> None:
        face = AsyncLLM(replace(llm.engine, chat=ChatTemplate(TEMPLATE)))
        transport = httpx.ASGITransport(build_app(face)[0])
        async with httpx.AsyncClient(transport=transport) as http:
            theirs = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http)
            with pytest.raises(openai.InternalServerError, match="request_quarantined"):
                await theirs.completions.create(model=llm.engine.name, prompt=PROMPT)
            body = {"model": llm.engine.name, "max_tokens": 4, "messages": [USER]}
            other = await http.post("http://server/v1/messages", json=body)  # whose client has a transport of its own
            assert (other.status_code, other.headers["x-should-retry"]) == (500, "false")

    asyncio.run(ask_both())
    assert len(sent) == 2


@pytest.fixture
def breaking(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers break off after two updates of the engine."""
    submit = llm.engine.service.submit

    def breaking(submission: Submission, sink: Sink) -> None:
        updates = iter(range(1000))

        def once(update: Any) -> None:
            if next(updates) >= 2:
                update.tokens, update.finish_reason = (-1, -1), "length"  # no tokenizer has it
            sink(update)

        submit(submission, once)

    monkeypatch.setattr(llm.engine.service, "submit", breaking)


@pytest.mark.usefixtures("breaking")
def test_an_error_after_the_first_event_is_the_last_event(llm: AsyncLLM) -> None:
    response = ask(llm, COMPLETIONS, {"prompt": PROMPT, "stream": True, "max_tokens": 6})
    assert response.status_code == 200 and "[DONE]" not in response.text
    last = json.loads(response.text.rstrip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"


@pytest.mark.usefixtures("breaking")
def test_an_error_in_a_stream_of_items_is_numbered_as_its_events_are(llm: AsyncLLM) -> None:
    """As OpenAI's client reads it."""

    async def events() -> list[Any]:
        app, context = build_app(AsyncLLM(replace(llm.engine, chat=ChatTemplate(TEMPLATE))))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            theirs = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http)
            stream = await theirs.responses.create(
                model=llm.engine.name, input="hi", stream=True, max_output_tokens=6, store=False
            )
            told = [event async for event in stream]
        await context.batches.close()
        return told

    *before, last = asyncio.run(events())
    assert isinstance(last, openai.types.responses.ResponseErrorEvent) and last.code == "internal_error"
    assert len(before) > 2 and [event.sequence_number for event in (*before, last)] == list(range(len(before) + 1))


def test_what_still_runs_at_the_end_is_told_so(llm: AsyncLLM) -> None:
    async def send() -> tuple[list[httpx.Response], httpx.Response, list[httpx.Response]]:
        app, context = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            body = {"prompt": [PROMPT, "The"], "max_tokens": 400, "ignore_eos": True}
            running = [asyncio.create_task(client.post(COMPLETIONS, json=body | {"stream": s})) for s in (True, False)]
            while len(context.live) < 4 or not llm.engine.service.status().counters.generated_tokens:
                await asyncio.sleep(0.01)
            context.draining = True
            refused = await client.post(COMPLETIONS, json=body)
            probes = [await client.get(path) for path in ("/ready", "/health")]
            await asyncio.sleep(0.1)
            await context.abort_all()
            return [await task for task in running], refused, probes

    (streamed, whole), refused, (ready, health) = asyncio.run(send())
    assert json.loads(streamed.text.split("data: ")[-1])["error"]["code"] == "shutting_down"
    told = health.json()
    assert health.status_code == 503 and health.headers["retry-after"] and told["error"] == ready.json()["error"]
    assert (told["status"], [model["state"] for model in told["models"]]) == ("draining", ["loaded"])
    for response in (whole, refused, ready):
        assert error_of(response, 503)["code"] == "shutting_down" and response.headers["retry-after"]


def test_a_slow_body_is_not_waited_for(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.05)

    async def slow() -> Any:
        yield b'{"prompt": '
        await asyncio.sleep(5)

    async def send() -> httpx.Response:
        app, _ = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(COMPLETIONS, content=slow(), headers={"content-type": "application/json"})

    assert error_of(asyncio.run(send()), 408)["code"] == "request_timeout"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "model prompt messages stream stream_options n temperature top_p top_k min_p repetition_penalty presence_penalty "
    "frequency_penalty logit_bias seed stop stop_token_ids min_tokens ignore_eos skip_special_tokens "
    "include_stop_str_in_output priority add_special_tokens logprobs echo best_of top_logprobs "
    "tools tool_choice parallel_tool_calls chat_template_kwargs reasoning_effort add_generation_prompt "
    "continue_final_message response_format suffix user input instructions previous_response_id reasoning text "
    "metadata max_output_tokens system thinking stop_sequences tokens return_token_strs output_config output_format "
    "truncation conversation items".split()
)
OTHERS = {
    "/v1/responses": [],
    "/v1/responses/input_tokens": [],
    "/v1/conversations": [],
    "/v1/conversations/conv_1": [],
    "/v1/conversations/conv_1/items": [],
    "/v1/messages": ["messages", "max_tokens"],
    "/v1/messages/count_tokens": ["messages"],
    "/tokenize": ["prompt"],
    "/detokenize": [],
}
NEAR = st.sampled_from(
    [0, 1, -1, 2, 128, 129, 2**31, 2**63, 2**64, 0.0, 1.0, 1e308, "", "a", [], [1], [511], ["a"], True, {}]
)


@settings(max_examples=2 * settings.default.max_examples)
@given(path=st.sampled_from([COMPLETIONS, CHAT, *OTHERS]), fields=st.dictionaries(FIELDS, NEAR | JSON, max_size=5))
def test_any_json_gets_an_answer_or_a_named_error(llm: AsyncLLM, path: str, fields: dict[str, Any]) -> None:
    base = {"prompt": "a", "messages": [USER], "max_tokens": 1}
    if path in OTHERS:
        base = {name: base[name] for name in OTHERS[path]}
        base |= {"input": "a"} if path.startswith("/v1/responses") else {}
    other = AsyncLLM(replace(llm.engine, chat=ChatTemplate(TEMPLATE)))
    response = ask(other, path, base | fields)
    if path.startswith("/v1/messages") and response.status_code != 200:
        assert response.status_code in (400, 404) and response.json()["type"] == "error", response.text
    elif response.status_code == 404 and {"previous_response_id", "conversation"} & fields.keys():
        assert response.json()["error"]["code"] in ("response_not_found", "conversation_not_found", "model_not_found")
    elif response.status_code == 404 and path.startswith("/v1/conversations/"):
        assert response.json()["error"]["code"] == "conversation_not_found"
    elif response.status_code != 200:
        error_of(response, 404 if response.json()["error"]["code"] == "model_not_found" else 400)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_a_request_leaves_open_is_as_the_model_recommends(llm: AsyncLLM, path: str) -> None:
    """vLLM's rule; the fields of the request come first, and OpenAI's defaults last."""
    engine = replace(llm.engine, chat=ChatTemplate(TEMPLATE), recommended={"temperature": 0.0, "max_tokens": 7})
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [USER]}

    def answer(llm: AsyncLLM, **fields: Any) -> tuple[Any, int]:
        body = ask(llm, path, asked | fields).json()
        (choice,) = body["choices"]
        return choice.get("text") or choice["message"]["content"], body["usage"]["completion_tokens"]

    recommended, plain = AsyncLLM(engine), AsyncLLM(replace(engine, recommended={}))
    greedy = answer(plain, temperature=0, max_tokens=7)
    assert greedy[1] == 7 and answer(recommended) == greedy == answer(recommended, temperature=None)
    drawn = answer(plain, seed=1, max_tokens=9)
    assert drawn[1] == 9 and answer(recommended, temperature=1, seed=1, max_tokens=9) == drawn != greedy


RACE = """
import sys, threading, msgspec
from typing import Annotated
from penstock.serving.edge import settle

sys.setswitchinterval(1e-6)
count = Annotated[int, msgspec.Meta(ge=0)]
shapes = []
for i in range(200):
    inner = msgspec.defstruct(f"Inner{i}", [(f"g{k}", count | None, None) for k in range(20)])
    fields = [(f"f{k}", list[count] | str | inner | None, None) for k in range(20)]
    shapes.append(msgspec.defstruct(f"Outer{i}", fields))
if sys.argv[1] == "settled":
    settle()

def read(shape):
    ready.wait()
    for _ in range(20):
        msgspec.json.decode(b'{"f19": [2], "f3": {"g19": 3}}', type=shape)

for shape in shapes:
    ready = threading.Barrier(4)
    threads = [threading.Thread(target=read, args=(shape,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def test_threads_may_decode_a_shape_at_once() -> None:
    """Without it the process ends by SIGSEGV: seen in a server whose first batch came while another body was read."""
    subprocess.run([sys.executable, "-c", RACE, "settled"], check=True, timeout=120)
