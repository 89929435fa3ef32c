"""Mistral's tekken.json: tiktoken ranks with the pattern that splits a text and the special tokens beside them
(mistralai/mistral-common, tokens/tokenizers/tekken.py).

Special tokens have the first ids, and a rank is counted from where they end. The file may list more of either than the
model has.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError
from penstock.formats.jsonfile import read_json_object
from penstock.formats.tiktoken import MAX_RANKS, checked_ranks

FORMER = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The special tokens of files that list none: those up to version 7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tekken:
    """Attributes:
    pattern: regular expression whose matches are encoded one by one.
    ranks: token -> rank, from 0 without a gap; the id is ``len(special)`` more.
    special: the text of each id below that.
    """

    pattern: str
    ranks: Mapping[bytes, int]
    special: tuple[str, ...]


def read_tekken(path: Path) -> Tekken:
    """Reads a tekken.json.

    Raises:
        ModelFormatError: file_missing, json_invalid; (tokenizer_invalid) it is no such file.
    """
    content = read_json_object(path)
    try:
        return parse_tekken(content)
    except ValueError as error:
        raise ModelFormatError(
            "tokenizer_invalid",
            f"{path} is not a usable tekken.json",
            why=str(error)[:300],
            fix="download the file again",
        ) from None


def parse_tekken(content: Mapping[str, Any]) -> Tekken:
    """Raises: ValueError: it is no such file."""
    config, vocab = content.get("config"), content.get("vocab")
    if not isinstance(config, Mapping) or not isinstance(vocab, list):
        raise ValueError("it has no config, or no vocab")
    pattern, size, reserved = (
        config.get(name) for name in ("pattern", "default_vocab_size", "default_num_special_tokens")
    )
    if not isinstance(pattern, str) or not pattern:
        raise ValueError("it has no pattern")
    if type(reserved) is not int or type(size) is not int or not 0 <= reserved < size <= MAX_RANKS:
        raise ValueError(f"{str(reserved)[:40]} of {str(size)[:40]} ids are said to be special")
    if size - reserved > len(vocab):
        raise ValueError(f"it has {len(vocab)} tokens for {size - reserved} ids")
    listed = content.get("special_tokens")
    return Tekken(
        pattern=pattern,
        ranks=checked_ranks(_tokens(vocab[: size - reserved])),
        special=_special(_former(reserved) if listed is None else listed, reserved),
    )


def _tokens(entries: list[Any]) -> Iterator[tuple[bytes, int]]:
    for number, entry in enumerate(entries, 1):
        token, rank = (entry.get("token_bytes"), entry.get("rank")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(token, str) or type(rank) is not int:
            raise ValueError(f"token {number} has no token_bytes and rank")
        yield a2b_base64(token, strict_mode=True), rank


def _former(reserved: int) -> list[dict[str, Any]]:
    return [{"rank": i, "token_str": text} for i, text in enumerate(FORMER[:reserved])]


def _special(listed: Any, reserved: int) -> tuple[str, ...]:
    """The texts of ids 0 to ``reserved`` - 1; those that are not listed are numbered."""
    texts = [f"<SPECIAL_{i}>" for i in range(reserved)]
    if not isinstance(listed, list) or len(listed) > reserved:
        raise ValueError(f"its special_tokens are no list of at most {reserved}")
    seen = set[int]()
    for entry in listed:
        rank, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, Mapping) else (None, None)
        if type(rank) is not int or not 0 <= rank < reserved or rank in seen or not isinstance(text, str) or not text:
            raise ValueError(f"a special token is {str(entry)[:80]}")
        seen.add(rank)
        texts[rank] = text
    if len(set(texts)) != reserved:
        raise ValueError("a special token has two ids")
    return tuple(texts)
