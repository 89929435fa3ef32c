"""How a reasoning model's thoughts begin and end, in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock.base import InvalidRequest
from penstock.spec import SamplingParams
from penstock.text.tokenizer import Tokenizer

TAGS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, GLM-4.5, MiniMax and many others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
"""Pairs that models are known to use; the first one of whose parts the tokenizer has tokens of their own."""

Tag = str | Sequence[int] | None


def thinking_tags(params: SamplingParams, tokenizer: Tokenizer) -> tuple[Tag, Tag]:
    """How thoughts begin and end: as the parameters name it, else the model's own tags; None where it is not known."""
    own = next((pair for pair in TAGS if _known(pair, tokenizer)), (None, None))
    return params.thinking_start or own[0], params.thinking_end or own[1]


def with_thinking_ids(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same parameters, with ``thinking_ids`` made of their strings, or of the model's own tags.

    Raises:
        InvalidRequest: (no_thinking_tags) the parameters name none and the tokenizer has none that are known.
    """
    if params.thinking_budget is None or params.thinking_ids:
        return params
    start, end = thinking_tags(params, tokenizer)
    if start is None or end is None:
        raise InvalidRequest(
            "no_thinking_tags",
            "A thinking budget needs to know how thoughts begin and end",
            why="the tokenizer has none of the usual tags",
            fix='name them, as thinking_start = "<think>" and thinking_end = "</think>", or leave thinking_budget out',
        )
    start_ids, end_ids, close_ids = (_ids(tag, tokenizer) for tag in (start, end, params.thinking_close))
    return replace(params, thinking_ids=(start_ids, end_ids, close_ids + end_ids))


def _known(pair: tuple[str, str], tokenizer: Tokenizer) -> bool:
    """The tags are made of added tokens, but for words between them."""
    added = tokenizer.added_tokens
    return all(tag in added or (tag.startswith("<|channel|>") and "<|channel|>" in added) for tag in pair)


def _ids(tag: str | Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    if not isinstance(tag, str):
        return tuple(tag)
    return tuple(tokenizer.encode(tag, add_special_tokens=False)) if tag else ()
