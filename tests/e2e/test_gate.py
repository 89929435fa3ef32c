"""The gate in this process: every kind of end, and requests that cannot be told apart by whose prefix they find."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import AsyncLLM
from penstock.fleet import Admission, Rates
from penstock.serving import build_app, files
from penstock.serving.batch_table import Batch
from penstock.serving.gate import Gate
from penstock.serving.keys import change_keys, new_key
from penstock.spec import EngineConfig, SamplingParams, StructuredOutputs
from servers import PROMPT

KEYED = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/score", "/v1/rerank")


@pytest.fixture(scope="module")
def llm(stories: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(EngineConfig(model=str(stories), dtype="float32", num_threads=1))
    yield llm
    llm.close()


@pytest.fixture
def gate(tmp_path: Path) -> tuple[Gate, str]:
    secret, record = new_key([], tenant="acme", role="inference")
    change_keys(tmp_path / "keys", lambda _: [record])
    return Gate(Admission(5000), tmp_path / "keys"), secret


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from([PROMPT, [5, 6], [], "", [[1], [2, 3]], [9999], 5, "x " * 600]),
        "messages": st.sampled_from([[], [{"role": "user", "content": "a"}], [{"role": "x"}]]),
        "input": st.sampled_from(["a", ["a", "b"], [], [[1, 2]], ""]),
        "text_1": st.sampled_from(["a", ["a", "b"], []]),
        "text_2": st.sampled_from(["a", ["a", "b", "c"]]),
        "query": st.just("a"),
        "documents": st.sampled_from([["a"], ["a", "b"], []]),
        "n": st.sampled_from([1, 2, 0, 128]),
        "best_of": st.sampled_from([1, 2]),
        "max_tokens": st.sampled_from([1, 3, 0, 400, None]),
        "stream": st.booleans(),
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "?"}]),
        "model": st.sampled_from([None, "nobody"]),
    },
)


@given(path=st.sampled_from(KEYED), bodies=st.lists(BODIES, min_size=1, max_size=4), leaves=st.booleans())
def test_whatever_is_asked_the_books_are_empty_afterwards(
    llm: AsyncLLM, path: str, bodies: list[dict[str, Any]], leaves: bool
) -> None:
    async def ask() -> None:
        gate = Gate(Admission(2000))
        app, _ = build_app(llm, gate=gate)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            tasks = [asyncio.create_task(client.post(path, json=body)) for body in bodies]
            if leaves:
                await asyncio.sleep(0.002)
                for task in tasks:
                    task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:
            assert isinstance(answer, asyncio.CancelledError | httpx.Response), answer
            if isinstance(answer, httpx.Response):
                assert answer.status_code in (200, 400, 404, 503), answer.text
        assert (gate.admission.running, gate.admission.held, gate.live) == (0, 0, set())

    asyncio.run(ask())


def test_vectors_are_charged_by_their_tokens(llm: AsyncLLM, gate: tuple[Gate, str]) -> None:
    books, key = gate

    async def ask(**body: Any) -> tuple[httpx.Response, int]:
        app, _ = build_app(llm, gate=books)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            most = 0
            task = asyncio.create_task(client.post("/v1/embeddings", json=body, headers={"x-api-key": key}))
            while not task.done():
                most = max(most, books.admission.held)
                await asyncio.sleep(0)
            return await task, most

    answer, held = asyncio.run(ask(input=[[5] * 100, [6] * 50]))
    assert answer.json()["usage"]["prompt_tokens"] == 150 == held
    books.admission.budget = 120
    assert asyncio.run(ask(input=[[5] * 100]))[0].status_code == 200
    held_by_another = books.admission.enter("other", books.ring.rates("other"), 0.0)  # type: ignore[union-attr]
    books.admission.charge(held_by_another, 40, 0.0)
    refused, _ = asyncio.run(ask(input=[[5] * 100]))
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"


def test_a_prompt_that_never_fits_is_told_so_also_while_there_is_no_room(llm: AsyncLLM) -> None:
    async def ask(**body: Any) -> httpx.Response:
        gate = Gate(Admission(120))
        gate.admission.charge(gate.admission.enter("other", Rates(), 0.0), 100, 0.0)
        app, _ = build_app(llm, gate=gate)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/completions", json=body)

    longest = llm.engine.config.max_model_len
    for prompt, expected in (
        ([5] * longest, (400, "context_length_exceeded")),
        ([5] * (longest - 1), (503, "queue_full")),
    ):
        answer = asyncio.run(ask(prompt=prompt))
        assert (answer.status_code, answer.json()["error"]["code"]) == expected


def test_schemas_that_take_long_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads, none of which ends; of one tenant one at a time is begun."""
    llm, go = AsyncLLM(EngineConfig(dtype="float32", num_threads=1)), threading.Event()
    grammars, begun = llm.engine.grammars(), list[str]()
    known, compiled = StructuredOutputs(regex="[ab]{3}"), grammars.compile
    held = compiled(known)

    def slow(wanted: StructuredOutputs) -> object:
        if wanted != known:
            begun.append(str(wanted.regex))
            go.wait(60)
        return compiled(wanted)

    monkeypatch.setattr(grammars, "compile", slow)

    async def ask() -> None:
        app, _ = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:

            def say(**form: object) -> Awaitable[httpx.Response]:
                body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4} | form
                return client.post("/v1/chat/completions", json=body)

            waiting = [asyncio.ensure_future(say(guided_regex=f"[a-c]{{{i}}}")) for i in range(1, 41)]
            while not begun:
                await asyncio.sleep(0.01)
            try:
                for form in ({}, {"guided_regex": held and known.regex}):
                    assert (await asyncio.wait_for(say(**form), 30)).status_code == 200
                await llm.tokenize("Once upon a time. " * 200)
                assert not any(each.done() for each in waiting) and len(begun) == 1
                other = asyncio.ensure_future(
                    AsyncLLM(llm, "other").compile(SamplingParams(structured_outputs=StructuredOutputs(regex="other")))
                )
                while len(begun) < 2:
                    await asyncio.sleep(0.01)
                assert begun[1] == "other"
            finally:
                go.set()
            await other
            assert {each.status_code for each in await asyncio.gather(*waiting)} == {200}

    asyncio.run(ask())
    llm.close()


def test_all_uploads_together_have_a_bound(llm: AsyncLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SPOOLED_BYTES", 3 << 20)
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    form = {"content-type": "multipart/form-data; boundary=x"}

    async def ask() -> None:
        app, context = build_app(llm, tmp_path)
        goes_on = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield head + b"a" * (2 << 20)
            await goes_on.wait()
            yield b"\r\n--x--\r\n"

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            first = asyncio.ensure_future(client.post("/v1/files", content=slow(), headers=form))
            while context.gate.spooled < 2 << 20:
                await asyncio.sleep(0.01)
            body = head + b"b" * (2 << 20) + b"\r\n--x--\r\n"
            refused = await client.post("/v1/files", content=body, headers=form)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "spool_full")
            goes_on.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/files", content=body, headers=form)).status_code == 200
        assert context.gate.spooled == 0
        await context.batches.close()

    asyncio.run(ask())


def test_what_is_read_is_looked_at_before_there_are_threads(llm: AsyncLLM) -> None:
    """Two threads that were the first to read batches ended the server."""
    if "__msgspec_cache__" in vars(Batch):
        del Batch.__msgspec_cache__  # type: ignore[attr-defined]
    build_app(llm)
    assert "__msgspec_cache__" in vars(Batch)
