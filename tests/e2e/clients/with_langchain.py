"""The documented calls of LangChain's ChatOpenAI and OpenAIEmbeddings."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from common import PARIS, USER, given, run
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

GIVEN = given()
SAYS = GIVEN["says"]
SERVER: Any = {"base_url": f"{GIVEN['url']}/v1", "api_key": "none", "model": "m", "max_retries": 0}


class Weather(BaseModel):
    """The weather somewhere."""

    city: str
    days: int


@tool
def get_weather(city: str, days: int) -> str:
    """The weather."""
    return f"rain in {city} for {days} days"


def model(says: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(**SERVER, max_tokens=120, extra_body=SAYS[says], **options)


def chat() -> None:
    answer = model("plain").invoke([SystemMessage("Be brief."), HumanMessage("Hi")])
    assert answer.content == "Hello there." and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 2


def chat_streamed() -> None:
    chunks = list(model("plain", stream_usage=True).stream("Hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == "Hello there." and whole.usage_metadata["output_tokens"] > 2


def chat_awaited_and_in_batches() -> None:
    assert {answer.content for answer in model("plain").batch(["Hi"] * 4)} == {"Hello there."}

    async def streamed() -> str:
        return "".join([str(chunk.content) async for chunk in model("plain").astream("Hi")])

    assert asyncio.run(streamed()) == "Hello there."


def tools() -> None:
    bound = model("call").bind_tools([get_weather])
    answer = bound.invoke("Weather?")
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", PARIS)
    whole = None
    for chunk in bound.stream("Weather?"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls[0]["args"] == PARIS
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    final = model("plain").bind_tools([get_weather]).invoke([HumanMessage("Weather?"), answer, result])
    assert final.content == "Hello there."
    forced = model("only").bind_tools([get_weather], tool_choice="get_weather").invoke("Weather?")
    assert forced.tool_calls[0]["args"] == PARIS


def structured_output() -> None:
    for method, says in (("json_schema", "json"), ("function_calling", "record"), ("json_mode", "json")):
        found = model(says).with_structured_output(Weather, method=method).invoke("Weather?")
        assert found == Weather(**PARIS), method


def logprobs() -> None:
    entries = model("plain", logprobs=True, top_logprobs=2).invoke("Hi").response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith("Hello there.")


def responses() -> None:
    talk = model("plain", use_responses_api=True)
    first = talk.invoke("Hi")
    assert first.text == "Hello there." and first.response_metadata["id"].startswith("resp_")
    second = talk.invoke("And?", previous_response_id=first.response_metadata["id"])
    assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
    assert "".join(chunk.text for chunk in talk.stream("Hi")) == "Hello there."
    called = model("call", use_responses_api=True).bind_tools([get_weather]).invoke("Weather?")
    assert called.tool_calls[0]["args"] == PARIS


def completions() -> None:
    assert OpenAI(**SERVER, max_tokens=4).invoke("Once")


def embeddings() -> None:
    vectors = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False).embed_documents(["a", "b"])
    assert len(vectors) == 2 and len(vectors[0]) > 100


def errors() -> None:
    try:
        model("plain").invoke("a " * 9000)
    except ContextOverflowError as error:
        assert "maximum context length is" in str(error)
    else:
        raise AssertionError("more than the context holds")
    for wrong, kind in (({"temperature": 9e9}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
        try:
            ChatOpenAI(**SERVER | wrong).invoke([USER])
        except kind as error:
            assert error.code in ("invalid_parameter", "model_not_found")
        else:
            raise AssertionError(wrong)


run([
    chat, chat_streamed, chat_awaited_and_in_batches, tools, structured_output, logprobs, responses, completions,
    embeddings, errors,
])  # fmt: skip
