"""Anthropic's Messages API, through Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import httpx
import pytest
from pydantic import BaseModel

from penstock.text import Tokenizer
from scripted import saying
from servers import Server

PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}]
USER: Any = {"role": "user", "content": "Weather?"}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    sure: bool


@pytest.fixture
def client(hermes: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0)


@pytest.fixture
def say(client: anthropic.Anthropic, tokenizer: Tokenizer) -> Any:
    """create() with defaults of these tests, and ``says`` for what the model will say."""

    def create(says: str | None = None, **options: Any) -> Any:
        body = {"temperature": 0} | options.pop("extra_body", {}) | ({} if says is None else saying(says, tokenizer))
        asked = {"model": "m", "messages": [USER], "max_tokens": 200} | options
        return client.messages.create(**asked, extra_body=body)

    return create


def test_a_message_has_blocks(say: Any) -> None:
    message = say(f"<think>Hm.</think>Let me see.\n{CALL}", tools=TOOLS)
    assert message.id.startswith("msg_") and (message.role, message.type, message.model) == (
        "assistant",
        "message",
        "m",
    )
    thoughts, text, call = message.content
    assert (thoughts.type, thoughts.thinking) == ("thinking", "Hm.")
    assert (text.type, text.text) == ("text", "Let me see.")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens > 20 < message.usage.output_tokens


def test_events_come_in_anthropic_s_order(say: Any) -> None:
    events = list(say(f"<think>Hm.</think>Yes.\n{CALL}", tools=TOOLS, stream=True))
    kinds = [event.type for event in events]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    told = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    assert told == ["message_start", *block * 3, "message_delta", "message_stop"]
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    for kind, name, text in (
        ("thinking_delta", "thinking", "Hm."), ("text_delta", "text", "Yes."),
        ("input_json_delta", "partial_json", PARIS),
    ):  # fmt: skip
        assert "".join(getattr(delta, name) for delta in deltas if delta.type == kind) == text
    start, end = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None
    assert end.delta.stop_reason == "tool_use" and end.usage.output_tokens > 20


def test_the_client_s_own_stream_helper(client: anthropic.Anthropic, tokenizer: Tokenizer) -> None:
    asked: Any = {"model": "m", "messages": [USER], "max_tokens": 200, "tools": TOOLS}
    with client.messages.stream(**asked, extra_body=saying("Well.\n" + CALL, tokenizer)) as stream:
        assert "".join(stream.text_stream) == "Well."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"city": "Paris"} and final.stop_reason == "tool_use"


def test_results_go_back(say: Any, client: anthropic.Anthropic) -> None:
    made = say(f"<think>Hm.</think>Yes.\n{CALL}", tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": made.content[2].id, "content": [{"type": "text", "text": "rain"}]}
    history = [USER, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    answer = say("Rain.", messages=history, tools=TOOLS, system=[{"type": "text", "text": "Be brief."}])
    assert answer.content[0].text == "Rain." and answer.stop_reason == "end_turn"
    count = client.messages.count_tokens(model="m", messages=history, tools=TOOLS, system="Be brief.").input_tokens
    assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert count > client.messages.count_tokens(model="m", messages=[USER], tools=TOOLS).input_tokens


def test_its_usage_tells_the_tier(say: Any) -> None:
    for asked, told in (
        ("auto", "standard"),
        ("standard_only", "standard"),
        ("priority", "priority"),
        ("flex", "batch"),
    ):
        assert say("Yes.", extra_body={"service_tier": asked}).usage.service_tier == told
        start, *_ = say("Yes.", extra_body={"service_tier": asked}, stream=True)
        assert start.message.usage.service_tier == told
    assert say("Yes.").usage.service_tier == "standard"


def test_why_it_ended(say: Any) -> None:
    assert say("One two three.", max_tokens=2).stop_reason == "max_tokens"
    stopped = say("One two three.", stop_sequences=["two"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "two", "One ")
    cut = say(CALL, tools=TOOLS, max_tokens=40)
    assert cut.stop_reason == "max_tokens" and [block.type for block in cut.content] == ["text"]
    assert CALL.startswith(cut.content[0].text)


def test_numbers_are_passed_on_as_they_are(hermes: Server, tokenizer: Tokenizer) -> None:
    digits = "1" * 60
    body = {"model": "m", "messages": [USER], "max_tokens": 200, "tools": TOOLS, "temperature": 0}
    body |= saying(CALL.replace('"Paris"', digits), tokenizer)
    assert f'"input":{{"city": {digits}}}' in httpx.post(f"{hermes.url}/v1/messages", json=body).text


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_a_call_that_must_come(say: Any, choice: Any) -> None:
    message = say(tools=TOOLS, tool_choice=choice, max_tokens=120)
    assert [block.type for block in message.content] == ["tool_use"] and len(message.content[0].input["city"]) <= 9
    assert say(CALL, tools=TOOLS, tool_choice={"type": "none"}).content[0].text == CALL


def test_an_answer_has_the_form_that_the_client_s_own_helper_asks_for(client: anthropic.Anthropic, say: Any) -> None:
    asked: Any = {"model": "m", "messages": [USER], "max_tokens": 150, "output_format": Weather}
    for parse in (client.messages.parse, client.beta.messages.parse):
        parsed = parse(**asked, extra_body={"temperature": 0}).parsed_output
        assert isinstance(parsed, Weather)
    with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
        assert stream.get_final_message().parsed_output == parsed
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        assert json.loads(say(extra_body=fields).content[0].text) == {"a": "x"}
    calls = say(CALL, tools=TOOLS, output_config={"format": form}).content
    assert [block.type for block in calls] == ["tool_use"]  # an answer that calls is none of that form


def test_thoughts_are_bounded(say: Any) -> None:
    says = "<think>" + "a b " * 40 + "</think>Yes."
    body = {"thinking_start": "<think>", "thinking_end": "</think>"}
    bounded = say(says, thinking={"type": "enabled", "budget_tokens": 12}, extra_body=body, max_tokens=120)
    assert bounded.content[0].type == "thinking" and len(bounded.content[0].thinking) < 60
    on, off = (say("x", thinking={"type": kind}).usage for kind in ("adaptive", "disabled"))
    assert off.input_tokens + off.cache_read_input_tokens > on.input_tokens + on.cache_read_input_tokens


def test_a_budget_that_cannot_be_kept_is_left_out(say: Any) -> None:
    """Which is for this server to see; of its own field it says so."""
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    marks = {"thinking_start": "<think>", "thinking_end": "</think>"}
    assert say("Yes.", thinking=thinking).content[0].text == "Yes."  # the tokenizer of the model has no such marks
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}, one):
        made = say(CALL, tools=TOOLS, tool_choice=choice, thinking=thinking, extra_body=marks)
        assert [block.type for block in made.content] == ["tool_use"]
    config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    held = say(PARIS, output_config=config, thinking=thinking, extra_body=marks)
    assert json.loads(held.content[0].text) == {"city": "Paris"}
    with pytest.raises(anthropic.BadRequestError, match="no_thinking_tags"):
        say("x", extra_body={"thinking_budget": 9})
    with pytest.raises(anthropic.BadRequestError, match="thinking_budget"):
        say("x", tools=TOOLS, tool_choice={"type": "any"}, extra_body={"thinking_budget": 9, **marks})


@pytest.mark.parametrize("begun", ["The weather is", [{"type": "text", "text": "The weather is"}]])
def test_a_last_turn_of_the_assistant_s_goes_on(client: anthropic.Anthropic, hermes: Server, begun: Any) -> None:
    history: Any = [USER, {"role": "assistant", "content": begun}]
    asked: dict[str, Any] = {"model": "m", "messages": history, "max_tokens": 12}
    cold = {"temperature": 0}
    answer = client.messages.create(**asked, extra_body=cold)
    with client.messages.stream(**asked, extra_body=cold) as stream:
        streamed = "".join(stream.text_stream)
    same = hermes.client.chat.completions.create(**asked, extra_body=cold | {"continue_final_message": True})
    assert answer.content[0].text == streamed == same.choices[0].message.content != ""  # type: ignore[union-attr]
    counted = client.messages.count_tokens(model="m", messages=history).input_tokens
    usage = answer.usage
    assert counted == same.usage.prompt_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_turn_that_goes_on_thinks_only_if_it_was_thinking(say: Any) -> None:
    for begun, says, kinds in (
        ("It", " is rainy.", [("text", " is rainy.")]),
        ("<think>Hm</think>It", " is.", [("text", " is.")]),
        ("<think>Hm", ", so.</think>Rain.", [("thinking", ", so."), ("text", "Rain.")]),
    ):
        answer = say(says, messages=[USER, {"role": "assistant", "content": begun}])
        assert [(block.type, getattr(block, block.type)) for block in answer.content] == kinds
    made = say(f"Well. {CALL}", tools=TOOLS, messages=[USER, {"role": "assistant", "content": "It"}]).content
    assert [block.type for block in made] == ["text", "tool_use"]


def test_a_turn_that_called_something_does_not_go_on(client: anthropic.Anthropic, hermes: Server, say: Any) -> None:
    [call] = say(CALL, tools=TOOLS).content
    history: Any = [USER, {"role": "assistant", "content": [{"type": "text", "text": "It"}, call.model_dump()]}]
    made = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.input)}}
    told = {"messages": [USER, {"role": "assistant", "content": "It", "tool_calls": [made]}]}
    tokens = httpx.post(f"{hermes.url}/tokenize", json=told).json()["count"]
    assert client.messages.count_tokens(model="m", messages=history).input_tokens == tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text blocks"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "tool_use blocks"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools of the caller's own"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "no tool named 'x'"),
        ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"output_format": {}, "output_config": {"format": {}}}, "exclude each other"),
        ({"mcp_servers": [1]}, "mcp_servers"),
        ({"n": 2}, "one answer"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "prompt_too_long"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked(hermes: Server, fields: dict[str, Any], said: str, stream: bool) -> None:
    body = {"model": "m", "messages": [USER], "max_tokens": 1, "stream": stream} | fields
    response = httpx.post(f"{hermes.url}/v1/messages", json={k: v for k, v in body.items() if v is not None})
    error = response.json()
    assert response.status_code == 400 and error["type"] == "error", error
    assert error["error"]["type"] == "invalid_request_error" and said in error["error"]["message"]


def test_a_prompt_beyond_the_context_is_told_as_clients_know_it(client: anthropic.Anthropic, hermes: Server) -> None:
    """Claude Code makes its conversation shorter when it reads these words."""
    long: Any = {"model": "m", "messages": [{"role": "user", "content": "a " * 9000}]}
    tokens = client.messages.count_tokens(**long).input_tokens
    longest = httpx.post(f"{hermes.url}/tokenize", json={"prompt": "a"}).json()["max_model_len"]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**long, max_tokens=1)
    error = caught.value.body["error"]  # type: ignore[index]
    assert error["type"] == "invalid_request_error" and error["message"].endswith("[prompt_too_long]")
    assert error["message"].startswith(f"prompt is too long: {tokens} tokens > {longest - 1} maximum: ")


def test_models_are_as_the_client_reads_them(client: anthropic.Anthropic, hermes: Server) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type, model.lifecycle) == ("m", "m", "model", "active")
    own = hermes.client.models.retrieve("m")  # of another client it is as before
    assert (int(model.created_at.timestamp()), own.object) == (own.created, "model")
    page = client.models.list()
    assert (page.first_id, page.last_id, page.has_more) == ("m", "m", False)
    assert client.models.retrieve("m") == model
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_client_s_own(say: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        say("x", model="other")
    with pytest.raises(anthropic.BadRequestError) as refused:
        say("x", tools=[{"name": "a b", "input_schema": {}}], extra_headers={"x-request-id": "mine"})
    body: Any = refused.value.body
    assert refused.value.request_id == body["request_id"] == "mine" and len(say("x")._request_id) == 32
    assert json.loads(json.dumps(say("x").model_dump()))["type"] == "message"
