"""Texts tokenized by another process: the same ids, and nothing lost when it dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.assemble import build_engine, find_model, read_face
from penstock.base import EngineError, InvalidRequest
from penstock.llm import AsyncLLM
from penstock.llm.online import FAR_CHARS
from penstock.llm.prompts import Prompts, packed
from penstock.spec import EngineConfig, PoolingParams
from penstock.wire import (
    Chat,
    Opening,
    Text,
    TextWorkers,
    Tokenized,
    Tokens,
    WireError,
    decode_from_texts,
    decode_to_texts,
    encode,
    python,
)

CONFIG = EngineConfig(max_model_len=1024)
TALK = [{"role": "user", "content": "Once <|endoftext|> upon"}, {"role": "assistant", "content": "a time"}]


@pytest.fixture(scope="module")
def workers() -> Iterator[TextWorkers]:
    workers = TextWorkers(python("penstock.texthost"), CONFIG, 1)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(read_face(find_model(None), CONFIG), 1024)


def result(future: Future[Tokenized]) -> Tokenized:
    return future.result(120)


def test_the_same_ids_as_here(workers: TextWorkers, prompts: Prompts) -> None:
    text = "Once upon a time <|endoftext|> naïve 日本 \0\n" * 300
    for special in (False, True):
        for parsed in (False, True):
            here = prompts.tokenize(text, add_special_tokens=special, parse_special=parsed)
            there = result(workers.tokenize(Text(text, special, parsed)))
            assert there.ids.tolist() == here["prompt_token_ids"] and there.text is None
    talk = prompts.chat(TALK, add_generation_prompt=True)
    there = result(workers.tokenize(Chat(TALK, {"add_generation_prompt": True})))
    assert (there.ids.tolist(), there.text) == (talk["prompt_token_ids"], talk["prompt"])


def test_what_is_wrong_with_a_text_is_said_as_here(workers: TextWorkers, prompts: Prompts) -> None:
    for order, code in (
        (Text("a" * 2_000_000), "prompt_too_long"),
        (Chat([], {}), "invalid_messages"),
        (Chat(TALK, {"eos_token": 1}), "invalid_parameter"),
    ):
        with pytest.raises(InvalidRequest, match=code):
            result(workers.tokenize(order))
    with pytest.raises(EngineError, match="tokenizer_failed"):
        result(workers.tokenize(Chat(TALK, {"messages": 1})))
    with pytest.raises(InvalidRequest, match="request_unsendable"):
        workers.tokenize(Text("\ud800"))
    assert workers.deaths == 0


def test_what_no_frame_holds_is_read_by_a_thread(workers: TextWorkers) -> None:
    """Of a long conversation as of a short one: JSON's integers have no end."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**30}}}
    llm = AsyncLLM(EngineConfig(), texts=workers)
    try:
        for count in (1, FAR_CHARS):
            talk = [{"role": "user", "content": "a " * count}]
            made = asyncio.run(llm.tokenize_chat(talk, tools=[tool]))
            assert len(made["prompt_token_ids"]) > count and str(10**30) in str(made.get("prompt"))
    finally:
        llm.engine.close()


