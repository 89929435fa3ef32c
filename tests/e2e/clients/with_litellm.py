"""The documented calls of LiteLLM's SDK, for a server of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet what models cost

import litellm
from common import PARIS, USER, WEATHER, eventually, given, run
from pydantic import BaseModel

GIVEN = given()
SAYS = GIVEN["says"]
SERVER: Any = {"api_base": f"{GIVEN['url']}/v1", "api_key": "none"}
FILES: Any = {"custom_llm_provider": "openai", **SERVER}


class Weather(BaseModel):
    city: str
    days: int


def asked(says: str, **options: Any) -> dict[str, Any]:
    return {"model": "openai/m", "messages": [USER], "max_tokens": 120, "extra_body": SAYS[says], **SERVER, **options}


def chat() -> None:
    answer = litellm.completion(**asked("plain"))
    assert answer.choices[0].message.content == "Hello there." and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def chat_streamed() -> None:
    chunks = list(litellm.completion(**asked("plain"), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there."
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == "Hello there."
    assert chunks[-1].usage.completion_tokens > 2


def chat_awaited() -> None:
    async def several() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**asked("plain")) for _ in range(4)))

    assert {answer.choices[0].message.content for answer in asyncio.run(several())} == {"Hello there."}


def tools() -> None:
    [call] = litellm.completion(**asked("call"), tools=[WEATHER]).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == PARIS
    chunks = list(litellm.completion(**asked("only"), tools=[WEATHER], stream=True))
    [joined] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(joined.function.arguments) == PARIS
    back = [USER, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}]  # fmt: skip
    assert litellm.completion(**asked("plain", messages=back), tools=[WEATHER]).choices[0].message.content


def structured_output() -> None:
    text = litellm.completion(**asked("json"), response_format=Weather).choices[0].message.content
    assert Weather.model_validate_json(text) == Weather(**PARIS)
    plain = litellm.completion(**asked("json"), response_format={"type": "json_object"})
    assert json.loads(plain.choices[0].message.content) == PARIS


def thoughts() -> None:
    message = litellm.completion(**asked("thought")).choices[0].message
    assert (message.reasoning_content, message.content) == ("Paris is in France.", "Yes.")
    chunks = litellm.completion(**asked("thought"), stream=True)
    told = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
    assert told == "Paris is in France."


def completions() -> None:
    answer = litellm.text_completion(model="text-completion-openai/m", prompt="Once", max_tokens=4, **SERVER)
    assert answer.choices[0].text


def responses() -> None:
    asking: Any = {"model": "openai/m", "input": "Hi", "extra_body": SAYS["plain"], **SERVER}
    answer = litellm.responses(**asking)
    assert answer.output[-1].content[0].text == "Hello there."
    events = [event.type for event in litellm.responses(**asking, stream=True)]
    assert str(events[-1]).lower().endswith("completed"), events


def embeddings() -> None:
    answer = litellm.embedding(model="openai/m", input=["a", "b"], **SERVER)
    assert [len(item["embedding"]) > 100 for item in answer.data] == [True, True]


def files_and_batches() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2}}
    file = litellm.create_file(file=("in.jsonl", json.dumps(line).encode()), purpose="batch", **FILES)
    made: Any = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = litellm.create_batch(**made, **FILES)
    eventually(lambda: litellm.retrieve_batch(batch_id=batch.id, **FILES).status in ("completed", "failed"))
    done = litellm.retrieve_batch(batch_id=batch.id, **FILES)
    assert done.status == "completed"
    text = litellm.file_content(file_id=done.output_file_id, **FILES).content
    assert json.loads(text)["response"]["status_code"] == 200


def errors() -> None:
    for wrong, kind in (
        ({"temperature": -1}, litellm.BadRequestError),
        ({"model": "openai/other"}, litellm.NotFoundError),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, litellm.ContextWindowExceededError),
    ):
        try:
            litellm.completion(**asked("plain", **wrong))
        except kind as error:
            assert error.status_code == (404 if kind is litellm.NotFoundError else 400)
        else:
            raise AssertionError(wrong)
    keyed = {"api_base": f"{GIVEN['keyed']['url']}/v1", "api_key": "wrong", "extra_body": {}}
    try:
        litellm.completion(**asked("plain", **keyed))
    except litellm.AuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key")


run([
    chat, chat_streamed, chat_awaited, tools, structured_output, thoughts, completions, responses, embeddings,
    files_and_batches, errors,
])  # fmt: skip
