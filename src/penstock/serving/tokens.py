"""POST /tokenize and /detokenize: what a text or a conversation is in the model's tokens, and back (vLLM's names)."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta
from starlette.responses import Response

from penstock.serving.answers import VALUES, in_pieces, told
from penstock.serving.chat import plain_message
from penstock.serving.context import Context
from penstock.serving.custom_tools import as_functions
from penstock.serving.dialogue import template_variables
from penstock.serving.edge import off_loop
from penstock.serving.errors import HTTPError
from penstock.serving.limits import MAX_MESSAGES
from penstock.serving.schemas import ChatMessage, Harmless, ModelRequest, TokenId, Tools
from penstock.serving.tools import Offer, offer_of


class TokenizeRequest(ModelRequest, kw_only=True):
    """POST /tokenize: a ``prompt`` or ``messages``."""

    HARMLESS: ClassVar[Harmless] = {"chat_template": (), "mm_processor_kwargs": ()}

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise HTTPError("invalid_parameter", "A prompt or messages are needed, and not both", param="prompt")


class DetokenizeRequest(ModelRequest, kw_only=True):
    """POST /detokenize"""

    IDS: ClassVar[tuple[str, ...]] = ("tokens",)

    tokens: list[TokenId]


class Tokens(msgspec.Struct, kw_only=True):
    """``token_strs``: null unless it is asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Prompt(msgspec.Struct):
    prompt: str


async def tokenize(request: TokenizeRequest, context: Context) -> Response:
    """Tokens. Raises HTTPError and InvalidRequest, as a request to complete it would, but not for being too long to
    run.
    """
    engine = context.llm.engine
    if request.prompt is not None:
        special = request.add_special_tokens is not False
        prompt = await context.llm.tokenize(request.prompt, add_special_tokens=special)
    else:
        going_on = bool(request.continue_final_message)
        begun = request.add_generation_prompt
        messages, offer = await asyncio.to_thread(_conversation, request)
        prompt = await context.llm.tokenize_chat(
            messages,
            tools=offer.told,
            add_generation_prompt=not going_on if begun is None else begun,
            continue_final_message=going_on,
            **template_variables(engine.chat, request.chat_template_kwargs, request.reasoning_effort),
        )
    ids = prompt["prompt_token_ids"]

    def made() -> list[bytes]:
        strings = map(engine.tokenizer.token_text, ids) if request.return_token_strs else None
        longest = engine.setup.limits.max_model_len
        return told({"count": len(ids), "max_model_len": longest, "tokens": iter(ids), "token_strs": strings})

    return in_pieces(await off_loop(8 * len(ids), made))


def _conversation(request: TokenizeRequest) -> tuple[list[dict[str, Any]], Offer]:
    messages = [plain_message(message, f"messages[{i}]") for i, message in enumerate(request.messages or ())]
    return messages, offer_of(as_functions(request.tools), request.tool_choice, None)


async def detokenize(request: DetokenizeRequest, context: Context) -> Response:
    """A Prompt, special tokens by name. Raises HTTPError: (token_out_of_range)."""
    tokenizer = context.llm.engine.tokenizer
    size = tokenizer.vocabulary.size

    def made() -> list[bytes]:
        if (wrong := next((i for i in request.tokens if not 0 <= i < size), None)) is not None:
            why = f"the model's ids are 0 to {size - 1}"
            raise HTTPError("token_out_of_range", f"The model has no token {wrong}", why=why, param="tokens")
        detokenizer, ids = tokenizer.detokenizer(skip_special_tokens=False), iter(request.tokens)
        texts = []
        while piece := list(islice(ids, VALUES)):  # of all texts of tokens at once a list would take long to free
            texts.append("".join(map(detokenizer.feed, piece)))
        return told({"prompt": "".join(texts) + detokenizer.flush()})

    return in_pieces(await off_loop(len(request.tokens) * 8, made))
