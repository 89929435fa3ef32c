"""Answers that would hold up the event loop: they are encoded piece by piece, and read as if in one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serving import answers
from penstock.serving.answers import PIECE, VALUES, answered, size_of, told
from penstock.serving.batch_run import Answer, done
from penstock.serving.batch_table import Line
from penstock.serving.chat_schemas import AssistantMessage, CallPiece, ChatChoice, ChatCompletion, FunctionPiece
from penstock.serving.errors import HTTPError, body_of
from penstock.serving.limits import INLINE_BYTES
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.schemas import ChatLogprobs, Completion, CompletionChoice, PromptTokensDetails, Usage
from penstock.serving.vectors import Document, Embedding, Ranked, Ranking, VectorList, VectorUsage
from penstock.spec import Logprob
from penstock.text import Delta

USAGE = Usage(3, 4, 7, PromptTokensDetails(1))
OWN, NAME = "0123456789abcdef" * 2, "fedcba9876543210" * 2
LEAVES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(
    LEAVES | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=settings.default.max_examples // 4)
@given(value=VALUE, times=st.integers(0, 800))
def test_an_answer_in_pieces_is_what_it_is_in_one(value: Any, times: int) -> None:
    for long in (value, [value] * times, {"a": [value] * times, "": value}, [[value, "x" * times * 20], value]):
        assert b"".join(told(long)) == msgspec.json.encode(long)


class Letters:
    """All of a tokenizer that log-probabilities ask for."""

    def token_text(self, token: int) -> str:
        return chr(token + 97)

    def token_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode()


def logprobs(count: int, top: int) -> ChatLogprobs:
    entry = {token: Logprob(-token / 7, token + 1) for token in range(top)}
    delta = Delta(0, "", [token % top for token in range(count)], [entry] * count)
    return chat_logprobs(delta, cast(Any, Letters()), top)


def chat(choices: int = 2, count: int = 3, top: int = 2) -> ChatCompletion[ChatChoice]:
    call = CallPiece(FunctionPiece('{"a": "' + OWN[:8] + '"}', "f"), id="call_1", type="function")
    message = AssistantMessage("Yes.", tool_calls=[call])
    made = [ChatChoice(i, message, logprobs(count, top), "stop") for i in range(choices)]
    return ChatCompletion(f"chatcmpl-{OWN}", "chat.completion", 1, "m", made, USAGE, "default", "fp_1")


def response(text: str = "Yes.") -> Any:
    parts = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    items = [{"id": f"msg_{OWN}0", "content": parts}, {"id": f"fc_{OWN}1", "call_id": "call_1", "arguments": "{}"}]
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    return {"id": f"resp_{OWN}", "object": "response", "created_at": 1, "output": items, "usage": usage}


def completion(text: str) -> Completion:
    return Completion(f"cmpl-{OWN}", "text_completion", 1, "m", [CompletionChoice(0, text, None, "length")], USAGE)


ANSWERS: list[Any] = [
    chat,
    lambda: chat(4, 300, 20),
    lambda: completion("Yes."),
    lambda: completion("\u00e9\U0001f600\n" * 50_000),
    response,
    lambda: response("a" * 100_000),
    lambda: VectorList(f"embd-{OWN}", 1, "m", [Embedding(i, [i / 3] * 9000) for i in range(9)], VectorUsage(5, 5)),
    lambda: Ranking(f"rerank-{OWN}", "m", VectorUsage(5, 5), [Ranked(0, Document("a"), 0.25)] * 3),
    lambda: body_of(HTTPError("invalid_parameter", "No")),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_a_line_of_a_batch_says_what_its_answer_does(answer: Any) -> None:
    """Under its own name, at its batch's time."""
    body: Answer = answer()
    assert b"".join(told(body)) == msgspec.json.encode(body)
    plain = msgspec.json.decode(msgspec.json.encode(body))
    for time in {"created", "created_at"} & set(plain):
        plain[time] = 1_800_000_000
    plain = {"status_code": 200, "request_id": NAME, "body": plain}
    expected = {"id": f"batch_req_{NAME}", "custom_id": "a", "response": plain, "error": None}
    text = msgspec.json.encode(expected).replace(OWN.encode(), NAME.encode()) + b"\n"
    result = done(Line(7, "a", 0, 1), NAME, 200, body, 1_800_000_000)
    assert result.result == text
    usage = plain["body"].get("usage", {})
    names = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
    tokens = [sum(usage.get(name, 0) for name in each) for each in names]
    assert [result.number, result.failed, result.tokens_in, result.tokens_out] == [7, False, *tokens]


@pytest.mark.parametrize("answer", [
    lambda: chat(16, 256, 20),
    lambda: VectorList("", 1, "m", [Embedding(i, [1 / 3] * 1024) for i in range(64)], VectorUsage(5, 5)),
    lambda: {"outputs": [{"data": [1 / 3] * 100_000}]},
    lambda: {"embeddings": [[1 / 3] * 1024] * 64},
    lambda: response("a" * 1_000_000),
], ids=range(5))  # fmt: skip
def test_nothing_long_is_encoded_in_one_go(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes, encode = answer(), list[int](), answers._encode

    def noted(value: object) -> bytes:
        text = encode(value)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(answers, "_encode", noted)
    size = sum(map(len, told(made)))
    assert size > 20 * PIECE and max(sizes) <= 20 * VALUES
    assert size_of(made) > INLINE_BYTES


def test_log_probabilities_are_encoded_as_they_come() -> None:
    """What is left to do at the end is to copy them; and to free them, which is quick."""
    tokens = logprobs(2, 20).content
    assert all(isinstance(token, msgspec.Raw) for token in tokens)
    plain = msgspec.json.decode(msgspec.json.encode(tokens))
    assert [len(token["top_logprobs"]) for token in plain] == [20, 20]


@pytest.mark.parametrize(("length", "aside"), [(10, False), (INLINE_BYTES, True)])
def test_only_what_is_short_is_encoded_on_the_loop(length: int, aside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(value: object) -> list[bytes]:
        threads.append(threading.current_thread())
        return told(value)

    monkeypatch.setattr(answers, "told", noted)
    answer = asyncio.run(answered(completion("a" * length)))
    assert threading.current_thread() not in threads and bool(threads) == aside and answer.status_code == 200