@pytest.mark.parametrize("where", ["arguments", "reasoning_content", "tools"])
def test_a_conversation_is_as_long_as_all_that_is_rendered_of_it(workers: TextWorkers, where: str) -> None:
    long, tools = "once upon a time " * (FAR_CHARS // 16), None
    said: dict[str, Any] = {"role": "assistant", "content": "Hm."}
    if where == "arguments":
        said["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"a": [long]}}}]
    elif where == "reasoning_content":
        said[where] = long
    else:
        tools = [{"type": "function", "function": {"name": "f", "description": long}}]
    llm = AsyncLLM(EngineConfig(), texts=workers)
    try:
        with mock.patch.object(workers, "tokenize", wraps=workers.tokenize) as far:
            asyncio.run(llm.tokenize_chat([TALK[0], said], tools=tools))
            assert far.call_count == 1
            asyncio.run(llm.tokenize_chat(TALK))
            assert far.call_count == 1
    finally:
        llm.engine.close()


def test_what_becomes_a_vector_is_tokenized_by_a_worker_too(workers: TextWorkers) -> None:
    """Each text once, and with the same result."""
    long, short = "once upon a time " * (FAR_CHARS // 16), ["a cat", "a dog", "a fox"]
    engine, cut = build_engine(CONFIG), PoolingParams(truncate_prompt_tokens=100)
    here, beside = AsyncLLM(engine), AsyncLLM(engine, texts=workers)

    async def asked(llm: AsyncLLM) -> list[Any]:
        every = [*await llm.embed_all([long, "a cat"], cut), await llm.embed(long, cut)]
        every += [*await llm.score(short, [long] * 3, cut), *await llm.score(short[0], [long], cut)]
        return [(each.prompt_token_ids, each.outputs) for each in every]

    try:
        with mock.patch.object(workers, "tokenize", wraps=workers.tokenize) as far:
            assert asyncio.run(asked(beside)) == asyncio.run(asked(here))
        assert far.call_count == 4
    finally:
        engine.close()


def test_a_worker_that_is_killed_loses_nothing(workers: TextWorkers, prompts: Prompts) -> None:
    """Idle, and in the middle of the first of five texts."""
    expected = prompts.tokenize(text := "Once upon a time. " * 20_000)["prompt_token_ids"]
    before = workers.deaths
    for busy in (False, True):
        result(workers.tokenize(Text("a")))
        (pid,) = workers.pids
        waiting = [workers.tokenize(Text(text)) for _ in range(5)] if busy else []
        os.kill(pid, signal.SIGKILL)
        waiting += [workers.tokenize(Text(text))]
        assert all(result(each).ids.tolist() == expected for each in waiting)
    assert workers.deaths == before + 2


NONSENSE = """
import socket, sys
from penstock.wire import Connection, Tokens, encode
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
connection = Connection(sock)
connection.receive(), connection.receive()
connection.send(encode(Tokens(b"abc")))
connection.receive()
"""


@pytest.mark.parametrize("code", ["pass", NONSENSE], ids=["dies", "nonsense"])
def test_workers_of_no_use_say_so(code: str) -> None:
    workers = TextWorkers([sys.executable, "-c", code], CONFIG, 2)
    asked = [workers.tokenize(Text("a")) for _ in range(3)]
    for each in asked:
        with pytest.raises(EngineError, match="tokenizer_died"):
            result(each)
    assert workers.deaths == 6 and workers.pids == set()
    workers.close()
    with pytest.raises(EngineError, match="engine_closed"):
        workers.tokenize(Text("a"))


def test_whoever_asks_while_they_are_closed_is_answered() -> None:
    workers = TextWorkers(python("penstock.texthost"), CONFIG, 1)
    put = workers._orders.put
    closing = threading.Thread(target=workers.close)

    class Orders:
        """Lets ``close`` in where it hurts."""

        get = workers._orders.get

        def put(self, order: Any) -> None:
            if order is not None:
                closing.start()
                closing.join(0.2)
            put(order)

    workers._orders = Orders()  # type: ignore[assignment]
    assert isinstance(workers.tokenize(Text("a")).exception(20), EngineError | None)
    closing.join()


def test_a_worker_ends_with_whoever_started_it() -> None:
    workers = TextWorkers(python("penstock.texthost"), CONFIG, 1)
    result(workers.tokenize(Text("a")))
    (pid,) = workers.pids
    workers.close()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@given(st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_mutated_frame_is_a_message_or_a_wire_error(which: int, dice: random.Random) -> None:
    message = (Opening(CONFIG), Text("a" * 9), Chat(TALK, {"tools": [{"a": 1}]}), Tokens(b"abcdefgh", "é"))[which]
    broken = bytearray(encode(message))
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(broken))
        broken[at : at + dice.randint(0, 2)] = bytes(dice.randrange(256) for _ in range(dice.randint(0, 2)))
        broken = broken or bytearray(b"\0")
    try:
        (decode_from_texts if which == 3 else decode_to_texts)(bytes(broken))  # type: ignore[operator]
    except WireError as error:
        assert error.code == "bad_frame"


def test_ids_are_packed_where_they_are_many() -> None:
    assert packed([1, 2]) == [1, 2]
    assert packed(list(range(5000))).tolist() == list(range(5000))  # type: ignore[attr-defined]
    for wrong in ([-1] * 5000, [2**40] * 5000, [1.5] * 5000, ["a"] * 5000):
        assert packed(wrong) is wrong  # type: ignore[arg-type]
