"""Requests and streams of OpenAI's API, as any server of it understands them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from penstock.base import EngineError
from penstock.bench.load.http import Broken, HttpClient
from penstock.bench.load.workload import WORDS, WordWriter

HEAD = 4096
Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True)
class Asking:
    """What all requests have in common.

    Attributes:
        chat: /chat/completions with messages instead of /completions with a prompt.
        extra: further fields of the body.
    """

    model: str
    chat: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def body(self, prompt: Prompt, output: int) -> bytes:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": output, "stream": True}
        asked |= {"messages" if self.chat else "prompt": prompt, "stream_options": {"include_usage": True}}
        return json.dumps(asked | self.extra).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """A request as the client saw it. Times are those of ``time.perf_counter``.

    Attributes:
        times: when each event with text arrived.
        prompt_tokens, output_tokens, cached_tokens: as the server's usage says; None if it says nothing.
        error: code of what went wrong, "" if nothing did.
    """

    sent: float
    done: float
    times: tuple[float, ...] = ()
    text: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    message: str = ""


async def ask(client: HttpClient, path: str, body: bytes, timeout: float) -> Answer:
    """Sends a request and reads its stream to the end. Whatever goes wrong is in the answer."""
    stream = Stream()
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            response = await client.request("POST", path, body, stream.feed)
    except Broken as broken:
        return stream.answer(sent, time.perf_counter(), broken.code)
    except TimeoutError:
        return stream.answer(sent, time.perf_counter(), "timeout")
    done = stream.last or time.perf_counter()
    if response.status == 200:
        return stream.answer(sent, done)
    code, message = _fault(stream.head)
    return Answer(sent, done, error=f"http_{response.status}{f'_{code}' if code else ''}", message=message)


class Stream:
    """Server-sent events in a body that comes in parts. An event has the time of the part that ended it. It is decoded
    as it comes: all of an answer at its end would hold up the loop, and make what arrives meanwhile look late.

    Attributes:
        head: of the body as it came, for an answer that is no stream.
        last: time of the last part.
    """

    def __init__(self) -> None:
        self.head, self.last, self._rest = b"", 0.0, b""
        self._times: list[float] = []
        self._texts: list[str] = []
        self._usage: dict[str, Any] = {}
        self._finish = self._error = self._message = ""
        self._ended = False

    def feed(self, at: float, part: bytes) -> None:
        self.last = at
        if len(self.head) < HEAD:
            self.head += part
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(at, line[5:].strip())

    def _event(self, at: float, data: bytes) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            event = json.loads(data)
            text, reason = _text(event)
        except (ValueError, AttributeError, LookupError, TypeError):
            self._error = self._error or "bad_event"
            return
        if text:
            self._times.append(at)
            self._texts.append(text)
        self._finish = reason or self._finish
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        if event.get("error"):
            code, self._message = _fault(data)
            self._error = f"stream_{code or 'error'}"

    def answer(self, sent: float, done: float, error: str = "") -> Answer:
        """``error``: of the connection, before which none of the stream's own counts."""
        return Answer(
            sent,
            done,
            tuple(self._times),
            "".join(self._texts),
            self._finish,
            _count(self._usage, "prompt_tokens"),
            _count(self._usage, "completion_tokens"),
            _count(self._usage.get("prompt_tokens_details"), "cached_tokens"),
            error or self._error or ("" if self._ended else "stream_ended_early"),
            self._message,
        )


def _count(usage: object, name: str) -> int | None:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) else None


def _text(event: dict[str, Any]) -> tuple[str, str]:
    """Text (reasoning and calls of tools are text too) and finish reason of an event's choices."""
    text, reason = "", ""
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            text += choice.get("text") or ""
        else:
            text += (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "")
            text += "".join(
                (call.get("function") or {}).get("arguments") or "" for call in delta.get("tool_calls") or ()
            )
        reason = choice.get("finish_reason") or reason
    return text, reason


def _fault(body: bytes) -> tuple[str, str]:
    """Code and message of an error body; both may be empty."""
    try:
        fault = json.loads(body)["error"]
        code = fault.get("code") or fault.get("type") or ""
        return "".join(c if c.isalnum() else "_" for c in str(code))[:60], str(fault.get("message") or "")[:400]
    except (ValueError, LookupError, AttributeError, TypeError):
        return "", body[:200].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of itself at /models: ids, and the context of each id and alias where it says so."""

    models: tuple[str, ...]
    contexts: dict[str, int]


async def served(client: HttpClient) -> Served:
    """Raises EngineError: (server_unreachable) it does not answer; (bad_server) it lists no models."""
    parts: list[bytes] = []
    where = f"{client.host}:{client.port}{client.prefix}"
    try:
        async with asyncio.timeout(30):
            answer = await client.request("GET", "/models", b"", lambda _, part: parts.append(part))
    except (Broken, TimeoutError) as error:
        why = error.code.replace("_", " ") if isinstance(error, Broken) else "no answer in 30 s"
        fix = "see that it runs and that --url is right"
        raise EngineError("server_unreachable", f"The server at {where} does not answer", why=why, fix=fix) from None
    try:
        listed = json.loads(b"".join(parts))["data"]
        models = (str(listed[0]["id"]), *(str(model["id"]) for model in listed[1:]))
        contexts: dict[str, int] = {}
        for model in listed:
            if isinstance(longest := model.get("max_model_len"), int):
                contexts |= dict.fromkeys([str(model["id"]), *(model.get("aliases") or ())], longest)
    except (ValueError, LookupError, AttributeError, TypeError):
        why = f"status {answer.status}: {b''.join(parts)[:200].decode(errors='replace')}"
        fix = "give the URL of a server with OpenAI's API, and --api-key if it wants one"
        raise EngineError("bad_server", f"{where}/models does not list models", why=why, fix=fix) from None
    return Served(models, contexts)


CALIBRATION = (40, 120)
"""Words of the two requests by whose usage words are counted in tokens."""


async def calibrate(client: HttpClient, asking: Asking, timeout: float) -> WordWriter:
    """How many tokens the server makes of a word, and of nothing: from the usage of two short requests.

    Raises:
        EngineError: (bad_server) a request failed or brought no usage.
    """
    counts = []
    for words in CALIBRATION:
        text = " ".join(WORDS[i % len(WORDS)] for i in range(words))
        prompt: Prompt = [{"role": "user", "content": text}] if asking.chat else text
        answer = await ask(client, asking.path, asking.body(prompt, 1), timeout)
        if answer.error or not answer.prompt_tokens:
            why = f"{answer.error}: {answer.message}" if answer.error else "its stream brings no usage"
            fix = "see what it answers, or give --vocabulary for prompts of token ids"
            raise EngineError("bad_server", "The server did not say how long a prompt was", why=why, fix=fix)
        counts.append(answer.prompt_tokens)
    per_word = max(0.1, (counts[1] - counts[0]) / (CALIBRATION[1] - CALIBRATION[0]))
    return WordWriter(round(per_word, 4), round(max(0.0, counts[0] - CALIBRATION[0] * per_word), 2))
