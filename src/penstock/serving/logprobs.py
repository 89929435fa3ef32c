"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from penstock.serving.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from penstock.spec import Logprob
from penstock.text import Delta, Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's API reference)."""


def completion_logprobs(delta: Delta, tokenizer: Tokenizer, offset: int) -> CompletionLogprobs:
    """Of the new tokens, with the drawn one among the likeliest. ``offset``: characters before them."""
    result = CompletionLogprobs([], [], [], [])
    for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
        name = _name(token, tokenizer)
        result.text_offset.append(offset)
        result.token_logprobs.append(_finite(entry[token]))
        result.tokens.append(name)
        result.top_logprobs.append({_name(other, tokenizer): _finite(value) for other, value in entry.items()})
        offset += len(name)
    return result


def chat_logprobs(delta: Delta, tokenizer: Tokenizer, top: int) -> ChatLogprobs:
    """Of the new tokens, each with the ``top`` likeliest, likeliest first."""
    content = []
    for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
        likeliest = [other for other, value in entry.items() if value.rank is not None and value.rank <= top]
        likeliest.sort(key=lambda other: (entry[other].rank, other))
        content.append(
            TokenLogprob(
                tokenizer.token_text(token),
                _finite(entry[token]),
                list(tokenizer.token_bytes(token)),
                [
                    TopLogprob(tokenizer.token_text(other), _finite(entry[other]), list(tokenizer.token_bytes(other)))
                    for other in likeliest[:top]
                ],
            )
        )
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
