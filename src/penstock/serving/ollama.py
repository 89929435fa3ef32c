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
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from penstock.serving.chat import message_of
from penstock.serving.completions import with_gap
from penstock.serving.context import Context, Generation
from penstock.serving.dialogue import Dialogue, Said, template_variables
from penstock.serving.errors import invalid, plain_body, unsupported
from penstock.serving.gate import current
from penstock.serving.limits import MAX_MESSAGES, MAX_TEXTS, MAX_TOOLS
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.schemas import GenerationRequest, Harmless, ModelRequest, Name, Stop, TokenLogprob
from penstock.serving.sse import Dialect
from penstock.serving.tools import ToolSpec, offer_of
from penstock.spec import PoolingParams, SamplingParams
from penstock.spec.ranges import MAX_ID
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning

Body = dict[str, Any]
News = AsyncGenerator[tuple[int, Said], None]
KeepAlive = Annotated[float, Meta(ge=-1e9, le=1e9)] | Name
"""Seconds, or a text such as "5m": for how long the model is to stay. It does."""
LATEST = ":latest"
_HARMLESS: Harmless = {"images": ([],), "template": ("",), "context": ([],)}


_NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


class Options(msgspec.Struct, kw_only=True):
    """Those that change an answer. The others are about loading, and are not read."""

    num_predict: Annotated[int, Meta(ge=-2, le=MAX_ID)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    mirostat: Literal[0] | None = None


class OllamaRequest(GenerationRequest, kw_only=True):
    """What chat and generate have in common. Fields of ``options`` may also be fields of the request."""

    HARMLESS: ClassVar[Harmless] = _HARMLESS

    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: KeepAlive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None

    def check(self) -> None:
        self.stream = self.stream is not False
        self.model = None if self.model is None else self.model.removesuffix(LATEST)
        GenerationRequest.check(self)
        if self.n not in (None, 1):
            raise invalid("n", "there is one answer")
        if options := self.options:
            for name in options.__struct_fields__:
                if (value := getattr(options, name)) is not None and name != "mirostat":
                    setattr(self, _NAMES.get(name, name), value)
            if options.num_predict is not None and options.num_predict < 1:  # no limit
                self.max_tokens = None
        if self.format == "json":
            self.response_format = {"type": "json_object"}
        elif isinstance(self.format, dict):
            self.response_format = {"type": "json_schema", "json_schema": {"schema": self.format}}
        elif self.format:
            raise invalid("format", 'it must be "json" or a JSON schema')

    def sampling_params(self, context: Context) -> SamplingParams:
        """As many tokens as the context holds, unless the request or the model says less."""
        return self.params(
            {"max_tokens": None, **context.llm.engine.recommended},
            max_tokens=self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def variables(self, context: Context) -> dict[str, Any]:
        """What ``think`` says to the chat template. Raises HTTPError: (unsupported_parameter) it knows no thoughts."""
        engine = context.llm.engine
        if self.think is True:
            if engine.formats.thoughts is None:
                raise unsupported("think", what="This model does not think before it answers")
            reads = frozenset[str]() if engine.chat is None else engine.chat.variables
            switches = {name: True for name in ("enable_thinking", "thinking") if name in reads}
            return template_variables(engine.chat, dict(list(switches.items())[:1]), None)
        return template_variables(engine.chat, None, "none" if self.think is False else self.think)


class CalledTool(msgspec.Struct, kw_only=True):
    name: str
    arguments: Body = msgspec.field(default_factory=dict)


class MadeCall(msgspec.Struct, kw_only=True):
    function: CalledTool
    id: Name | None = None


class Turn(msgspec.Struct, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[MadeCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None


class OllamaChat(OllamaRequest, kw_only=True):
    """POST /api/chat"""

    messages: Annotated[list[Turn], Meta(max_length=MAX_MESSAGES)] = msgspec.field(default_factory=list)
    tools: list[ToolSpec] | None = None


class OllamaGenerate(OllamaRequest, kw_only=True):
    """POST /api/generate"""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


class OllamaEmbed(ModelRequest, kw_only=True):
    """POST /api/embed"""

    HARMLESS: ClassVar[Harmless] = {}

    input: str | Annotated[list[str], Meta(max_length=MAX_TEXTS)]
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    options: Body | None = None
    keep_alive: KeepAlive | None = None

    def check(self) -> None:
        self.model = None if self.model is None else self.model.removesuffix(LATEST)


class OllamaEmbedding(OllamaEmbed, kw_only=True):
    """POST /api/embeddings, its former form."""

    input: str | list[str] = ""
    prompt: str


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
        if not request.messages:
            return cls(request, context, None, None)
        offer = await asyncio.to_thread(offer_of, request.tools, None, None)
        return await cls._dialogue(request, context, messages_from(request.messages), offer)

    @classmethod
    async def generate(cls, request: OllamaGenerate, context: Context) -> OllamaTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        if not request.prompt:
            return cls(request, context, None, None)
        if context.llm.engine.chat is not None and not request.raw and not request.suffix:
            system = [{"role": "system", "content": request.system}] if request.system else []
            messages = [*system, {"role": "user", "content": request.prompt}]
            return await cls._dialogue(request, context, messages, offer_of(None, None, None))
        if request.system and not request.raw:
            raise unsupported("system", what="system needs a chat template, and neither suffix nor raw goes with it")
        params = request.sampling_params(context)
        await context.llm.compile(params)
        if request.suffix:
            prompt = await with_gap(request.prompt, request.suffix, context)
        else:
            prompt = await context.llm.tokenize(request.prompt)
        generation = Generation(context, _identifier(), [prompt], params, request.priority or 0)
        return cls(request, context, generation, lambda: _as_said(generation))

    @classmethod
    async def _dialogue(cls, request: OllamaRequest, context: Context, messages: list[Body], offer: Any) -> OllamaTask:
        dialogue = await Dialogue.prepare(
            context,
            _identifier(),
            messages,
            request.sampling_params(context),
            offer,
            priority=request.priority or 0,
            variables=request.variables(context),
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
            yield self._line("", {"done": True, "done_reason": "load"})
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
        """Durations in nanoseconds. The model is there already, so that loading it takes no time."""
        assert self.generation is not None
        caller, usage, now = current.get(), self.generation.usage(), time.monotonic()
        first = caller.first_token or now
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": _nanoseconds(now - caller.arrived),
            "load_duration": 0,
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


def messages_from(turns: list[Turn]) -> list[Body]:
    """Messages as templates read them. A result answers the call that it names, else the first of its tool's."""
    messages: list[Body] = []
    open_calls: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        place = f"messages[{number}]"
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise invalid(f"{place}.role", "it must be one of system, user, assistant, tool")
        if turn.images:
            raise unsupported(f"{place}.images")
        message: Body = {"role": turn.role, "content": turn.content or ""}
        if turn.thinking:
            message["reasoning_content"] = turn.thinking
        if turn.tool_calls:
            message["tool_calls"] = []
            for i, call in enumerate(turn.tool_calls):
                identifier = call.id or f"{number:05d}{i:04d}"  # nine digits, which every template takes
                open_calls.append((identifier, call.function.name))
                given = msgspec.json.encode(call.function.arguments).decode()
                function = {"name": call.function.name, "arguments": given}
                message["tool_calls"].append({"id": identifier, "type": "function", "function": function})
        if turn.role == "tool":
            answered = next((c for c in open_calls if c[0] == turn.tool_call_id or c[1] == turn.tool_name), None)
            answered = answered or next(iter(open_calls), (turn.tool_call_id or "", turn.tool_name or ""))
            open_calls = [call for call in open_calls if call != answered]
            message |= {"tool_call_id": turn.tool_call_id or answered[0], "name": turn.tool_name or answered[1]}
        messages.append(message)
    return messages


async def embed(request: OllamaEmbed, context: Context) -> Body:
    """Raises InvalidRequest, and what ``AsyncLLM.embed_all`` raises."""
    inputs = [request.input] if isinstance(request.input, str) else request.input
    vectors, tokens = await _vectors(inputs, request, context)
    taken = _nanoseconds(time.monotonic() - current.get().arrived)
    counts = {"total_duration": taken, "load_duration": 0, "prompt_eval_count": tokens}
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


LINES = Dialect(_as_line, b"", lambda error: _as_line(plain_body(error)), "application/x-ndjson")
