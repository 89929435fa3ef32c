"""Ollama's API as its own client sees it. A rule makes the bundled model say what is needed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from penstock.text import Tokenizer
from scripted import saying
from servers import Server, start

USER = {"role": "user", "content": "How is the weather in Paris?"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 8, "num_ctx": 512}
Make = Callable[..., ollama.Client]


class Scripted(httpx.HTTPTransport):
    """Adds to each request what the model is to say."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        self.fields = fields

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.dumps(json.loads(request.read()) | self.fields).encode()
        headers = {**request.headers, "content-length": str(len(body))}
        return super().handle_request(httpx.Request(request.method, request.url, headers=headers, content=body))


@pytest.fixture
def client(hermes: Server, tokenizer: Tokenizer) -> Make:
    def make(says: str | None = None) -> ollama.Client:
        transport = None if says is None else Scripted(saying(says, tokenizer))
        return ollama.Client(host=hermes.url, transport=transport, timeout=60)

    return make


def test_an_answer_is_that_of_the_other_apis(client: Make, hermes: Server) -> None:
    answer = client().chat("m", [USER], options=GREEDY)
    other = hermes.client.chat.completions.create(
        model="m",
        messages=[USER],
        temperature=0,
        max_tokens=8,  # type: ignore[list-item]
    )
    assert answer.message.content == other.choices[0].message.content and answer.message.role == "assistant"
    assert (answer.model, answer.done, answer.done_reason) == ("m", True, "length")
    assert (answer.prompt_eval_count, answer.eval_count) == (other.usage.prompt_tokens, 8)  # type: ignore[union-attr]
    assert answer.load_duration == 0 and answer.created_at is not None and answer.created_at.endswith("Z")
    assert answer.total_duration and answer.eval_duration and answer.prompt_eval_duration
    assert answer.total_duration >= answer.eval_duration + answer.prompt_eval_duration
    pieces = list(client().chat("m:latest", [USER], options=GREEDY, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == answer.message.content
    assert len(pieces) > 4 and [piece.done for piece in pieces[-2:]] == [False, True]
    assert pieces[-1].eval_count == 8 and pieces[0].eval_count is None


def test_lines_are_the_default(hermes: Server) -> None:
    body = {"model": "m", "messages": [USER], "options": GREEDY}
    response = httpx.post(f"{hermes.url}/api/chat", json=body, timeout=60)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) > 4 and lines[-1]["done_reason"] == "length"
    whole = httpx.post(f"{hermes.url}/api/chat", json=body | {"stream": False}, timeout=60)
    assert whole.headers["content-type"] == "application/json" and whole.json()["done"]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_thoughts(client: Make, stream: bool) -> None:
    says = f"<think>\nHm.\n</think>\n\nI will look.\n{CALL}"
    asked: dict[str, Any] = {"tools": TOOLS, "think": True, "options": {"temperature": 0}}
    if stream:
        pieces = list(client(says).chat("m", [USER], stream=True, **asked))
        made = [call for piece in pieces for call in piece.message.tool_calls or ()]
        said = "".join(piece.message.content or "" for piece in pieces)
        thought = "".join(piece.message.thinking or "" for piece in pieces)
    else:
        message = client(says).chat("m", [USER], **asked).message
        made, said, thought = list(message.tool_calls or ()), message.content or "", message.thinking or ""
    assert [(call.function.name, call.function.arguments) for call in made] == [("get_weather", {"city": "Paris"})]
    assert (said, thought) == ("I will look.", "Hm.")


def test_a_call_and_its_result_go_back(client: Make) -> None:
    first = client(CALL).chat("m", [USER], tools=TOOLS, options={"temperature": 0})
    assert first.done_reason == "stop"
    history = [USER, first.message, {"role": "tool", "tool_name": "get_weather", "content": "rain"}]
    answer = client("Take an umbrella.").chat("m", history, tools=TOOLS)
    assert answer.message.content == "Take an umbrella."
    alone = client("x").chat("m", [USER], tools=TOOLS)
    assert answer.prompt_eval_count and alone.prompt_eval_count
    assert answer.prompt_eval_count > alone.prompt_eval_count + 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_turn_of_the_assistant_s_goes_on(client: Make, hermes: Server, stream: bool) -> None:
    history = [USER, {"role": "assistant", "content": "The weather is"}]
    body = {"continue_final_message": True, "temperature": 0}
    asked: dict[str, Any] = {"model": "m", "messages": history, "max_tokens": 8}
    same = hermes.client.chat.completions.create(**asked, extra_body=body)
    answer = client().chat("m", history, options=GREEDY, stream=stream)
    pieces = list(answer) if stream else [answer]
    assert "".join(piece.message.content or "" for piece in pieces) == same.choices[0].message.content != ""
    assert pieces[-1].prompt_eval_count == same.usage.prompt_tokens  # type: ignore[union-attr]
    first = client(CALL).chat("m", [USER], tools=TOOLS, options={"temperature": 0}).message
    called = client("x").chat("m", [USER, first], tools=TOOLS)
    assert called.message.content == "x" and not called.message.thinking


def test_forms(client: Make) -> None:
    options = {"temperature": 1.2, "seed": 3, "num_predict": 60}
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = client().chat("m", [USER], format=schema, options=options)
    assert set(json.loads(answer.message.content or "")) == {"n"}
    assert isinstance(json.loads(client().generate("m", "Once", format="json", options=options).response), dict)


def test_generate(client: Make, hermes: Server) -> None:
    raw = client().generate("m", "Once upon a time", raw=True, options=GREEDY)
    plain = hermes.client.completions.create(model="m", prompt="Once upon a time", temperature=0, max_tokens=8)
    assert raw.response == plain.choices[0].text and raw.eval_count == 8
    pieces = list(client().generate("m", "Once upon a time", raw=True, options=GREEDY, stream=True))
    assert "".join(piece.response for piece in pieces) == raw.response and pieces[-1].done_reason == "length"
    asked = client().generate("m", "Hello", system="Be brief.", options=GREEDY)
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert asked.response == client().chat("m", same, options=GREEDY).message.content
    stopped = client("one two three").generate("m", "Hello", options={"stop": [" two"]})
    assert (stopped.response, stopped.done_reason) == ("one", "stop")
    thought = client("<think>Hm.</think>Yes.").generate("m", "Hello", think=True)
    assert (thought.response, thought.thinking) == ("Yes.", "Hm.")


def test_log_probabilities(client: Make) -> None:
    answer = client().chat("m", [USER], options=GREEDY, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None and len(answer.logprobs) == 8
    for entry in answer.logprobs:
        assert entry.top_logprobs is not None and len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    pieces = client().generate("m", "Hello", options=GREEDY, logprobs=True, stream=True)
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 8


def test_a_request_for_nothing_says_that_the_model_is_there(client: Make) -> None:
    assert client().generate("m", keep_alive="5m").done_reason == "load"
    answer = client().chat("m", keep_alive=-1)
    assert answer.done_reason == "load" and answer.message.content == ""
    assert client().generate("m", keep_alive=0).done_reason == "load", "the only model stays"


def test_refusals_name_the_field_that_was_sent(hermes: Server) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/api/chat": {"messages": [USER], "think": "extreme"},
        "/v1/responses": {"input": "a", "reasoning": {"effort": "extreme"}},
        "/v1/chat/completions": {"messages": [USER], "reasoning_effort": "extreme"},
    }
    answers = [httpx.post(hermes.url + path, json=body).json() for path, body in bodies.items()]
    params = [answer["param"] if "param" in answer else answer["error"]["param"] for answer in answers]
    assert params == ["think", "reasoning.effort", "reasoning_effort"]


def test_vectors(client: Make, hermes: Server) -> None:
    found = client().embed("m", ["a cat", "a dog"])
    other = hermes.client.embeddings.create(model="m", input=["a cat", "a dog"], encoding_format="float")
    assert [list(vector) for vector in found.embeddings] == [entry.embedding for entry in other.data]
    assert found.prompt_eval_count == other.usage.prompt_tokens
    assert list(client().embeddings("m", "a cat").embedding) == other.data[0].embedding
    assert client().embed("m", "cat " * 5000).prompt_eval_count  # cut, unless it is said not to
    with pytest.raises(ollama.ResponseError, match="prompt_too_long"):
        client().embed("m", "cat " * 5000, truncate=False)


def test_models(client: Make, hermes: Server) -> None:
    [listed] = client().list().models
    [loaded] = client().ps().models
    assert listed.model == loaded.model == "m" and listed.size == loaded.size and (listed.size or 0) > 1_000_000
    shown = client().show("m")
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities or ()) and "im_start" in (shown.template or "")
    assert shown.modelinfo is not None and shown.modelinfo["general.parameter_count"] > 1_000_000
    assert shown.details is not None and shown.details.parameter_size
    assert httpx.get(f"{hermes.url}/api/version").json()["version"].count(".") == 2


