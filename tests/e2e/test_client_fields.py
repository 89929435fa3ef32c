"""What clients of other people's APIs send by themselves, in this process, where a test may read the log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from penstock import AsyncLLM
from penstock.serving import build_app
from penstock.spec import EngineConfig
from penstock.text import ChatTemplate
from penstock.text.parsers import formats_of
from scripted import HERMES, saying

USER = {"role": "user", "content": "Weather?"}
MESSAGE = {"messages": [USER], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(num_threads=1, logits_rule="scripted:say"))
    yield llm
    llm.close()


def reading(llm: AsyncLLM, template: str) -> AsyncLLM:
    return AsyncLLM(replace(llm.engine, chat=ChatTemplate(template)))


def ask(llm: AsyncLLM, path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        app, _ = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


def test_what_claude_code_sends_by_itself_is_neither_refused_nor_told_to_the_operator(
    llm: AsyncLLM, caplog: pytest.LogCaptureFixture
) -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    told = reading(llm, HERMES)
    fields = {"context_management": edits, "metadata": {"user_id": "u"}}
    assert ask(told, "/v1/messages", **MESSAGE, **fields).status_code == 200
    counted = ask(told, "/v1/messages/count_tokens", messages=[USER], **fields).json()
    assert counted == ask(told, "/v1/messages/count_tokens", messages=[USER]).json() and counted["input_tokens"] > 4
    assert caplog.records == []


def test_effort_reaches_a_template_that_reads_it(llm: AsyncLLM) -> None:
    told = reading(llm, "{% if reasoning_effort %}Effort: {{ reasoning_effort }}\n{% endif %}" + HERMES)

    def tokens(of: AsyncLLM, **config: Any) -> int:
        answer = ask(of, "/v1/messages/count_tokens", messages=[USER], output_config=config)
        return int(answer.json()["input_tokens"])

    assert tokens(told, effort="xhigh") == tokens(told, effort="max") > tokens(told)
    assert tokens(reading(llm, HERMES), effort="max") == tokens(reading(llm, HERMES))
    wrong = ask(told, "/v1/messages", **MESSAGE, output_config={"effort": ["much"]})
    assert wrong.status_code == 400 and "output_config.effort" in wrong.json()["error"]["message"]


KNOWS_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}S: {{ m.content }}\n{% elif m.role == 'user' %}"
    "U: {{ m.content }}\n{% endif %}{% endfor %}A:"
)
ONE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('not first') }}"
    "{% elif m.role not in ['system', 'user'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}A:"
)


@pytest.mark.parametrize("template", [KNOWS_SYSTEM, ONE_SYSTEM])
def test_a_developer_reaches_templates_that_know_none(llm: AsyncLLM, template: str) -> None:
    """As Codex sends it, beside instructions, and as OpenAI's own models want it."""
    other, developer = reading(llm, template), {"role": "developer", "content": "Be brief."}
    joined = "Be Ada.\nS: Be brief." if template == KNOWS_SYSTEM else "Be Ada.\n\nBe brief."
    tokens = [
        ask(reading(llm, f"{mark}: {text}\n{user}: Weather?\nA:"), "/v1/chat/completions", **MESSAGE)
        for mark, user in [("S", "U") if template == KNOWS_SYSTEM else ("system", "user")]
        for text in ("Be brief.", joined)
    ]
    alone, both = [answer.json()["usage"]["prompt_tokens"] for answer in tokens]
    chat = ask(other, "/v1/chat/completions", **MESSAGE | {"messages": [developer, USER]})
    assert (chat.status_code, chat.json()["usage"]["prompt_tokens"]) == (200, alone), chat.text
    asked = {"max_output_tokens": 4, "input": [developer, USER], "instructions": "Be Ada.", "store": False}
    response = ask(other, "/v1/responses", **asked)
    assert (response.status_code, response.json()["usage"]["input_tokens"]) == (200, both), response.text
    counted = ask(other, "/v1/responses/input_tokens", input=[developer, USER], instructions="Be Ada.")
    assert counted.json()["input_tokens"] == both


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat"])
def test_an_answer_that_goes_on_is_not_thought_although_the_model_always_thinks(llm: AsyncLLM, path: str) -> None:
    engine = llm.engine
    formats = formats_of(engine.chat, engine.tokenizer.added_tokens, thoughts="deepseek_r1")
    other = AsyncLLM(replace(engine, chat=ChatTemplate(HERMES), formats=formats))
    begun = {"messages": [USER, {"role": "assistant", "content": "It"}], "max_tokens": 20, "stream": False}
    answer = ask(other, path, **begun, **saying(" is rainy.", engine.tokenizer)).json()
    said = answer["message"] if path == "/api/chat" else answer["content"]
    assert said in ({"role": "assistant", "content": " is rainy."}, [{"type": "text", "text": " is rainy."}])
