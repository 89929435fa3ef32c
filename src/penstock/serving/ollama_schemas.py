"""Requests of Ollama's API on the wire, and what they say in the terms of the others."""

from __future__ import annotations

import re
from math import inf
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from penstock.serving.context import Context
from penstock.serving.dialogue import template_variables
from penstock.serving.errors import invalid, unsupported
from penstock.serving.limits import MAX_MESSAGES, MAX_TEXTS, MAX_TOOLS
from penstock.serving.schemas import GenerationRequest, Harmless, ModelRequest, Name, Stop
from penstock.serving.tools import ToolSpec
from penstock.spec import SamplingParams
from penstock.spec.ranges import MAX_ID
from penstock.spec.sampling import MAX_STOP

Body = dict[str, Any]
LONGEST = 1e9
KeepAlive = Annotated[float, Meta(ge=-LONGEST, le=LONGEST)] | Name
"""Seconds, or a text such as "5m" or "1h30m": for how long the model is to stay; less than 0 for ever."""
_SPAN = re.compile(r"([+-]?)((?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h))+)", re.ASCII)
_PART = re.compile(r"([\d.]+)(\D+)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"[+-]?\d{1,9}(?:\.\d{1,9})?", re.ASCII)
LATEST = ":latest"
_HARMLESS: Harmless = {"images": ([],), "template": ("",), "context": ([],)}


_NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


def seconds_of(keep_alive: KeepAlive | None) -> float | None:
    """As of ``ModelRequest.stays``. Raises HTTPError: (invalid_parameter) no span of time (Go's ``ParseDuration``)."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        if _NUMBER.fullmatch(keep_alive):
            keep_alive = float(keep_alive)
        elif (found := _SPAN.fullmatch(keep_alive)) is not None:
            keep_alive = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(found[2]))
            keep_alive *= -1.0 if found[1] == "-" else 1.0
        else:
            raise invalid("keep_alive", 'it must be a number of seconds, or a text such as "5m" or "1h30m"')
    return float(keep_alive) if 0 <= keep_alive <= LONGEST else inf


class Options(msgspec.Struct, kw_only=True):
    """Those that change an answer. The others are about loading, and are not read."""

    num_predict: Annotated[int, Meta(ge=-2, le=MAX_ID)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: Annotated[float, Meta(ge=1e-4, le=1e4)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOP)] | None = None
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
        seconds_of(self.keep_alive)
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
        GenerationRequest.check(self)
        if self.asks_nothing:
            self.params({"max_tokens": None}, max_tokens=self.max_tokens)

    @property
    def asks_nothing(self) -> bool:
        """But that the model be there, or leave."""
        return False

    @property
    def only_parts(self) -> bool:
        return self.asks_nothing and self.stays == 0

    @property
    def stays(self) -> float | None:
        return seconds_of(self.keep_alive)

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
        return template_variables(engine.chat, None, "none" if self.think is False else self.think, "think")


class CalledTool(msgspec.Struct, kw_only=True):
    name: str
    arguments: Body = msgspec.field(default_factory=dict)


class MadeCall(msgspec.Struct, kw_only=True):
    function: CalledTool
    id: Name | None = None


class OllamaTurn(msgspec.Struct, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[MadeCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None


class OllamaChat(OllamaRequest, kw_only=True):
    """POST /api/chat"""

    messages: Annotated[list[OllamaTurn], Meta(max_length=MAX_MESSAGES)] = msgspec.field(default_factory=list)
    tools: list[ToolSpec] | None = None

    @property
    def asks_nothing(self) -> bool:
        return not self.messages


class OllamaGenerate(OllamaRequest, kw_only=True):
    """POST /api/generate"""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None

    @property
    def asks_nothing(self) -> bool:
        return not self.prompt


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
        seconds_of(self.keep_alive)

    @property
    def stays(self) -> float | None:
        return seconds_of(self.keep_alive)


class OllamaEmbedding(OllamaEmbed, kw_only=True):
    """POST /api/embeddings, its former form."""

    input: str | list[str] = ""
    prompt: str


def messages_from(turns: list[OllamaTurn]) -> list[Body]:
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
