"""POST /v1/messages: Anthropic's Messages API. Whole answers and streams come out of the same events."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import msgspec
from msgspec import Meta

from penstock.serving.context import Context
from penstock.serving.dialogue import Dialogue, answer_begun, template_variables
from penstock.serving.errors import anthropic_body, invalid, unsupported
from penstock.serving.limits import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from penstock.serving.schemas import GenerationRequest, Harmless, ModelRequest, Stop
from penstock.serving.sse import Dialect, named
from penstock.serving.tools import FunctionSpec, Offer, ToolSpec, offer_of
from penstock.spec.ranges import MAX_ID
from penstock.spec.sampling import MAX_STOP
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning

Block = dict[str, Any]
Blocks = str | Annotated[list[Block], Meta(max_length=MAX_PARTS)]
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_TIERS: dict[str, Literal["standard", "priority", "batch"]] = {
    "default": "standard",
    "priority": "priority",
    "flex": "batch",  # Anthropic's word for what others go before
}

TURNS = ("user", "assistant", "system")


class Turn(msgspec.Struct, kw_only=True):
    role: Annotated[str, Meta(extra_json_schema={"enum": TURNS})]
    content: Blocks


class InputTool(msgspec.Struct, kw_only=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesRequest(GenerationRequest, kw_only=True):
    """POST /v1/messages; its own fields are Anthropic's, the others those of this server."""

    HARMLESS: ClassVar[Harmless] = {"container": (), "mcp_servers": ([],)}

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_ID)]
    system: Blocks | None = None
    tools: Annotated[list[InputTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Block | None = None
    thinking: Block | None = None
    output_config: Block | None = None
    output_format: Block | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOP)] | None = None
    metadata: Block | None = None

    def check(self) -> None:
        self.response_format = _form(self)
        GenerationRequest.check(self)


