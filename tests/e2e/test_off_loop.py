"""What takes long of a large body is done beside the event loop, whichever API it comes by."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import AsyncLLM
from penstock.serving import build_app
from penstock.serving.limits import INLINE_BYTES
from penstock.spec import EngineConfig, StructuredOutputs
from penstock.text import ChatTemplate
from servers import MODEL, PROMPT, TEMPLATE


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), served_model_name=MODEL, dtype="float32", num_threads=1))
    yield AsyncLLM(replace(llm.engine, chat=ChatTemplate(TEMPLATE)))
    llm.close()


def sent(llm: AsyncLLM, path: str, body: object) -> httpx.Response:
    async def send() -> httpx.Response:
        app, context = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            answer = await client.post(path, json=body)
        await context.batches.close()
        return answer

    return asyncio.run(send())


def threads_of(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[threading.Thread]:
    """Where it is called from now on."""
    seen: list[threading.Thread] = []
    work: Callable[..., object] = getattr(owner, name)

    def seeing(*args: Any, **kwargs: Any) -> object:
        seen.append(threading.current_thread())
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, seeing)
    return seen


SCHEMA = {"description": "x" * INLINE_BYTES, "type": "object"}
SAID = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
FORMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 1, "structured_outputs": {"json": SCHEMA}},
    "/v1/chat/completions": SAID | {"guided_json": SCHEMA},
    "/v1/responses": {"input": "Who?", "max_output_tokens": 1, "store": False, "text": {"format": FORMAT}},
    "/v1/messages": SAID | {"output_config": {"format": FORMAT}},
    "/v1/messages/count_tokens": {"messages": SAID["messages"], "output_format": FORMAT},
    "/api/chat": {"messages": SAID["messages"], "format": SCHEMA, "options": {"num_predict": 1}, "stream": False},
    "/api/generate": {"prompt": PROMPT, "raw": True, "format": SCHEMA, "max_tokens": 1, "stream": False},
}


@pytest.mark.parametrize("path", FORMS)
def test_forms_are_made_beside_the_loop(llm: AsyncLLM, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threads_of(monkeypatch, StructuredOutputs, "__post_init__")
    answer = sent(llm, path, FORMS[path])
    assert answer.status_code == 200, answer.text
    assert seen and threading.current_thread() not in seen
