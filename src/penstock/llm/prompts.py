"""What a model is asked, as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence, Sized
from operator import index as as_int
from typing import Any, NotRequired, TypedDict

from penstock.assemble import Assembled, Face
from penstock.base import ContextOverflow, InvalidRequest
from penstock.text import ChatTemplate
from penstock.text.parsers.described import described

PACKED = 4096
"""Ids of so many tokens are packed where others would wait for them."""

Message = Mapping[str, Any]
"""{"role": ..., "content": ...} and whatever else the model's chat template reads."""


class TokensPrompt(TypedDict):
    """A prompt as token ids; ``prompt`` is its text, only to be shown again. Many ids are an ``array``: a list of a
    million holds up the interpreter for as long as it takes to make, to look through and to free."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str | None]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


Prompt = str | TextPrompt | TokensPrompt | Sequence[int]


class Prompts:
    """Checks and tokenizes what the requests of one model ask.

    Args:
        longest: tokens of its context.
    """

    def __init__(self, face: Face | Assembled, longest: int) -> None:
        self.face = face
        self._longest, self._max_chars = longest, max(1 << 20, 64 * longest)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True, parse_special: bool = True) -> TokensPrompt:
        """Raises InvalidRequest: invalid_prompt, and what ``Tokenizer.encode`` raises. ContextOverflow:
        (prompt_too_long) it need not even be tokenized.
        """
        text, ids = _parts(prompt)
        if ids is None and len(text or "") > self._max_chars:
            raise ContextOverflow(
                "prompt_too_long",
                f"The prompt is too long: {len(text or '')} characters",
                why=f"this model's maximum context length is {self._longest} tokens, and at most {self._max_chars} "
                "characters are tried",
                fix="shorten it",
                most=self._longest,
            )
        if ids is None:
            ids = self.face.tokenizer.encode(
                text or "", add_special_tokens=add_special_tokens, parse_special=parse_special
            )
        return TokensPrompt(prompt_token_ids=ids, prompt=text)

    def chat(self, messages: Sequence[Message], template: ChatTemplate | None = None, **options: Any) -> TokensPrompt:
        """To a template that has no place for tools they are told in a system message.

        Raises:
            InvalidRequest: no_chat_template, and what ``ChatTemplate.apply`` raises.
        """
        template = template or self.face.chat
        if template is None:
            raise InvalidRequest(
                "no_chat_template",
                f"The model {self.face.name} has no chat template",
                fix="send a plain prompt, or start with chat_template=FILE",
            )
        if not template.reads_tools and (calls := self.face.formats.calls) is not None:
            messages = described(messages, options.pop("tools", None) or (), calls.shape)
        chat = template.apply(self.face.tokenizer, messages, **options)
        return TokensPrompt(prompt_token_ids=chat.token_ids, prompt=chat.text)


def packed(ids: Sequence[int]) -> Sequence[int]:
    """Many ids as an array; what is no list of ids stays what it is, to be refused where that is said."""
    if len(ids) < PACKED or isinstance(ids, array):
        return ids
    try:
        return array("I", ids)
    except (TypeError, OverflowError, ValueError):
        return ids


def _parts(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """(text, token ids) of a prompt; one of them may be None."""
    text: Any = prompt if isinstance(prompt, str) else None
    ids: Any = None if isinstance(prompt, str) else prompt
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    try:
        if isinstance(text, str | None) and not isinstance(ids, bytes) and (text, ids) != (None, None):
            if isinstance(prompt, Mapping):
                _refuse_other_keys(prompt)
            return text, ids if ids is None or isinstance(ids, array) else [as_int(i) for i in ids]
    except TypeError:
        pass
    raise not_a_prompt(prompt)


def _refuse_other_keys(prompt: Mapping[str, Any]) -> None:
    """Raises InvalidRequest: unsupported_parameter, rather than answering as if a key had not been given."""
    for key, value in prompt.items():
        nothing = value is None or value is False or (isinstance(value, Sized) and not len(value))
        if key not in ("prompt", "prompt_token_ids") and not nothing:
            raise InvalidRequest(
                "unsupported_parameter",
                f"A prompt with {key} is not in this build yet",
                fix="leave it out; prompt and prompt_token_ids are what is read",
            )


def not_a_prompt(prompt: object) -> InvalidRequest:
    return InvalidRequest(
        "invalid_prompt",
        f"A prompt cannot be a {type(prompt).__name__} like {repr(prompt)[:60]}",
        fix='pass text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}',
    )
