"""Log-probabilities in OpenAI's two shapes.

Each token's are encoded as they come: all of a long answer in one go would hold up the interpreter, and so would it to
free hundreds of thousands of objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from penstock.serving.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from penstock.spec import Logprob
from penstock.text import Delta, Tokenizer

_encode = msgspec.json.Encoder().encode
LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's API reference)."""


def completion_logprobs(delta: Delta, tokenizer: Tokenizer, offset: int) -> CompletionLogprobs:
    """Of the new tokens, with the drawn one among the likeliest. ``offset``: characters before them."""
    result = CompletionLogprobs([], [], [], [])
    for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
        _add(result, token, entry, tokenizer, offset)
        offset += len(result.tokens[-1])
    return result


def prompt_logprobs(
    tokens: Sequence[int], entries: Sequence[Mapping[int, Logprob]], text: str, tokenizer: Tokenizer
) -> CompletionLogprobs:
    """Of a prompt that is shown as ``text``: its first token has none, ``entries`` are those of the others."""
    result, offset = CompletionLogprobs([], [], [], []), 0
    special = set(tokenizer.special_tokens.values())
    for token, entry in zip(tokens, [None, *entries], strict=True):
        _add(result, token, entry, tokenizer, min(offset, len(text)))
        offset += 0 if token in special else len(result.tokens[-1])
    return result


def _add(
    result: CompletionLogprobs, token: int, entry: Mapping[int, Logprob] | None, tokenizer: Tokenizer, offset: int
) -> None:
    result.text_offset.append(offset)
    result.tokens.append(_name(token, tokenizer))
    result.token_logprobs.append(None if entry is None else _finite(entry[token]))
    likeliest = None if entry is None else {_name(other, tokenizer): _finite(v) for other, v in entry.items()}
    result.top_logprobs.append(cast("dict[str, float] | None", likeliest and msgspec.Raw(_encode(likeliest))))


def chat_logprobs(delta: Delta, tokenizer: Tokenizer, top: int) -> ChatLogprobs:
    """Of the new tokens, each with the ``top`` likeliest, likeliest first."""
    content: list[TokenLogprob] = []
    for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
        likeliest = [other for other, value in entry.items() if value.rank is not None and value.rank <= top]
        likeliest.sort(key=lambda other: (entry[other].rank, other))
        told = TokenLogprob(
            tokenizer.token_text(token),
            _finite(entry[token]),
            list(tokenizer.token_bytes(token)),
            [
                TopLogprob(tokenizer.token_text(other), _finite(entry[other]), list(tokenizer.token_bytes(other)))
                for other in likeliest[:top]
            ],
        )
        content.append(cast("TokenLogprob", msgspec.Raw(_encode(told))))
    return ChatLogprobs(content)


def _finite(value: Logprob) -> float:
    return max(value.logprob, LEAST)


def _name(token: int, tokenizer: Tokenizer) -> str:
    """A token's text, or its bytes where they are only part of a character, so that names differ as tokens do."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
