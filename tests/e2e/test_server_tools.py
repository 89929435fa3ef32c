"""Tools and thoughts in chat, as OpenAI's own client sees them. A rule makes the bundled model say what is needed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from penstock import AsyncLLM
from penstock.serving import build_app
from penstock.serving.custom_tools import arguments_of
from penstock.serving.limits import MAX_TOOL_CHARS, MAX_TOOL_DEPTH, MAX_TOOLS
from penstock.spec import EngineConfig
from penstock.text import ChatTemplate, Tokenizer
from penstock.text.parsers import CALL_FORMATS, NONE, formats_of
from scripted import saying
from servers import Server

USER = {"role": "user", "content": "How is the weather in Paris?"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
PARIS = '{"city": "Paris", "days": 3}'


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture
def chat(hermes: Server, tokenizer: Tokenizer) -> Any:
    """create() with defaults of these tests, and ``says`` for what the model will say."""

    def create(says: str | None = None, **options: Any) -> Any:
        body = dict(options.pop("extra_body", {}))
        if says is not None:
            body |= saying(says, tokenizer)
        asked = {"model": "m", "messages": [USER], "max_tokens": 200, "temperature": 0} | options
        return hermes.client.chat.completions.create(**asked, extra_body=body)

    return create


def called(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def test_a_call(chat: Any) -> None:
    answer = chat("I will look.\n" + call("get_weather", PARIS), tools=TOOLS)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I will look."
    [made] = choice.message.tool_calls
    assert (made.type, made.function.name, made.function.arguments) == ("function", "get_weather", PARIS)
    assert made.id.startswith("call_") and "reasoning_content" not in choice.message.model_extra
    assert chat(call("now", "{}"), tools=TOOLS).choices[0].message.content is None


def test_a_streamed_call_has_openai_s_shape(chat: Any) -> None:
    says = call("get_weather", PARIS) + "\n" + call("now", "{}")
    chunks = list(chat(says, tools=TOOLS, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    heads = [piece for piece in pieces if piece.id is not None]
    assert [(p.index, p.type, p.function.name, p.function.arguments) for p in heads] == [
        (0, "function", "get_weather", ""),
        (1, "function", "now", ""),
    ]
    rest = [piece for piece in pieces if piece.id is None]
    assert all(p.type is None and p.function.name is None for p in rest) and len(rest) > 5
    for i, expected in enumerate((PARIS, "{}")):
        assert "".join(p.function.arguments for p in rest if p.index == i) == expected
    assert "".join(delta.content or "" for delta in deltas) == ""
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "tool_calls"]
    assert chunks[-1].usage.completion_tokens > 20


def test_what_is_no_call_is_content(chat: Any) -> None:
    for says in (call("unknown", "{}"), call("now", "[1]"), '<tool_call>{"name": "now"', "plain <tool_call>"):
        choice = chat(says, tools=TOOLS).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (says, None, "stop")
    says = call("now", "{}")
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        assert chat(says, **options).choices[0].message.content == says
    cut = chat(call("get_weather", PARIS), tools=TOOLS, max_tokens=20).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls is None
    assert cut.message.content.startswith('<tool_call>\n{"name": "get')


def test_thoughts(chat: Any) -> None:
    says = "<think>\nParis is in France.\n</think>\n\nLet me see." + call("now", "{}")
    answer = chat(says, tools=TOOLS)
    message = answer.choices[0].message
    assert (message.content, called(message)) == ("Let me see.", [("now", "{}")])
    assert message.reasoning_content == message.reasoning == "Paris is in France."
    assert 5 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens - 5
    deltas = [chunk.choices[0].delta for chunk in chat(says, tools=TOOLS, stream=True)]
    told = "".join(d.model_extra.get("reasoning_content", "") for d in deltas)
    assert told == "Paris is in France." and "".join(d.content or "" for d in deltas) == "Let me see."
    assert chat("no thoughts").usage.completion_tokens_details.reasoning_tokens == 0


def test_logprobs_of_calls_are_all_there(chat: Any) -> None:
    says = call("now", "{}")
    entries = chat(says, tools=TOOLS, logprobs=True).choices[0].logprobs.content
    assert "".join(entry.token for entry in entries[:-1]) == says
    chunks = chat(says, tools=TOOLS, logprobs=True, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_samples_have_calls_of_their_own(chat: Any) -> None:
    answer = chat(call("now", "{}"), tools=TOOLS, n=3)
    assert [called(choice.message) for choice in answer.choices] == [[("now", "{}")]] * 3
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 3


def fits(arguments: str) -> bool:
    value = json.loads(arguments)
    return set(value) == {"city", "days"} and len(value["city"]) <= 12 and 1 <= value["days"] <= 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_is_one_of_the_schema(chat: Any, stream: bool) -> None:
    """Nothing is scripted here: the bundled model has never seen a tool."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(8):
        options = {"tools": TOOLS, "tool_choice": named, "seed": seed, "temperature": 1.2, "stream": stream}
        if stream:
            chunks = list(chat(**options))
            pieces = [p for c in chunks for p in c.choices[0].delta.tool_calls or ()]
            assert pieces[0].function.name == "get_weather" and {p.index for p in pieces} == {0}
            assert fits("".join(p.function.arguments for p in pieces))
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            [choice] = chat(**options).choices
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            [(name, arguments)] = called(choice.message)
            assert name == "get_weather" and fits(arguments)


