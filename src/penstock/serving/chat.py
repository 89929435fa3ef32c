"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from penstock.serving.chat_schemas import (
    AssistantMessage,
    C,
    CallPiece,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    CustomPiece,
    FunctionPiece,
)
from penstock.serving.context import Context
from penstock.serving.custom_tools import InputText, arguments_of, as_functions, custom_names, text_of
from penstock.serving.dialogue import Dialogue, template_variables
from penstock.serving.errors import invalid, unsupported
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.schemas import (
    ROLES,
    CalledCustom,
    CalledFunction,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    PastCall,
    Usage,
)
from penstock.serving.tools import Offer, offer_of
from penstock.text import Delta
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning


class ChatTask:
    """One request: its conversation rendered and tokenized, ready to be answered whole or in chunks."""

    def __init__(self, request: ChatRequest, dialogue: Dialogue) -> None:
        self.request, self.dialogue, self.generation = request, dialogue, dialogue.generation
        self._custom = custom_names(request.tools)

    @classmethod
    async def prepare(cls, request: ChatRequest, context: Context) -> ChatTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        engine = context.llm.engine
        going_on = bool(request.continue_final_message)
        dialogue = await Dialogue.prepare(
            context,
            f"chatcmpl-{uuid.uuid4().hex}",
            messages_of(request),
            request.sampling_params(engine.recommended),
            await asyncio.to_thread(_offer, request),
            priority=request.priority or 0,
            variables=template_variables(engine.chat, request.chat_template_kwargs, request.reasoning_effort),
            add_generation_prompt=not going_on
            if request.add_generation_prompt is None
            else request.add_generation_prompt,
            continue_final_message=going_on,
        )
        return cls(request, dialogue)

    async def whole(self) -> ChatCompletion[ChatChoice]:
        choices: dict[int, ChatChoice] = {}
        events: dict[int, list[Event]] = {}
        async with aclosing(self.dialogue.said()) as news:
            async for index, said in news:
                delta, logprobs = said.delta, self._logprobs(said.delta)
                events.setdefault(index, []).extend(said.events)
                new = ChatChoice(index, AssistantMessage(None), logprobs, said.finish_reason, delta.stop_reason)
                if (choice := choices.setdefault(index, new)) is not new:
                    choice.finish_reason, choice.stop_reason = said.finish_reason, delta.stop_reason
                    if choice.logprobs is not None and logprobs is not None:
                        choice.logprobs.content += logprobs.content
        for index, choice in choices.items():
            choice.message = message_of(events[index], self._custom)
        ordered = [choices[index] for index in sorted(choices)]
        return self._completion("chat.completion", ordered, self.dialogue.usage())

    async def chunks(self) -> AsyncGenerator[object, None]:
        """The role first; then what is said, thought and called; the reason it ended comes with an empty delta."""
        pieces_of: dict[int, Pieces] = {}
        async with aclosing(self.dialogue.said()) as news:
            async for index, said in news:
                if index not in pieces_of:
                    pieces_of[index] = Pieces(self._custom)
                    yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content=""), None, None))
                logprobs = self._logprobs(said.delta)
                pieces = pieces_of[index].of(said.events)
                if not pieces and logprobs is not None and logprobs.content:
                    pieces = [ChatDelta(content="")]
                for piece in pieces:
                    yield self._chunk(ChatChunkChoice(index, piece, logprobs, None))
                    logprobs = None if logprobs is None else ChatLogprobs([])
                if said.finish_reason is not None:
                    yield self._chunk(
                        ChatChunkChoice(index, ChatDelta(), None, said.finish_reason, said.delta.stop_reason)
                    )
        if self.request.usage_wanted():
            none: list[ChatChunkChoice] = []
            yield self._completion("chat.completion.chunk", none, self.dialogue.usage())

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        tokenizer = self.generation.context.llm.engine.tokenizer
        return chat_logprobs(delta, tokenizer, self.request.top_logprobs or 0) if self.request.logprobs else None

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletion[ChatChunkChoice]:
        return self._completion("chat.completion.chunk", [choice], None if self.request.usage_wanted() else UNSET)

    def _completion(self, kind: str, choices: list[C], usage: Usage | UnsetType | None = UNSET) -> ChatCompletion[C]:
        made, tier = self.generation, self.generation.context.tier(self.request)
        return ChatCompletion(made.id, kind, made.created, made.context.name, choices, usage, tier, made.fingerprint)