@pytest.fixture(scope="module")
def pair() -> Iterator[ollama.Client]:
    """Two models, of which one is in memory."""
    running = start(Path("penstock-tiny"), "penstock-nano", "--max-loaded", "1")
    yield ollama.Client(host=running.url, timeout=60)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0


def test_a_model_that_is_not_in_memory_is_told_of_as_one_that_is(pair: ollama.Client) -> None:
    """Ollama's command line reads twelve characters of each digest, and asks of a model before it runs it."""

    def told(name: str) -> tuple[ollama.ListResponse.Model, ollama.ShowResponse]:
        return next(model for model in pair.list().models if model.model == name), pair.show(name)

    def in_memory() -> list[str | None]:
        return [model.model for model in pair.ps().models]

    assert in_memory() == ["penstock-tiny"]
    listed, shown = told("penstock-nano")
    assert re.fullmatch("[0-9a-f]{64}", listed.digest or "") and (listed.size or 0) > 100_000
    assert listed.details is not None and listed.details.parameter_size and listed.details.quantization_level
    assert in_memory() == ["penstock-tiny"], "nobody asked for an answer of it"
    assert pair.generate("penstock-nano", "Once", options=GREEDY).eval_count == 8
    assert in_memory() == ["penstock-nano"]
    loaded, known = told("penstock-nano")
    assert (listed.details, shown.details) == (loaded.details, known.details)
    assert (shown.modelinfo, shown.template, shown.parameters) == (known.modelinfo, known.template, known.parameters)
    assert set(shown.capabilities or ()) == set(known.capabilities or ()) - {"insert"} > {"completion"}


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        ("chat", {"messages": [USER], "model": "other"}, (404, "model_not_found")),
        ("chat", {"messages": [{"role": "x"}]}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER | {"images": ["aGk="]}]}, (400, "unsupported_parameter")),
        ("chat", {"messages": [USER], "options": {"temperature": -1}}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "options": {"num_predict": -3}}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "options": {"mirostat": 1}}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "options": {"repeat_penalty": 0}}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "format": "xml"}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "format": {"$ref": "#"}}, (400, "infinite_schema")),
        ("chat", {"messages": [USER], "think": "extreme"}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "n": 2}, (400, "invalid_parameter")),
        ("chat", {"messages": [], "thinking_soft": 2.0}, (400, "invalid_parameter")),
        ("generate", {"options": {"temperature": -1}}, (400, "invalid_parameter")),
        ("chat", {"messages": [USER], "keep_alive": "5 minutes"}, (400, "invalid_parameter")),
        ("embed", {"input": "a", "keep_alive": "1h-2m"}, (400, "invalid_parameter")),
        ("generate", {"prompt": "a", "images": ["aGk="]}, (400, "unsupported_parameter")),
        ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, (400, "unsupported_parameter")),
        ("generate", {"prompt": "a", "suffix": "b"}, (400, "unsupported_parameter")),
        ("generate", {"prompt": "a", "suffix": "b", "system": "c"}, (400, "unsupported_parameter")),
        ("generate", {"prompt": 3}, (400, "invalid_parameter")),
        ("embed", {}, (400, "invalid_parameter")),
        ("show", {"model": "other"}, (404, "model_not_found")),
        ("pull", {"model": "other"}, (404, "unknown_path")),
    ],
)
def test_what_cannot_be_asked(hermes: Server, path: str, fields: dict[str, Any], code: tuple[int, str]) -> None:
    response = httpx.post(f"{hermes.url}/api/{path}", json=fields, timeout=60)
    error = response.json()
    assert (response.status_code, error["code"]) == code and isinstance(error["error"], str), error


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_bodies_need_no_type_unless_a_page_may_send_them(hermes: Server, kind: str) -> None:
    def status(path: str, **headers: str) -> int:
        body = {"model": "m"} | ({} if path == "/api/show" else {"prompt": "a", "options": GREEDY})
        declared = {"content-type": kind} if kind else {}
        content = json.dumps(body)
        return httpx.post(hermes.url + path, content=content, headers=declared | headers, timeout=60).status_code

    assert (status("/api/generate"), status("/api/show")) == (200, 200)
    for page, refused in (("https://evil.example", 403), ("null", 403), (hermes.url, 415)):
        headers = {"origin": page, "sec-fetch-site": "cross-site"}
        assert (status("/api/generate", **headers), status("/api/show", **headers)) == (refused, refused)
    assert (status("/v1/completions"), status("/v2/models/m/generate")) == (415, 415)


def test_its_client_raises_what_went_wrong(client: Make) -> None:
    with pytest.raises(ollama.ResponseError, match="does not have the model") as refused:
        client().chat("other", [USER])
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="role cannot be used") as refused:
        list(client().chat("m", [{"role": "x", "content": "a"}], stream=True))  # type: ignore[list-item]
    assert refused.value.status_code == 400
