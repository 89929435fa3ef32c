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
    parts: list[tuple[float, bytes]] = []
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            response = await client.request("POST", path, body, lambda at, part: parts.append((at, part)))
    except Broken as broken:
        error = broken.code
    except TimeoutError:
        error = "timeout"
    else:
        done = parts[-1][0] if parts else time.perf_counter()
        if response.status == 200:
            return read_stream(parts, sent, done)
        code, message = _fault(b"".join(part for _, part in parts))
        return Answer(sent, done, error=f"http_{response.status}{f'_{code}' if code else ''}", message=message)
    got = read_stream(parts, sent, time.perf_counter())
    return Answer(sent, got.done, got.times, got.text, error=error)


def read_stream(parts: list[tuple[float, bytes]], sent: float, done: float) -> Answer:
    """The answer in the server-sent events of a body that came in these parts, each with its time. An event has the
    time of the part that ended it."""
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    finish, error, message, ended, rest = "", "", "", False, b""
    for at, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                continue
            try:
                event = json.loads(data)
                text, reason = _text(event)
            except (ValueError, AttributeError, LookupError, TypeError):
                error = error or "bad_event"
                continue
            if text:
                times.append(at)
                texts.append(text)
            finish = reason or finish
            usage = event.get("usage") or usage
            if fault := event.get("error"):
                code, message = _fault(data)
                error = f"stream_{code or 'error'}" if isinstance(fault, dict) else "stream_error"
    if not ended and not error:
        error = "stream_ended_early"
    details = usage.get("prompt_tokens_details") or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))
    return Answer(sent, done, tuple(times), "".join(texts), finish, *counts, error=error, message=message)


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
    """What a server says of itself at /models: ids, and the context of the first if it says so."""

    models: tuple[str, ...]
    longest: int | None


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
        models, longest = tuple(str(model["id"]) for model in listed), listed[0].get("max_model_len")
    except (ValueError, LookupError, AttributeError, TypeError):
        why = f"status {answer.status}: {b''.join(parts)[:200].decode(errors='replace')}"
        fix = "give the URL of a server with OpenAI's API, and --api-key if it wants one"
        raise EngineError("bad_server", f"{where}/models does not list models", why=why, fix=fix) from None
    return Served(models, longest if isinstance(longest, int) else None)


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