def test_required(chat: Any) -> None:
    names = set()
    for seed in range(6):
        options = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "temperature": 1.5}
        made = called(chat(**options, parallel_tool_calls=False).choices[0].message)
        assert len(made) == 1 and (made[0][0] != "get_weather" or fits(made[0][1]))
        names.add(made[0][0])
    assert names <= {"get_weather", "now"}
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[0]]}}
    assert {name for name, _ in called(chat(tools=TOOLS, tool_choice=only).choices[0].message)} == {"get_weather"}


def test_strict_tools_hold_a_call_that_the_model_may_make(chat: Any) -> None:
    """The model begins the call of its own accord; what follows the mark is no longer its choice."""
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    assert chat("Hello.", tools=strict).choices[0].message.content == "Hello."
    says = "Well. " + call("get_weather", PARIS)
    assert called(chat(says, tools=strict).choices[0].message) == [("get_weather", PARIS)]
    for wrong in ('{"city": 7}', '{"town": "Paris"}', "none"):
        [(name, arguments)] = called(chat(call("get_weather", wrong), tools=strict).choices[0].message)
        assert name == "get_weather" and fits(arguments)


def test_parallel_calls_can_be_forbidden(chat: Any) -> None:
    says = call("now", "{}")
    assert len(called(chat(says + "\n" + says, tools=TOOLS).choices[0].message)) == 2
    assert len(called(chat(says, tools=TOOLS, parallel_tool_calls=False).choices[0].message)) == 1
    assert len(called(chat(says + "\n" + says, tools=TOOLS, parallel_tool_calls=False).choices[0].message)) == 1


def test_an_answer_in_a_form_beside_tools(chat: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(chat('{"ok": true}', tools=TOOLS, response_format=form).choices[0].message.content) == {
        "ok": True
    }
    made = called(chat(call("get_weather", PARIS), tools=TOOLS, response_format=form).choices[0].message)
    assert made == [("get_weather", PARIS)]


def test_the_client_s_own_helpers(chat: Any, hermes: Server, tokenizer: Tokenizer) -> None:
    class Weather(BaseModel):
        city: str
        days: int

    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    asked: Any = {"model": "m", "messages": [USER], "tools": [tool], "max_tokens": 200, "tool_choice": "required"}
    parsed = hermes.client.chat.completions.parse(**asked, parallel_tool_calls=False, seed=2)
    assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    with hermes.client.chat.completions.stream(**asked, parallel_tool_calls=False, seed=2) as events:
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [type(event.parsed_arguments) for event in done] == [Weather]


def test_calls_and_their_results_are_part_of_the_conversation(chat: Any, hermes: Server, tokenizer: Tokenizer) -> None:
    made = chat(call("get_weather", PARIS), tools=TOOLS).choices[0].message
    history = [USER, made.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": made.tool_calls[0].id,
                                                          "content": "rain"}]  # fmt: skip
    prompt = chat("Rain.", messages=history, tools=TOOLS).usage.prompt_tokens
    tools = "".join(
        f"\n{json.dumps({**t, 'function': {'parameters': {'type': 'object', 'properties': {}}, **t['function']}})}"
        for t in TOOLS
    )
    del tools
    without = chat("Rain.", messages=[USER], tools=TOOLS).usage.prompt_tokens
    text = f"<|im_start|>assistant\n\n{call('get_weather', PARIS)}<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n"
    assert prompt - without == len(tokenizer.encode(text, add_special_tokens=False))


