"""Requests of OpenAI's Responses API on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, TypedDict

import msgspec
from msgspec import Meta

from penstock.serving.errors import HTTPError, invalid, unsupported
from penstock.serving.limits import MAX_INCLUDED, MAX_MESSAGES, MAX_TOOLS
from penstock.serving.response_items import Item, format_from
from penstock.serving.schemas import GenerationRequest, Harmless, Metadata, ModelRequest, Name
from penstock.spec.ranges import MAX_ID

LOGPROBS = "message.output_text.logprobs"
_OF_OTHERS = (
    "file_search_call.results web_search_call.results web_search_call.action.sources message.input_image.image_url "
    "computer_call_output.output.image_url code_interpreter_call.outputs reasoning.encrypted_content"
).split()
"""What may be included of items that no answer has here."""


def check_include(names: Iterable[str]) -> None:
    """Raises HTTPError: (unsupported_parameter)."""
    if not {LOGPROBS, *_OF_OTHERS}.issuperset(names):
        raise unsupported("include")


class ConversationName(msgspec.Struct, kw_only=True):
    id: Name


class ResponsesRequest(GenerationRequest, kw_only=True):
    """POST /v1/responses"""

    HARMLESS: ClassVar[Harmless] = {
        "background": (False,),
        "max_tool_calls": (),
        "prompt": (),
    }

    input: str | Annotated[list[Item], Meta(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationName | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    tools: Annotated[list[Item], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Item | None = None
    text: Item | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: Annotated[list[Name], Meta(max_length=MAX_INCLUDED)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    metadata: Metadata | None = None
    user: Name | None = None

    def check(self) -> None:
        _check_origin(self)
        if self.n not in (None, 1) or self.response_format is not None:
            param = "n" if self.response_format is None else "response_format"
            why = "a response has one answer" if param == "n" else "text.format says it here"
            raise HTTPError("invalid_parameter", f"{param} cannot be used", why=why, param=param)
        self.response_format = format_from(self.text)
        GenerationRequest.check(self)
        check_include(self.include or ())
        if self.top_logprobs and self.logprobs is None:
            raise invalid("top_logprobs", f"it needs {LOGPROBS} in include")

    @property
    def logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each; None if nothing is."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


class InputTokensRequest(ModelRequest, kw_only=True):
    """POST /v1/responses/input_tokens"""

    input: str | Annotated[list[Item], Meta(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationName | None = None
    tools: Annotated[list[Item], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Item | None = None
    text: Item | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def check(self) -> None:
        _check_origin(self)


Asked = ResponsesRequest | InputTokensRequest


def conversation_of(request: Asked) -> str | None:
    """Its id."""
    return request.conversation.id if isinstance(request.conversation, ConversationName) else request.conversation


def _check_origin(request: Asked) -> None:
    if request.conversation is not None and request.previous_response_id is not None:
        raise HTTPError(
            "invalid_parameter",
            "conversation cannot be used together with previous_response_id",
            why="a response goes on from one of them",
            fix="leave out the other",
            param="conversation",
        )


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int
