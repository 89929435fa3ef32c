"""OpenAI's Responses API, through OpenAI's own client: items, events in their order, conversations that are kept."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from penstock.serving.custom_tools import InputText, arguments_of
from penstock.serving.response_inputs import fitting
from penstock.serving.response_items import messages_from
from penstock.serving.response_tools import tools_from
from penstock.text import Tokenizer
from scripted import saying
from servers import Server

PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}]
USER = {"role": "user", "content": "Weather?"}
PATCH: Any = {
    "type": "custom", "name": "apply_patch", "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /[^x]+/"},
}  # fmt: skip
SUM = 'start: term (PLUS term)*\nterm: INT | "(" start ")"\nPLUS: "+" | "\\n"\n%import common.INT'
DAY = r'"(Mon|Fri)"(\n|\\)[0-9]{1,2}'


def custom(syntax: str, definition: str) -> Any:
    return {
        "type": "custom",
        "name": "note",
        "format": {"type": "grammar", "syntax": syntax, "definition": definition},
    }


EDIT = '*** Begin Patch\n+a "b" \\ \u00e9 \U0001f600\n*** End Patch'


@pytest.fixture
def respond(hermes: Server, tokenizer: Tokenizer) -> Any:
    """create() with defaults of these tests, and ``says`` for what the model will say."""

    def create(says: str | None = None, **options: Any) -> Any:
        body = {} if says is None else saying(says, tokenizer)
        asked = {"model": "m", "input": "Weather?", "max_output_tokens": 200, "temperature": 0} | options
        return hermes.client.responses.create(**asked, extra_body=body)

    return create


def test_a_response_has_items(respond: Any) -> None:
    answer = respond(f"<think>Hm.</think>Let me see.\n{CALL}", tools=TOOLS, metadata={"a": "b"})
    assert answer.id.startswith("resp_") and answer.status == "completed" and answer.metadata == {"a": "b"}
    thoughts, message, call = answer.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "Hm.")
    assert (message.role, message.content[0].text, answer.output_text) == ("assistant", "Let me see.", "Let me see.")
    assert (call.type, call.name, call.arguments, call.status) == ("function_call", "get_weather", PARIS, "completed")
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 2 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_events_come_in_openai_s_order(respond: Any) -> None:
    events = list(respond(f"<think>Hm.</think>Yes.\n{CALL}", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    final = events[-1].response
    assert events[0].response.output == [] and events[0].response.status == "in_progress"
    for kind, joined in (("output_text", "Yes."), ("reasoning_text", "Hm."), ("function_call_arguments", PARIS)):
        assert "".join(e.delta for e in events if e.type == f"response.{kind}.delta") == joined
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output and [e.output_index for e in events if "added" in e.type] == [0, 0, 1, 1, 2]
    assert final.usage.output_tokens > 10


def test_the_client_s_own_stream_helper(hermes: Server, tokenizer: Tokenizer) -> None:
    body = saying("Yes, indeed.", tokenizer)
    with hermes.client.responses.stream(model="m", input="Hi", extra_body=body) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == "Yes, indeed."
        assert stream.get_final_response().output_text == "Yes, indeed."


def test_a_conversation_is_kept(respond: Any, hermes: Server) -> None:
    first = respond(CALL, tools=TOOLS, instructions="Be brief.")
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "rain"}
    second = respond("Rain.", input=[result], previous_response_id=first.id, tools=TOOLS)
    assert second.previous_response_id == first.id
    whole = [{"role": "user", "content": "Weather?"}, first.output[0].model_dump(exclude_none=True), result]
    assert respond("Rain.", input=whole, tools=TOOLS).usage.input_tokens == second.usage.input_tokens
    third = respond("Yes.", input="Sure?", previous_response_id=second.id, tools=TOOLS)
    assert third.usage.input_tokens > second.usage.input_tokens
    responses = hermes.client.responses
    assert responses.retrieve(third.id) == third
    assert [item.type for item in responses.input_items.list(second.id)] == ["function_call_output"]
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        respond(previous_response_id=first.id)
    assert (gone.value.code, gone.value.param) == ("response_not_found", "previous_response_id")
    assert respond("Yes.", previous_response_id=second.id).status == "completed"  # it brought all of it along
    unkept = respond("Yes.", store=False)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(unkept.id)


def test_a_custom_tool_is_called_with_a_text(respond: Any) -> None:
    patching = f'<tool_call>\n{{"name": "apply_patch", "arguments": {arguments_of(EDIT)}}}\n</tool_call>'
    events = list(respond(patching, tools=[*TOOLS, PATCH], stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == [
        "created", "in_progress", "output_item.added",
        "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done", "completed",
    ]  # fmt: skip
    told = [event.delta for event in events if event.type.endswith("_input.delta")]
    assert len(told) > 9 and "".join(told) == EDIT == next(e.input for e in events if e.type.endswith("_input.done"))
    (call,) = events[-1].response.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", EDIT)
    assert call.id.startswith("ctc_") and events[2].item.input == ""
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    history = [{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), result]
    again = respond("Well.", input=history, tools=[*TOOLS, PATCH])
    kept = respond("Well.", input=[result], previous_response_id=events[-1].response.id, tools=[*TOOLS, PATCH])
    assert again.usage.input_tokens == kept.usage.input_tokens
    named = respond(patching, tools=[*TOOLS, PATCH], tool_choice={"type": "custom", "name": "apply_patch"})
    assert [item.input for item in named.output] == [EDIT]


def is_sum(text: str) -> bool:
    while (shorter := re.sub(r"\((?:\d+[+\n])*\d+\)", "1", text)) != text:
        text = shorter
    return re.fullmatch(r"(\d+[+\n])*\d+", text) is not None


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_of_a_call_follows_its_grammar(respond: Any, stream: bool) -> None:
    """Nothing is scripted here: the bundled model has never seen a tool, nor a sum."""
    for seed in range(4):
        for tool, holds in ((custom("lark", SUM), is_sum), (custom("regex", DAY), re.compile(DAY).fullmatch)):
            named = {"type": "custom", "name": "note"}
            options = {"temperature": 1.3, "stream": stream, "tool_choice": named}
            made = respond(tools=[*TOOLS, tool], max_output_tokens=60 + seed, **options)
            (call,) = (list(made)[-1].response if stream else made).output
            assert call.type == "custom_tool_call" and holds(call.input), call.input


def test_a_call_that_the_model_may_make_is_held_from_its_name_on(respond: Any) -> None:
    begun = 'Well. <tool_call>\n{"name": "note", "arguments": {"input": "'
    for text, tool in (("(1\\n2)+3", custom("lark", SUM)), ('\\"Fri\\"\\\\31', custom("regex", DAY))):
        message, call = respond(f'{begun}{text}"}}}}\n</tool_call>', tools=[tool]).output
        assert (message.content[0].text, call.input) == ("Well.", json.loads(f'"{text}"'))
    message, call = respond(f'{begun}seven"}}}}\n</tool_call>', tools=[custom("lark", SUM)]).output
    assert is_sum(call.input)
    assert respond("1 + 1", tools=[custom("lark", SUM)]).output_text == "1 + 1", "who calls nothing is free"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (arguments_of(EDIT), EDIT), (json.dumps({"input": EDIT}), EDIT), ('{ "input" :"a\\/\\t"}', "a/\t"),
        ('{"input": "\\ud83d"}', "\ufffd"), ('{"other": 1}', '{"other": 1}'), ('{"a": 1, "input": "b"}', "b"),
        (f'{{"a": {"1" * 5000}}}', f'{{"a": {"1" * 5000}}}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_the_text_of_a_call_comes_in_pieces(arguments: str, text: str, size: int) -> None:
    given = InputText()
    pieces = [given.feed(arguments[i : i + size]) for i in range(0, len(arguments), size)]
    assert "".join([*pieces, given.finish()]) == given.text == text


def test_what_openai_would_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    remote = ["web_search", "web_search_preview_2025_03_11", "file_search", "code_interpreter", "image_generation",
              "computer_use_preview", "mcp", "local_shell", "shell", "apply_patch"]  # fmt: skip
    tools = [{"type": kind} for kind in remote]
    for _ in range(2):
        found = [tool.function for tool in tools_from([*tools, *TOOLS, PATCH])]
        assert [function.name for function in found if function is not None] == ["get_weather", "apply_patch"]
    (record,) = caplog.records  # told once
    assert all(kind in record.message for kind in remote)


def test_what_a_response_was_given_is_listed_in_parts(respond: Any, hermes: Server) -> None:
    turns: Any = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i}"} for i in range(5)]
    answer, items = respond("Yes.", input=turns), hermes.client.responses.input_items
    assert respond("Yes.", text={"verbosity": "low"}).output_text == "Yes."
    told = list(items.list(answer.id, order="asc"))
    assert [(item.role, item.content[0].type, item.content[0].text) for item in told] == [
        (turn["role"], "input_text" if i % 2 == 0 else "output_text", turn["content"]) for i, turn in enumerate(turns)
    ]
    assert list(items.list(answer.id, limit=2)) == told[::-1]  # page after page
    first = items.list(answer.id, limit=2)
    assert first.has_more and (first.first_id, first.last_id) == (told[4].id, told[3].id)
    assert [item.id for item in items.list(answer.id, after=told[3].id, limit=3)] == [told[i].id for i in (2, 1, 0)]
    many = respond("Yes.", input=turns * 5)
    assert len(items.list(many.id).data) == 20 and len(list(items.list(many.id))) == 25
    for wrong in ({"after": "x"}, {"limit": 0}, {"limit": 101}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError) as refused:
            items.list(answer.id, **wrong)
        assert refused.value.param == next(iter(wrong))


def test_items_that_are_kept_may_be_referred_to(respond: Any, hermes: Server) -> None:
    first = respond(CALL, tools=TOOLS)
    (asked,) = hermes.client.responses.input_items.list(first.id)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "rain"}
    whole = respond("Rain.", input=[USER, first.output[0].model_dump(exclude_none=True), result], tools=TOOLS)
    named = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}, result]
    second = respond("Rain.", input=named, tools=TOOLS)
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert [i.type for i in hermes.client.responses.input_items.list(second.id, order="asc")] == [
        "message", "function_call", "function_call_output",
    ]  # fmt: skip
    hermes.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        respond("Rain.", input=named, tools=TOOLS)
    assert (gone.value.code, gone.value.param) == ("response_not_found", "input[0]")


def test_the_tokens_of_an_input_are_counted(respond: Any, hermes: Server) -> None:
    count = hermes.client.responses.input_tokens.count
    first = respond("Yes.", instructions="Be brief.", tools=TOOLS)
    asked: Any = {"model": "m", "input": "Weather?", "instructions": "Be brief.", "tools": TOOLS}
    counted = count(**asked)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", first.usage.input_tokens)
    second = respond("Yes.", input="And now?", previous_response_id=first.id)
    assert count(model="m", input="And now?", previous_response_id=first.id).input_tokens == second.usage.input_tokens


def test_a_conversation_that_is_too_long_loses_what_is_oldest(respond: Any, hermes: Server) -> None:
    count = hermes.client.responses.input_tokens.count
    pair = [USER, {"role": "assistant", "content": "a " * 100}]
    asked: Any = {"model": "m", "instructions": "Be brief.", "truncation": "auto"}
    whole = count(input=[*pair * 2, USER], **asked)
    assert whole == count(input=[*pair * 2, USER], model="m", instructions="Be brief.")
    one = whole.input_tokens - count(input=[*pair, USER], **asked).input_tokens
    longest = httpx.post(f"{hermes.url}/tokenize", json={"prompt": "a"}).json()["max_model_len"]
    turns = [*pair * (longest // one + 2), USER]
    with pytest.raises(openai.BadRequestError, match="prompt_too_long"):
        respond("Yes.", input=turns)
    cut = respond("Yes.", input=turns, truncation="auto", instructions="Be brief.", max_output_tokens=9)
    assert (cut.truncation, cut.output_text) == ("auto", "Yes.")
    assert longest - 9 - one < cut.usage.input_tokens <= longest - 9
    assert (cut.usage.input_tokens - whole.input_tokens) % one == 0  # whole turns, and the instructions


def test_what_is_cut_begins_where_it_may() -> None:
    call, result = {"role": "assistant", "size": 2}, {"role": "tool", "size": 5}
    user, system = {"role": "user", "size": 3}, {"role": "system", "size": 1}
    for messages, kept in (
        ([system, user, call, result, user], [0, 4]),
        ([user, system, call, result, call, result], [1, 4, 5]),
        ([user, call, {"role": "tool", "size": 99}], [0, 1, 2]),
        ([user, user], [0, 1]),
    ):

        async def count(some: list[dict[str, Any]]) -> int:
            return sum(message["size"] for message in some)

        assert asyncio.run(fitting(messages, count, 9)) == [messages[i] for i in kept]


def test_log_probabilities_are_those_of_the_text(respond: Any, hermes: Server, tokenizer: Tokenizer) -> None:
    wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    says = f"<think>Hm.</think>Let me see.\n{CALL}"
    events = list(respond(says, tools=TOOLS, stream=True, **wanted))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    (part,) = events[-1].response.output[1].content
    told = [entry.model_dump() for delta in deltas for entry in delta.logprobs]
    for same in (done.logprobs, part.logprobs, respond(says, tools=TOOLS, **wanted).output[1].content[0].logprobs):
        assert [entry.model_dump() for entry in same] == told
    assert "Let me see." in "".join(entry["token"] for entry in told) and len(told[0]["top_logprobs"]) == 2
    plain = respond("Let me see.", **wanted).output[0].content[0]
    said: Any = {"messages": [USER], "temperature": 0, "logprobs": True, "top_logprobs": 2}
    body = {"model": "m", **said, **saying("Let me see.", tokenizer)}
    chat = httpx.post(f"{hermes.url}/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [(entry.token, entry.logprob) for entry in plain.logprobs] == [
        (entry["token"], entry["logprob"]) for entry in chat[: len(plain.logprobs)]
    ]
    assert len(chat) - len(plain.logprobs) <= 1  # the end of the text


def test_forms_and_calls_that_must_come(respond: Any) -> None:
    named = {"type": "function", "name": "get_weather"}
    for stream in (False, True):
        made = respond(tools=TOOLS, tool_choice=named, stream=stream, max_output_tokens=120)
        made = list(made)[-1].response if stream else made
        assert [item.type for item in made.output] == ["function_call"]
        assert len(json.loads(made.output[0].arguments)["city"]) <= 9
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    assert "city" in json.loads(respond(text=form, max_output_tokens=120).output_text)


def test_what_breaks_off_is_incomplete(respond: Any) -> None:
    answer = respond("One two three four five.", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(respond(CALL, tools=TOOLS, max_output_tokens=40, stream=True))
    assert events[-1].type == "response.incomplete"
    call, message = events[-1].response.output
    assert (call.status, message.content[0].text) == ("incomplete", CALL[: len(message.content[0].text)])
    assert [item.type for item in respond(CALL, tools=TOOLS, max_output_tokens=40).output] == ["message"]
    assert messages_from([item.model_dump() for item in (call, message)], None)[0]["content"] == message.content[0].text


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": [{"role": "wizard", "content": "x"}]}, "invalid_parameter", "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "invalid_parameter", "input[0]"),
        ({"input": [{"type": "item_reference", "id": 7}]}, "invalid_parameter", "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_parameter",
         "input[0].content"),
        ({"input": [{"role": "user", "content": 7}]}, "invalid_parameter", "input[0].content"),
        ({"input": [{"role": "user", "content": "x"}] * 2049}, "invalid_parameter", "input"),
        ({"tools": [{"type": "namespace"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "invalid_parameter", "tools[0]"),
        ({"tools": [{**PATCH, "format": {"type": "xml"}}]}, "invalid_parameter", "tools[0].format"),
        ({"tools": [custom("ebnf", "a = b")]}, "invalid_parameter", "tools[0].format"),
        ({"tools": [custom("lark", "start: a")]}, "invalid_grammar", None),
        ({"tools": [custom("lark", "start: %json {}")]}, "invalid_grammar", None),
        ({"tools": [custom("regex", "(")]}, "invalid_regex", None),
        ({"tools": [*TOOLS, PATCH], "tool_choice": {"type": "web_search"}}, "invalid_parameter", "tool_choice"),
        ({"input": [{"type": "custom_tool_call", "call_id": "a"}]}, "invalid_parameter", "input[0]"),
        ({"tools": [{"type": "function"}]}, "invalid_parameter", "tools[0]"),
        ({"text": {"format": {"type": "xml"}}}, "unsupported_parameter", "text"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "some"}, "invalid_parameter", "truncation"),
        ({"truncation": "auto", "input": "a " * 9000}, "context_length_exceeded", None),
        ({"text": {"verbosity": "loud"}}, "unsupported_parameter", "text"),
        ({"include": ["output"]}, "unsupported_parameter", "include"),
        ({"top_logprobs": 1}, "invalid_parameter", "top_logprobs"),
        ({"n": 2}, "invalid_parameter", "n"),
        ({"input": "a " * 9000}, "context_length_exceeded", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked(
    hermes: Server, fields: dict[str, Any], code: str, param: str | None, stream: bool
) -> None:
    response = httpx.post(f"{hermes.url}/v1/responses", json={"input": "x", "stream": stream} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