def test_what_templates_read_can_be_set(chat: Any) -> None:
    plain = chat("a").usage.prompt_tokens
    off = chat("a", extra_body={"chat_template_kwargs": {"enable_thinking": False}}).usage.prompt_tokens
    assert off > plain and chat("a", reasoning_effort="none").usage.prompt_tokens == off
    assert chat("a", reasoning_effort="high").usage.prompt_tokens == plain
    going_on = [USER, {"role": "assistant", "content": "It is"}]
    body = {"continue_final_message": True}
    assert (
        chat("a", messages=going_on, extra_body=body).usage.prompt_tokens
        < chat("a", messages=going_on).usage.prompt_tokens
    )
    begun = [USER, {"role": "assistant", "content": "<think>It is"}]
    message = chat(" rainy.</think>Rain.", messages=begun, extra_body=body).choices[0].message
    assert (message.reasoning_content, message.content) == ("rainy.", "Rain.")
    assert chat("a", extra_body={"add_generation_prompt": False}).usage.prompt_tokens < plain
    assert chat("a b c d e f", max_completion_tokens=2).usage.completion_tokens == 2


NOTE = {"type": "custom", "custom": {"name": "note", "description": "Write down."}}
EDIT = 'Say "no"\n\t\\ é 日 🙂'
NAMED = {"type": "custom", "custom": {"name": "note"}}


def test_a_custom_tool_is_called_with_a_text(chat: Any) -> None:
    says = "Well. " + call("note", arguments_of(EDIT))
    [choice] = chat(says, tools=[*TOOLS, NOTE]).choices
    [made] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")
    assert (made.type, made.custom.name, made.custom.input) == ("custom", "note", EDIT)
    assert made.id.startswith("call_") and set(made.model_dump(exclude_unset=True)) == {"id", "type", "custom"}
    chunks = list(chat(says, tools=[*TOOLS, NOTE], stream=True))
    pieces = [p.model_dump(exclude_unset=True) for c in chunks for p in c.choices[0].delta.tool_calls or ()]
    assert pieces[0].pop("id") and pieces[0] == {
        "index": 0, "type": "custom", "custom": {"name": "note", "input": ""}
    }  # fmt: skip
    assert len(pieces) > 5 and all(set(p) == {"index", "custom"} and set(p["custom"]) == {"input"} for p in pieces[1:])
    assert "".join(p["custom"]["input"] for p in pieces) == EDIT
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    both = chat(call("now", "{}") + "\n" + call("note", '{"input": "a"}'), tools=[*TOOLS, NOTE]).choices[0].message
    assert [made.type for made in both.tool_calls] == ["function", "custom"]


def test_a_custom_call_and_its_result_go_back(chat: Any, tokenizer: Tokenizer) -> None:
    tools = [*TOOLS, NOTE]
    made = chat(call("note", arguments_of(EDIT)), tools=tools).choices[0].message
    result = {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "done"}
    again = chat("Well.", messages=[USER, made.model_dump(exclude_none=True), result], tools=tools)
    text = f"<|im_start|>assistant\n\n{call('note', arguments_of(EDIT))}<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n"
    added = len(tokenizer.encode(text, add_special_tokens=False))
    assert again.usage.prompt_tokens - chat("Well.", tools=tools).usage.prompt_tokens == added


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_call_that_must_come_follows_its_grammar(chat: Any, stream: bool) -> None:
    """Nothing is scripted here: the bundled model has never seen a tool."""
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": r"[1-9]\d{0,3}"}}
    tools = [*TOOLS, {"type": "custom", "custom": {"name": "note", "format": form}}]
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    for seed, choice in enumerate((NAMED, only)):
        asked = {"tools": tools, "tool_choice": choice, "temperature": 1.2, "seed": seed, "parallel_tool_calls": False}
        answer = chat(**asked, stream=stream)
        if stream:
            pieces = [p for c in answer for p in c.choices[0].delta.tool_calls or ()]
            text = "".join(p.model_dump()["custom"]["input"] for p in pieces)
        else:
            [made] = answer.choices[0].message.tool_calls
            text = made.custom.input
        assert re.fullmatch(r"[1-9]\d{0,3}", text), text


