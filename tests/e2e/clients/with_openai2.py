"""The documented calls of ``openai`` 2.x."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from common import PARIS, USER, WEATHER, eventually, given, run
from pydantic import BaseModel

GIVEN = given()
URL, SAYS = GIVEN["url"], GIVEN["says"]
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", timeout=60, max_retries=0)


class Weather(BaseModel):
    city: str
    days: int


def create(says: str, **options: Any) -> Any:
    asked: Any = {"model": "m", "messages": [USER], "max_tokens": 120} | options
    return CLIENT.chat.completions.create(**asked, extra_body=SAYS[says])


def chat() -> None:
    answer = create("plain")
    assert answer.choices[0].message.content == "Hello there." and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(create("plain", n=2, logprobs=True, top_logprobs=2).choices[1].logprobs.content[0].top_logprobs) == 2


def chat_streamed() -> None:
    chunks = list(create("plain", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello there."
    assert chunks[-1].usage.completion_tokens > 2
    with CLIENT.chat.completions.stream(model="m", messages=[USER], extra_body=SAYS["plain"]) as stream:
        kinds = {event.type for event in stream}
    assert {"content.delta", "content.done"} <= kinds
    assert stream.get_final_completion().choices[0].message.content == "Hello there."


def tools() -> None:
    [call] = create("call", tools=[WEATHER]).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == PARIS
    pieces = [p for c in create("call", tools=[WEATHER], stream=True) for p in c.choices[0].delta.tool_calls or ()]
    assert json.loads("".join(p.function.arguments for p in pieces)) == PARIS
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    parsed = CLIENT.chat.completions.parse(model="m", messages=[USER], tools=[tool], extra_body=SAYS["call"])
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(**PARIS)
    back = [USER, parsed.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert create("plain", messages=back, tools=[WEATHER]).choices[0].message.content == "Hello there."


def structured_output() -> None:
    parsed = CLIENT.chat.completions.parse(model="m", messages=[USER], response_format=Weather, extra_body=SAYS["json"])
    assert parsed.choices[0].message.parsed == Weather(**PARIS)
    assert json.loads(create("json", response_format={"type": "json_object"}).choices[0].message.content) == PARIS


def thoughts() -> None:
    answer = create("thought")
    assert answer.choices[0].message.reasoning_content == "Paris is in France."
    assert answer.choices[0].message.content == "Yes." and answer.usage.completion_tokens_details.reasoning_tokens > 3


def completions() -> None:
    options: Any = {"model": "m", "prompt": "Once", "max_tokens": 4, "seed": 1}
    whole = CLIENT.completions.create(**options).choices[0].text
    assert "".join(c.choices[0].text for c in CLIENT.completions.create(**options, stream=True)) == whole != ""


def responses() -> None:
    first = CLIENT.responses.create(model="m", input="Hi", extra_body=SAYS["plain"])
    assert first.output_text == "Hello there." and CLIENT.responses.retrieve(first.id).output == first.output
    with CLIENT.responses.stream(model="m", input="And?", previous_response_id=first.id, extra_body=SAYS["plain"]) as s:
        assert "".join(e.delta for e in s if e.type == "response.output_text.delta") == "Hello there."
        assert s.get_final_response().usage.input_tokens > first.usage.input_tokens
    parsed = CLIENT.responses.parse(model="m", input="Hi", text_format=Weather, extra_body=SAYS["json"])
    assert parsed.output_parsed == Weather(**PARIS)
    function: Any = {"type": "function", **WEATHER["function"], "strict": False}  # type: ignore[dict-item]
    called = CLIENT.responses.create(model="m", input="Hi", tools=[function], extra_body=SAYS["call"])
    assert json.loads(called.output[-1].arguments) == PARIS
    assert [item.type for item in CLIENT.responses.input_items.list(first.id)] == ["message"]
    CLIENT.responses.delete(first.id)


def conversations() -> None:
    conversation = CLIENT.conversations.create(
        items=[{"role": "developer", "content": "Be brief."}], metadata={"a": "b"}
    )
    for _ in range(2):
        answer = CLIENT.responses.create(model="m", input="Hi", conversation=conversation.id, extra_body=SAYS["plain"])
        assert answer.conversation and answer.conversation.id == conversation.id
    items = list(CLIENT.conversations.items.list(conversation.id, order="asc", limit=2))
    assert [item.role for item in items] == ["developer", "user", "assistant", "user", "assistant"]  # type: ignore[union-attr]
    CLIENT.conversations.items.delete(items[0].id or "", conversation_id=conversation.id)
    (added,) = CLIENT.conversations.items.create(conversation.id, items=[{"role": "user", "content": "And?"}]).data
    assert CLIENT.conversations.items.retrieve(added.id or "", conversation_id=conversation.id) == added
    assert CLIENT.conversations.update(conversation.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert CLIENT.conversations.retrieve(conversation.id).created_at == conversation.created_at
    assert CLIENT.conversations.delete(conversation.id).deleted


def embeddings() -> None:
    packed = CLIENT.embeddings.create(model="m", input=["a", "b"])
    plain = CLIENT.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        pairs = list(zip(one.embedding, other.embedding, strict=True))
        assert len(pairs) > 100 and all(abs(a - b) < 1e-6 for a, b in pairs)
    assert packed.usage.prompt_tokens >= 2


def models() -> None:
    assert [model.id for model in CLIENT.models.list()] == ["m"] and CLIENT.models.retrieve("m").id == "m"


def files_and_batches() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2}}
    file = CLIENT.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    assert file.id in [each.id for each in CLIENT.files.list(purpose="batch")]
    assert CLIENT.files.content(file.id).read() == json.dumps(line).encode() and CLIENT.files.retrieve(file.id) == file
    made: Any = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = CLIENT.batches.create(**made, metadata={"a": "b"})
    eventually(lambda: CLIENT.batches.retrieve(batch.id).status in ("completed", "failed"))
    done = CLIENT.batches.retrieve(batch.id)
    assert (done.status, done.request_counts.completed, done.metadata) == ("completed", 1, {"a": "b"})
    answer = json.loads(CLIENT.files.content(done.output_file_id).text)
    assert answer["custom_id"] == "a" and answer["response"]["status_code"] == 200
    assert batch.id in [each.id for each in CLIENT.batches.list(limit=5)]
    try:
        CLIENT.batches.cancel(batch.id)
    except openai.ConflictError as error:
        assert error.code == "batch_ended"
    assert CLIENT.files.delete(file.id).deleted


def errors() -> None:
    for ask, kind, code in (
        (lambda: create("plain", temperature=-1), openai.BadRequestError, "invalid_parameter"),
        (lambda: create("plain", model="other"), openai.NotFoundError, "model_not_found"),
        (lambda: CLIENT.files.retrieve("file-" + "0" * 32), openai.NotFoundError, "file_not_found"),
    ):
        try:
            ask()
        except openai.APIStatusError as error:
            assert type(error) is kind and error.code == code and error.request_id, error
        else:
            raise AssertionError(code)


def retries() -> None:
    from retrying import check_retries

    check_retries(openai, GIVEN["keyed"], lambda client: client.completions)


def several_at_a_time() -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
            ask: Any = {"model": "m", "messages": [USER], "extra_body": SAYS["plain"]}
            return await asyncio.gather(*(client.chat.completions.create(**ask) for _ in range(8)))

    assert {answer.choices[0].message.content for answer in asyncio.run(all_of_them())} == {"Hello there."}


run([
    chat, chat_streamed, tools, structured_output, thoughts, completions, responses, conversations, embeddings,
    models,     files_and_batches, errors, retries, several_at_a_time,
])  # fmt: skip
