"""Answers of chat on the wire, whole and in chunks."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from penstock.serving.schemas import ChatLogprobs, Usage


class FunctionPiece(msgspec.Struct, omit_defaults=True):
    arguments: str = msgspec.field(default_factory=str)  # a factory's value is never left out
    name: str | None = None


class CustomPiece(msgspec.Struct, omit_defaults=True):
    input: str = msgspec.field(default_factory=str)
    name: str | None = None


class CallPiece(msgspec.Struct, omit_defaults=True):
    """A call, or what is new of it: index, id, type and name come once, with its first piece."""

    function: FunctionPiece | msgspec.UnsetType = msgspec.UNSET
    custom: CustomPiece | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str | None = None
    type: str | None = None


class AssistantMessage(msgspec.Struct):
    """``reasoning_content`` and ``reasoning`` are the same, under the names of different clients."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CallPiece] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


C = TypeVar("C", ChatChoice, ChatChunkChoice)


class ChatCompletion(msgspec.Struct, Generic[C]):
    """Of ChatChoice; of ChatChunkChoice each chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[C]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    service_tier: str = "default"
    system_fingerprint: str | None = None