DEEP = {"type": "object", "properties": {"a": {}}}
for _ in range(MAX_TOOL_DEPTH // 2):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def tool(name: str = "f", **rest: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **rest}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [tool(str(i)) for i in range(MAX_TOOLS + 1)]}, "too_many_tools", "tools"),
        ({"tools": [tool(description="x" * MAX_TOOL_CHARS)]}, "tools_too_large", "tools"),
        ({"tools": [tool(parameters=DEEP)]}, "tools_too_large", "tools[0]"),
        ({"tools": [tool("a b")]}, "invalid_parameter", "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "invalid_parameter", "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "invalid_parameter", "tools"),
        ({"tools": [tool(parameters={"type": "array"})]}, "invalid_parameter", "tools[0].function.parameters"),
        ({"tools": [{"type": "function"}]}, "invalid_parameter", "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "invalid_parameter", "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "invalid_parameter", "tools[0].custom.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "xml"}}}]}, "invalid_parameter",
         "tools[0].custom.format"),
        ({"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "g"}}}, "invalid_parameter",
         "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}]}, "invalid_parameter",
         "messages[0].tool_calls[0].custom"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "invalid_parameter",
         "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "mcp"}]}]}, "unsupported_parameter",
         "messages[0].tool_calls[0].type"),
        ({"tool_choice": "required"}, "invalid_parameter", "tool_choice"),
        ({"tools": [tool()], "tool_choice": "any"}, "invalid_parameter", "tool_choice"),
        ({"tools": [tool()], "tool_choice": tool("g")}, "invalid_parameter", "tool_choice"),
        ({"tools": [tool(strict=True)], "guided_regex": "a"}, "unsupported_parameter", "tools"),
        ({"tools": [tool(strict=True, parameters={"type": "object", "not": {"required": ["a"]}})]},
         "unsupported_schema", None),
        ({"reasoning_effort": "extreme"}, "invalid_parameter", "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": "x"}}, "unsupported_parameter", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": []}}, "invalid_parameter", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "x" * 5000}}, "invalid_parameter", "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_parameter", None),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(hermes: Server, fields: dict[str, Any], code: str, param: str | None) -> None:
    response = httpx.post(f"{hermes.url}/v1/chat/completions", json={"messages": [USER], "max_tokens": 1} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error


def test_tools_at_their_limits(hermes: Server) -> None:
    most = [tool(f"f{i}", parameters=WEATHER, strict=True) for i in range(MAX_TOOLS)]
    body = {"messages": [USER], "max_tokens": 60, "tools": most, "tool_choice": tool("f77")}
    answer = httpx.post(f"{hermes.url}/v1/chat/completions", json=body, timeout=60).json()
    # the prompt is longer than the context, but the tools were read
    assert answer["error"]["code"] == "context_length_exceeded", answer


# -- every format, in this process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(num_threads=1, logits_rule="scripted:say"))
    yield llm
    llm.close()


def ask(llm: AsyncLLM, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    base = {"messages": [USER], "max_tokens": 90} if "chat" in path else {"input": "x", "max_output_tokens": 150}

    async def send() -> httpx.Response:
        app, _ = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(path, json={**base, **body})

    return asyncio.run(send())


@pytest.mark.parametrize("name", list(CALL_FORMATS))
def test_every_format_can_be_held(llm: AsyncLLM, name: str) -> None:
    engine = llm.engine
    other = AsyncLLM(replace(engine, formats=formats_of(engine.chat, engine.tokenizer.added_tokens, calls=name)))
    for seed in range(3):
        asked = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "temperature": 1.3, "max_tokens": 150}
        [choice] = ask(other, {**asked, "parallel_tool_calls": False}).json()["choices"]
        assert choice["finish_reason"] == "tool_calls", choice
        [made] = choice["message"]["tool_calls"]
        name, arguments = made["function"]["name"], made["function"]["arguments"]
        assert json.loads(arguments) == {} if name == "now" else name == "get_weather" and fits(arguments)


@pytest.mark.parametrize("name", list(CALL_FORMATS))
def test_every_format_holds_an_input_to_its_grammar(llm: AsyncLLM, name: str) -> None:
    """But a text that is written plainly to an expression alone."""
    engine = llm.engine
    other = AsyncLLM(replace(engine, formats=formats_of(engine.chat, engine.tokenizer.added_tokens, calls=name)))
    sums = 'start: INT ("+" INT)*\n%import common.INT'
    for syntax, definition, form in (("regex", r'\d{1,4}"\n?', r'\d{1,4}"\n?'), ("lark", sums, r"\d+(\+\d+)*")):
        tool = {"type": "custom", "name": "add"}
        grammar = {"type": "grammar", "syntax": syntax, "definition": definition}
        asked = {"tools": [tool | {"format": grammar}], "tool_choice": tool, "temperature": 1.3, "seed": 1}
        response = ask(other, asked, "/v1/responses")
        if syntax == "lark" and name in ("qwen3_coder", "glm"):
            assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_parameter")
            continue
        (call,) = response.json()["output"]
        assert call["type"] == "custom_tool_call" and re.fullmatch(form, call["input"]), call


def test_a_form_is_that_of_the_answer_where_messages_have_heads(llm: AsyncLLM) -> None:
    engine = llm.engine
    formats = formats_of(engine.chat, engine.tokenizer.added_tokens, calls="harmony", thoughts="harmony")
    other = AsyncLLM(replace(engine, formats=formats))
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    thought, head = "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant", "<|channel|>final<|message|>"
    for says in (thought + head + PARIS, head + PARIS, thought + head + "no"):
        fields = {"response_format": form, "temperature": 0, "max_tokens": 400} | saying(says, engine.tokenizer)
        [choice] = ask(other, fields).json()["choices"]
        message = choice["message"]
        assert choice["finish_reason"] == "stop" and fits(message["content"]), choice
        assert message["content"] == PARIS or says.endswith("no")
        assert message.get("reasoning_content") == ("Hm {" if says.startswith(thought) else None)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_prompt_says_whether_a_model_that_always_thinks_does(llm: AsyncLLM, thinks: bool) -> None:
    """Of those that never write the start of thoughts, templates write empty ones where the model is not to think."""
    engine = llm.engine
    chat = ChatTemplate("{{ messages[0].content }}" + ("" if thinks else "<think>\n\n</think>\n\n"))
    formats = formats_of(engine.chat, engine.tokenizer.added_tokens, thoughts="deepseek_r1")
    other = AsyncLLM(replace(engine, chat=chat, formats=formats))
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    said = ("Hm {</think>" if thinks else "") + PARIS
    fields = {"response_format": form, "temperature": 0, "max_tokens": 400} | saying(said, engine.tokenizer)
    [choice] = ask(other, fields).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (PARIS, "stop")
    assert choice["message"].get("reasoning_content") == ("Hm {" if thinks else None)


def test_an_answer_that_goes_on_is_held_although_the_model_always_thinks(llm: AsyncLLM) -> None:
    engine = llm.engine
    formats = formats_of(engine.chat, engine.tokenizer.added_tokens, thoughts="deepseek_r1")
    other = AsyncLLM(replace(engine, chat=ChatTemplate("{{ messages[-1].content }}"), formats=formats))
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False, "response_format": form}
    begun = [USER, {"role": "assistant", "content": "Here:"}]
    fields = {"messages": begun, "temperature": 0, "max_tokens": 400} | saying(PARIS, engine.tokenizer)
    [choice] = ask(other, fields | goes_on).json()["choices"]
    assert choice["message"]["content"] == PARIS and "reasoning_content" not in choice["message"]


def test_a_form_is_that_of_the_answer_where_thoughts_have_begun(chat: Any) -> None:
    begun = [USER, {"role": "assistant", "content": "<think>Hm"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
    answer = chat(f", {{ so.</think>\n{PARIS}", messages=begun, response_format=form, extra_body=goes_on)
    message = answer.choices[0].message
    assert message.reasoning_content == ", { so." and json.loads(message.content) == json.loads(PARIS)


def test_a_model_whose_calls_cannot_be_read_is_given_no_tools(llm: AsyncLLM) -> None:
    engine = llm.engine
    other = AsyncLLM(replace(engine, formats=formats_of(engine.chat, engine.tokenizer.added_tokens, calls=NONE)))
    assert ask(other, {"tools": TOOLS}).json()["error"]["code"] == "unsupported_parameter"


def test_a_template_without_tools_has_them_told(llm: AsyncLLM) -> None:
    made = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "tool_calls": [made]},
               {"role": "tool", "tool_call_id": "c1", "content": "noon"}]  # fmt: skip
    longer = ask(llm, {"messages": history, "tools": TOOLS}).json()["usage"]["prompt_tokens"]
    shorter = ask(llm, {"messages": history}).json()["usage"]["prompt_tokens"]
    assert longer > shorter + 50