class CountRequest(ModelRequest, kw_only=True):
    """POST /v1/messages/count_tokens"""

    HARMLESS: ClassVar[Harmless] = MessagesRequest.HARMLESS

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Blocks | None = None
    tools: Annotated[list[InputTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Block | None = None
    thinking: Block | None = None
    output_config: Block | None = None
    output_format: Block | None = None


class MessageUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    service_tier: Literal["standard", "priority", "batch"]


class Message(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(TypedDict):
    """Its ``type`` is the event's name too, and says what else is in it."""

    type: str


class Counted(TypedDict):
    input_tokens: int


async def count_tokens(request: CountRequest, context: Context) -> Counted:
    """Raises HTTPError and InvalidRequest."""
    dialogue = await _prepared(await asyncio.to_thread(_as_message, request), context)
    return {"input_tokens": len(dialogue.generation.prompts[0]["prompt_token_ids"])}


def _as_message(request: CountRequest) -> MessagesRequest:
    asked = MessagesRequest(max_tokens=1, **{name: getattr(request, name) for name in request.__struct_fields__})
    asked.check()
    return asked


class MessagesTask:
    """One request: its conversation rendered and tokenized, ready to be answered whole or in events."""

    def __init__(self, request: MessagesRequest, dialogue: Dialogue) -> None:
        self.request, self.dialogue = request, dialogue
        self._blocks: list[Block] = []
        self._open = False

    @classmethod
    async def prepare(cls, request: MessagesRequest, context: Context) -> MessagesTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        return cls(request, await _prepared(request, context))

    async def whole(self) -> Block:
        message: Block = {}
        async with aclosing(self.chunks()) as events:
            async for event in events:
                if event["type"] == "message_start":
                    message = event["message"]
                elif event["type"] == "message_delta":
                    message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
        blocks = [block for block in self._blocks if block.pop("whole", True)]
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = msgspec.Raw(block["input"].encode())  # a number in it may be too long for Python
        return message | {"content": blocks}

    async def chunks(self) -> AsyncGenerator[Block, None]:
        started = False
        async with aclosing(self.dialogue.said()) as news:
            async for _, said in news:
                if not started:
                    started = True
                    yield {"type": "message_start", "message": self._message()}
                for event in said.events:
                    for told in self._tell(event):
                        yield told
                if said.finish_reason is not None:
                    for told in self._close():
                        yield told
                    yield {"type": "message_delta", "delta": _ending(said.finish_reason, said.delta.stop_reason),
                           "usage": self._usage()}  # fmt: skip
        yield {"type": "message_stop"}

    def _tell(self, event: Event) -> Iterator[Block]:
        match event:
            case Content(text):
                yield from self._goes_on({"type": "text", "text": ""}, {"type": "text_delta", "text": text}, text)
            case Reasoning(text):
                delta = {"type": "thinking_delta", "thinking": text}
                yield from self._goes_on({"type": "thinking", "thinking": "", "signature": ""}, delta, text)
            case CallStart(_, identifier, name):
                yield from self._begin({"type": "tool_use", "id": identifier, "name": name, "input": {}})
                self._blocks[-1]["input"] = ""
            case Arguments(_, text):
                self._blocks[-1]["input"] += text
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self._close()
            case CallDropped():  # its text follows
                self._blocks[-1]["whole"] = False
                yield from self._close()

    def _goes_on(self, empty: Block, delta: Block, text: str) -> Iterator[Block]:
        """Adds to the block that is open if it is of this kind, else to a new one."""
        kind = empty["type"]
        if not self._open or self._blocks[-1]["type"] != kind:
            yield from self._begin(empty)
        self._blocks[-1][kind] += text
        yield self._delta(delta)

    def _begin(self, block: Block) -> Iterator[Block]:
        yield from self._close()
        self._blocks.append(dict(block))
        self._open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _close(self) -> Iterator[Block]:
        if self._open:
            self._open = False
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: Block) -> Block:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self) -> Message:
        generation = self.dialogue.generation
        return {
            "id": generation.id,
            "type": "message",
            "role": "assistant",
            "model": generation.context.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> MessageUsage:
        """Tokens read from the cache are not among ``input_tokens``."""
        generation = self.dialogue.generation
        usage = generation.usage()
        return {
            "input_tokens": usage.prompt_tokens - generation.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": generation.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "service_tier": _TIERS[generation.context.tier(self.request)],
        }


def _ending(reason: str, stopped_by: int | str | None) -> Block:
    sequence = stopped_by if isinstance(stopped_by, str) else None
    kind = "stop_sequence" if sequence is not None and reason == "stop" else _STOP_REASONS.get(reason, reason)
    return {"stop_reason": kind, "stop_sequence": sequence}


async def _prepared(request: MessagesRequest, context: Context) -> Dialogue:
    engine = context.llm.engine
    if request.n not in (None, 1):
        raise invalid("n", "a message has one answer")
    request.stop = request.stop_sequences if request.stop_sequences is not None else request.stop
    thoughts = request.thinking or {}
    budget: int | None = None
    match thoughts:
        case {"type": "enabled", "budget_tokens": int(budget)} if 0 <= budget <= MAX_ID:
            pass
        case {"type": "disabled" | "adaptive"}:
            pass
        case {} if not thoughts:
            pass
        case _:
            raise invalid("thinking", f"it must be disabled, adaptive, or enabled with budget_tokens, at most {MAX_ID}")
    reads = engine.chat.variables if engine.chat is not None else frozenset[str]()
    switch = next((name for name in ("enable_thinking", "thinking") if name in reads), None)
    variables: dict[str, Any] | None = {switch: thoughts["type"] != "disabled"} if switch and thoughts else None
    effort = (request.output_config or {}).get("effort") if "reasoning_effort" in reads else None
    messages = await asyncio.to_thread(messages_from, request.messages, request.system)
    going_on = answer_begun(messages)
    return await Dialogue.prepare(
        context,
        f"msg_{uuid.uuid4().hex}",
        messages,
        request.params(dict(engine.recommended), max_tokens=request.max_tokens),
        await asyncio.to_thread(_offer, request),
        priority=request.priority or 0,
        variables=template_variables(
            engine.chat, variables, "xhigh" if effort == "max" else effort, "output_config.effort"
        ),
        add_generation_prompt=not going_on,
        continue_final_message=going_on,
        budget=budget if request.thinking_budget is None else None,  # this server's own field is kept, or refused
    )


def _form(request: MessagesRequest) -> dict[str, Any] | None:
    """What the answer must be, as chat's response_format; older clients say it in ``output_format``."""
    given = {
        "output_config.format": (request.output_config or {}).get("format"),
        "output_format": request.output_format,
        "response_format": request.response_format,
    }
    asked = {name: form for name, form in given.items() if form is not None}
    if len(asked) > 1:
        raise invalid(next(iter(asked)), f"{' and '.join(asked)} exclude each other")
    for name, form in asked.items():
        match form:
            case _ if name == "response_format":
                return request.response_format
            case {"type": "json_schema", "schema": dict(schema)}:
                return {"type": "json_schema", "json_schema": {"schema": schema}}
        raise invalid(name, "it must be a json_schema with its schema")
    return None


def _offer(request: MessagesRequest) -> Offer:
    tools = []
    for i, tool in enumerate(request.tools or ()):
        if tool.type not in (None, "custom"):
            raise unsupported(f"tools[{i}].type", what="Only tools of the caller's own are supported by this server")
        function = FunctionSpec(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        tools.append(ToolSpec(type="function", function=function))
    choice: Any = request.tool_choice or {}
    match choice:
        case {"type": "tool", "name": str(name)}:
            wanted: Any = {"type": "function", "function": {"name": name}}
        case {"type": "any"}:
            wanted = "required"
        case {"type": "auto" | "none" as wanted}:
            pass
        case {}:
            wanted = choice or None
    return offer_of(tools, wanted, False if choice.get("disable_parallel_tool_use") else None)


def messages_from(turns: Sequence[Turn], system: str | list[Block] | None) -> list[dict[str, Any]]:
    """Messages as templates read them. Raises HTTPError, which names the place."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": _text(system, "system")})
    for i, turn in enumerate(turns):
        place = f"messages[{i}]"
        if turn.role not in TURNS:
            raise invalid(f"{place}.role", "it must be user or assistant")
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            messages.append(_assistant(turn.content, place))
        else:
            results = [block for block in turn.content if block.get("type") == "tool_result"]
            for block in results:
                content = _text(block.get("content") or "", f"{place}.content")
                messages.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": content})
            said = [block for block in turn.content if block.get("type") != "tool_result"]
            if said or not results:
                messages.append({"role": turn.role, "content": _text(said, f"{place}.content")})
    return messages


def _assistant(blocks: Sequence[Block], place: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(call), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
                calls.append({"id": call, "type": "function", "function": function})
            case _:
                raise unsupported(f"{place}.content", what="Only text, thinking and tool_use blocks are supported")
    message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [None]:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise unsupported(place, what="Only text blocks are supported by this server")
    return "\n".join(texts)


EVENTS = Dialect(
    named, b"", lambda error, _: named(anthropic_body(error)), remark=lambda _: named(MessageEvent(type="ping"))
)