def _offer(request: ChatRequest) -> Offer:
    return offer_of(as_functions(request.tools), request.tool_choice, request.parallel_tool_calls)


def message_of(events: Sequence[Event], custom: Collection[str] = ()) -> AssistantMessage:
    """All that was said, in one message. Calls that came to nothing are not in it: their text is content.

    Args:
        custom: names of tools whose input is a text.
    """
    content = "".join(event.text for event in events if isinstance(event, Content))
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: dict[int, tuple[CallStart, list[str]]] = {}
    for event in events:
        match event:
            case CallStart(i):
                calls[i] = (event, [])
            case Arguments(i, text):
                calls[i][1].append(text)
            case CallDropped(i):
                del calls[i]
    message = AssistantMessage(content if content or not calls else None)
    if thoughts:
        message.reasoning_content = message.reasoning = thoughts
    made = [_call(start, "".join(arguments), start.name in custom) for start, arguments in calls.values()]
    message.tool_calls = made or msgspec.UNSET
    return message


def _call(start: CallStart, arguments: str, custom: bool, index: int | UnsetType = UNSET) -> CallPiece:
    if custom:
        return CallPiece(custom=CustomPiece(text_of(arguments), start.name), index=index, id=start.id, type="custom")
    return CallPiece(FunctionPiece(arguments, start.name), index=index, id=start.id, type="function")


class Pieces:
    """Chunks' deltas of one choice, in order. A call that came to nothing is not taken back: its text follows as
    content.

    Args:
        custom: names of tools whose input is a text.
    """

    def __init__(self, custom: Collection[str] = ()) -> None:
        self._custom = custom
        self._inputs: dict[int, InputText] = {}

    def of(self, events: Sequence[Event]) -> list[ChatDelta]:
        deltas: list[ChatDelta] = []
        for event in events:
            match event:
                case Content(text):
                    deltas.append(ChatDelta(content=text))
                case Reasoning(text):
                    deltas.append(ChatDelta(reasoning_content=text, reasoning=text))
                case CallStart(i, _, name):
                    if name in self._custom:
                        self._inputs[i] = InputText()
                    deltas.append(ChatDelta(tool_calls=[_call(event, "", name in self._custom, i)]))
                case Arguments(i, text) if i in self._inputs:
                    deltas += _more(i, self._inputs[i].feed(text))
                case Arguments(i, text):
                    deltas.append(ChatDelta(tool_calls=[CallPiece(FunctionPiece(text), index=i)]))
                case CallEnd(i) if i in self._inputs:
                    deltas += _more(i, self._inputs.pop(i).finish())
        return deltas


def _more(index: int, text: str) -> list[ChatDelta]:
    """Of the input of a custom tool."""
    return [ChatDelta(tool_calls=[CallPiece(custom=CustomPiece(text), index=index)])] if text else []


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages as templates read them: text parts joined by newlines, absent fields left out."""
    return [plain_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]


def plain_message(message: ChatMessage, place: str) -> dict[str, Any]:
    """One message; ``place`` names it in errors. Raises HTTPError: (invalid_parameter, unsupported_parameter)."""
    if message.role not in ROLES:
        raise invalid(f"{place}.role", f"it must be one of {', '.join(ROLES)}")
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise unsupported(
                    f"{place}.content[{i}].type", what="Only text parts of a message are supported by this server"
                )
        content = "\n".join(part.text or "" for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content or ""}
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [_called(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return plain


def _called(call: PastCall, place: str) -> dict[str, Any]:
    match call.type, call.function, call.custom:
        case "function", CalledFunction(name=name, arguments=arguments), _:
            pass
        case "custom", _, CalledCustom(name=name, input=text):
            arguments = arguments_of(text)
        case "function" | "custom", _, _:
            raise invalid(f"{place}.{call.type}", "it is missing")
        case _:
            raise unsupported(f"{place}.type", what="Only calls of type function and custom are supported here")
    return {"id": call.id, "type": "function", "function": {"name": name, "arguments": arguments}}
