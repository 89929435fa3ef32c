"""POST /api/chat, /api/generate, /api/embed and /api/embeddings: Ollama's API (its docs/api.md), over one dialogue.

Answers come as lines of JSON unless ``stream`` is false. Options that say how a model is to be loaded are passed over.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.serving.chat import message_of
from penstock.serving.completions import with_gap
from penstock.serving.context import Context, Generation
from penstock.serving.dialogue import Dialogue, Said, answer_begun
from penstock.serving.errors import plain_body, unsupported
from penstock.serving.gate import current
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.ollama_schemas import (
    Body,
    OllamaChat,
    OllamaEmbed,
    OllamaEmbedding,
    OllamaGenerate,
    OllamaRequest,
    messages_from,
)
from penstock.serving.schemas import TokenLogprob
from penstock.serving.sse import Dialect
from penstock.serving.tools import offer_of
from penstock.spec import PoolingParams
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning

News = AsyncGenerator[tuple[int, Said], None]


class OllamaTask:
    """One request: prepared, ready to be answered whole or in lines.

    Args:
        news: what the model says; None if the request only asks that the model be there.
    """

    def __init__(
        self, request: OllamaRequest, context: Context, generation: Generation | None, news: Callable[[], News] | None
    ) -> None:
        self.request, self.context, self.generation, self._news = request, context, generation, news
        self._calls: dict[int, list[Event]] = {}

    @classmethod
    async def chat(cls, request: OllamaChat, context: Context) -> OllamaTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        if request.asks_nothing:
            return cls(request, context, None, None)
        offer = await asyncio.to_thread(offer_of, request.tools, None, None)
        return await cls._dialogue(request, context, messages_from(request.messages), offer)

    @classmethod
    async def generate(cls, request: OllamaGenerate, context: Context) -> OllamaTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        if request.asks_nothing:
            return cls(request, context, None, None)
        if context.llm.engine.chat is not None and not request.raw and not request.suffix:
            system = [{"role": "system", "content": request.system}] if request.system else []
            messages = [*system, {"role": "user", "content": request.prompt}]
            return await cls._dialogue(request, context, messages, offer_of(None, None, None))
        if request.system and not request.raw:
            raise unsupported("system", what="system needs a chat template, and neither suffix nor raw goes with it")
        params = request.sampling_params(context)
        await context.own_llm.compile(params)
        if request.suffix:
            prompt = await with_gap(request.prompt, request.suffix, context)
        else:
            prompt = await context.llm.tokenize(request.prompt)
        generation = Generation(context, _identifier(), [prompt], params, request.priority or 0)
        return cls(request, context, generation, lambda: _as_said(generation))

    @classmethod
    async def _dialogue(cls, request: OllamaRequest, context: Context, messages: list[Body], offer: Any) -> OllamaTask:
        going_on = answer_begun(messages)
        dialogue = await Dialogue.prepare(
            context,
            _identifier(),
            messages,
            request.sampling_params(context),
            offer,
            priority=request.priority or 0,
            variables=request.variables(context),
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
        )
        return cls(request, context, dialogue.generation, dialogue.said)

    async def whole(self) -> Body:
        answer: Body = {}
        async with aclosing(self.chunks()) as lines:
            async for line in lines:
                answer = line if not answer else _joined(answer, line)
        return answer

    async def chunks(self) -> AsyncGenerator[Body, None]:
        if self._news is None:
            parts = self.request.only_parts and self.context.heeds
            yield self._line("", {"done": True, "done_reason": "unload" if parts else "load"})
            return
        reason = "stop"
        async with aclosing(self._news()) as news:
            async for _, said in news:
                reason = said.finish_reason or reason
                text, more = self._told(said)
                if text or more:
                    yield self._line(text, {"done": False}, more)
        yield self._line("", self._end("length" if reason == "length" else "stop"))

    def _told(self, said: Said) -> tuple[str, Body]:
        """What is new: content, and thoughts, whole calls and log-probabilities."""
        more: Body = {}
        if thoughts := "".join(event.text for event in said.events if isinstance(event, Reasoning)):
            more["thinking"] = thoughts
        calls = []
        for event in said.events:
            match event:
                case CallStart(i) | Arguments(i):
                    self._calls.setdefault(i, []).append(event)
                case CallDropped(i):
                    del self._calls[i]
                case CallEnd(i):
                    [made] = message_of(self._calls.pop(i)).tool_calls or []
                    assert made.function is not msgspec.UNSET  # its tools are functions
                    given = msgspec.Raw(made.function.arguments.encode())  # a number may be too long for Python
                    calls.append(
                        {"id": made.id, "function": {"index": i, "name": made.function.name, "arguments": given}}
                    )
        if calls:
            more["tool_calls"] = calls
        if self.request.logprobs and said.delta.logprobs:
            more["logprobs"] = self._logprobs(said)
        return "".join(event.text for event in said.events if isinstance(event, Content)), more

    def _logprobs(self, said: Said) -> list[TokenLogprob]:
        return chat_logprobs(said.delta, self.context.llm.engine.tokenizer, self.request.top_logprobs or 0).content

    def _line(self, text: str, end: Body, more: Body | None = None) -> Body:
        more = more or {}
        logprobs = {"logprobs": more.pop("logprobs")} if "logprobs" in more else {}
        if isinstance(self.request, OllamaChat):
            said: Body = {"message": {"role": "assistant", "content": text, **more}}
        else:
            said = {"response": text, **more}
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self.context.name, "created_at": created, **said, **logprobs, **end}

    def _end(self, reason: str) -> Body:
        """Durations in nanoseconds."""
        assert self.generation is not None
        caller, usage, now = current.get(), self.generation.usage(), time.monotonic()
        first = caller.first_token or now
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": _nanoseconds(now - caller.arrived),
            "load_duration": _nanoseconds(caller.load),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - (caller.started or first)),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(now - first),
        }


async def _as_said(generation: Generation) -> News:
    """Text in which nothing is looked for."""
    async with aclosing(generation.deltas()) as news:
        async for index, delta in news:
            yield index, Said(delta, [Content(delta.text)] if delta.text else [], delta.finish_reason)


def _joined(answer: Body, line: Body) -> Body:
    """Two lines of one answer as one."""
    old, new = answer.get("message", answer), line.get("message", line)
    both = {
        key: old.get(key, "") + new.get(key, "") for key in ("content", "response", "thinking") if key in {**old, **new}
    }
    both |= {key: old.get(key, []) + new.get(key, []) for key in ("tool_calls",) if key in {**old, **new}}
    joined = answer | line | ({"message": old | both} if "message" in answer else both)
    if "logprobs" in {**answer, **line}:
        joined["logprobs"] = answer.get("logprobs", []) + line.get("logprobs", [])
    return joined


async def embed(request: OllamaEmbed, context: Context) -> Body:
    """Raises InvalidRequest, and what ``AsyncLLM.embed_all`` raises."""
    inputs = [request.input] if isinstance(request.input, str) else request.input
    vectors, tokens = await _vectors(inputs, request, context)
    taken = _nanoseconds(time.monotonic() - current.get().arrived)
    counts = {"total_duration": taken, "load_duration": _nanoseconds(current.get().load), "prompt_eval_count": tokens}
    return {"model": context.name, "embeddings": vectors, **counts}


async def embedding(request: OllamaEmbedding, context: Context) -> Body:
    """As ``embed``."""
    [vector], _ = await _vectors([request.prompt], request, context)
    return {"embedding": vector}


async def _vectors(inputs: list[str], request: OllamaEmbed, context: Context) -> tuple[list[list[float]], int]:
    cut = None if request.truncate is False else -1
    params = PoolingParams(dimensions=request.dimensions, truncate_prompt_tokens=cut)
    admit = current.get().charge
    outputs = await context.own_llm.embed_all(inputs, params, request.priority or 0, admit=admit)
    return [output.outputs.embedding for output in outputs], sum(len(output.prompt_token_ids) for output in outputs)


def _identifier() -> str:
    return f"ollama-{uuid.uuid4().hex}"


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _as_line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"


LINES = Dialect(_as_line, b"", lambda error, _: _as_line(plain_body(error)), "application/x-ndjson", remark=None)
