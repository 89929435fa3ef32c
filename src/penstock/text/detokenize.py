"""Tokens to text, one at a time, with nothing shown that a later token could change.

Every decoder that language models use adds a fixed run of bytes for each token; a text is those bytes in order, read
as UTF-8, perhaps without its first space. So a streamed text equals the text of the whole by construction, and a token
costs the same at any length. Damaged UTF-8 becomes U+FFFD as in Python's ``bytes.decode(errors="replace")``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from penstock.base import ModelFormatError


def _gpt2_bytes() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level BPE (Radford et al. 2019, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_CONTEXT = 8
"""Tokens that can hold the start of an unfinished character, which is at most 4 bytes long."""

_BYTE_OF = _gpt2_bytes()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(token: str) -> str | bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token: it stands for itself
        return token


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _replacing(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


@dataclass(slots=True)
class _Decoder:
    """What a ``decoder`` of tokenizer.json does.

    Attributes:
        steps: applied to each token in order until one makes bytes of it.
        leading: (character, how many) stripped from the front of the text.
        dropped: character the first token of a text loses.
    """

    steps: list[Callable[[str], str | bytes]]
    leading: tuple[str, int] = ("", 0)
    dropped: str = ""


def _read_decoder(spec: Mapping[str, Any] | None) -> _Decoder:
    if spec is None:  # tokenizers joins the tokens with spaces
        return _Decoder([lambda token: " " + token], leading=(" ", 1))
    decoder, fused = _Decoder([]), False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match part:
            case {"type": "ByteLevel"}:
                decoder.steps.append(_byte_level)
            case {"type": "ByteFallback"}:
                decoder.steps.append(_byte_fallback)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                decoder.steps.append(_replacing(old, new))
            case {"type": "Metaspace", "replacement": str(mark)} if not fused:
                decoder.steps.append(_replacing(mark, " "))
                decoder.dropped = mark if part.get("prepend_scheme", "always") != "never" else ""
            case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused:
                decoder.leading = (char, start)
            case _:
                raise ModelFormatError(
                    "unsupported_decoder",
                    f"tokenizer.json has a decoder that cannot be streamed: {part.get('type')}",
                    fix="use a tokenizer with a ByteLevel, Metaspace or ByteFallback decoder",
                )
    return decoder


class TokenBytes:
    """The bytes each token adds to a text, learnt from a tokenizer's decoder.

    Attributes:
        special: ids of special tokens, which a text usually leaves out.
        leading: (character, how many) stripped from the front of a text.

    Raises:
        ModelFormatError: (unsupported_decoder) what a token adds depends on its neighbours.
    """

    def __init__(self, backend: Backend) -> None:
        spec = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._decoder = _read_decoder(spec)
        self._token: Callable[[int], str | None] = backend.id_to_token
        self._cache: dict[int, bytes] = {}
        self.leading = self._decoder.leading
        self.special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that has no token."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._bytes(self._token(token_id) or "")
        return known

    def first(self, token_id: int) -> bytes:
        """As the first token of a text."""
        if not self._decoder.dropped:
            return self[token_id]
        return self._bytes((self._token(token_id) or "").replace(self._decoder.dropped, ""))

    def _bytes(self, token: str) -> bytes:
        for step in self._decoder.steps:
            result = step(token)
            if isinstance(result, bytes):
                return result
            token = result
        return token.encode()


class Detokenizer:
    """The text of a growing sequence of tokens.

    Args:
        skip_special_tokens: leave special tokens out.
        after: tokens before these, whose text is not wanted: the first token then continues a text rather than begins
            one, and may complete a character that they left unfinished.

    >>> detokenizer = tokenizer.detokenizer()  # doctest: +SKIP
    >>> "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == tokenizer.decode(ids)  # doctest: +SKIP
    True
    """

    def __init__(self, table: TokenBytes, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> None:
        self._table = table
        self._skipped = table.special if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip, self._strip_left = table.leading
        context = [i for i in after[-_CONTEXT:] if i not in self._skipped]
        self._started = bool(context) or any(i not in self._skipped for i in after[:-_CONTEXT])
        if self._started:
            self._strip_left = 0
            self._utf8.decode(b"".join(map(table.__getitem__, context)))

    def feed(self, token_id: int) -> str:
        """The text that is certain now and was not before; a character still incomplete waits."""
        if token_id in self._skipped:
            return ""
        data = self._table[token_id] if self._started else self._table.first(token_id)
        self._started = True
        return self._without_leading(self._utf8.decode(data))

    def flush(self) -> str:
        """The end of the text: what is left of an incomplete character."""
        return self._without_leading(self._utf8.decode(b"", final=True))

    def _without_leading(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text
