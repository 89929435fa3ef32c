"""Tokens to text, one at a time, with nothing shown that a later token could change.

Every decoder that language models use adds a fixed run of bytes for each token, perhaps another one for the first token
of a text; a text is those bytes in order, read as UTF-8, perhaps without a blank at either end. So a streamed text
equals the text of the whole by construction, and a token costs the same at any length. Damaged UTF-8 becomes U+FFFD as
in Python's ``bytes.decode(errors="replace")``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from penstock.base import ModelFormatError


def _gpt2_bytes() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level BPE (Radford et al. 2019, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_CONTEXT = 8
"""Tokens that can hold the start of an unfinished character, which is at most 4 bytes long."""

BYTE_OF = _gpt2_bytes()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_Step = Callable[[str, bool], str | bytes]
"""What a decoder makes of a token; the flag says that it is the first of a text."""


def _byte_level(token: str, first: bool) -> str | bytes:
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:  # an added token: it stands for itself
        return token


def _byte_fallback(token: str, first: bool) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _replacing(old: str, new: str) -> _Step:
    return lambda token, first: token.replace(old, new)


def _stripping(char: str, start: int, stop: int) -> _Step:
    def step(token: str, first: bool) -> str:
        token = token[min(len(token) - len(token.lstrip(char)), start) :]
        return token[: len(token) - min(len(token) - len(token.rstrip(char)), stop)]

    return step


def _metaspace(mark: str, prefixed: bool) -> _Step:
    return lambda token, first: token.replace(mark, "" if first and prefixed else " ")


def _wordpiece(prefix: str, cleanup: bool) -> _Step:
    tidy = decoders.WordPiece(prefix, True) if cleanup else None

    def step(token: str, first: bool) -> str:
        if not first:
            token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        return token if tidy is None else str(tidy.decode([token]))

    return step


@dataclass(slots=True)
class _Decoder:
    """What a ``decoder`` of tokenizer.json does.

    Attributes:
        steps: applied to each token in order until one makes bytes of it.
        leading, trailing: (character, how many at most) stripped from the front and the end of the text.
    """

    steps: list[_Step]
    leading: tuple[str, int] = ("", 0)
    trailing: tuple[str, int] = ("", 0)


def _read_decoder(spec: Mapping[str, Any] | None) -> _Decoder:
    if spec is None:  # tokenizers joins the tokens with spaces
        return _Decoder([lambda token, first: token if first else f" {token}"])
    decoder, fused = _Decoder([]), False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match part:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(char), "start": int(start), "stop": int(stop)} if fused:
                decoder.leading, decoder.trailing = (char, start), (char, stop)
            case {"type": "BPEDecoder", "suffix": str(suffix)} if not fused:
                decoder.steps.append(_replacing(suffix, " "))
                decoder.trailing = (" ", 1)
            case _ if not fused and (step := _read_step(part)):
                decoder.steps.append(step)
            case _:
                raise ModelFormatError(
                    "unsupported_decoder",
                    f"tokenizer.json has a decoder that cannot be streamed: {part.get('type')}",
                    why="what a token adds to a text would depend on the tokens beside it",
                    fix="use a tokenizer with a ByteLevel, Metaspace, ByteFallback or WordPiece decoder",
                )
    return decoder


def _read_step(part: Mapping[str, Any]) -> _Step | None:
    match part:
        case {"type": "ByteLevel"}:
            return _byte_level
        case {"type": "ByteFallback"}:
            return _byte_fallback
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return _replacing(old, new)
        case {"type": "Metaspace", "replacement": str(mark)}:
            return _metaspace(mark, part.get("prepend_scheme", "always") != "never")
        case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
            return _wordpiece(prefix, cleanup)
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": int(stop)}:
            return _stripping(char, start, stop)
    return None


class TokenBytes:
    """The bytes each token adds to a text, learnt from a tokenizer's decoder.

    Attributes:
        special: ids of special tokens, which a text usually leaves out.
        leading, trailing: (character, how many at most) stripped from the front and the end of a text.

    Raises:
        ModelFormatError: (unsupported_decoder) what a token adds depends on its neighbours.
    """

    def __init__(self, backend: Backend) -> None:
        spec = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._decoder = _read_decoder(spec)
        self._token: Callable[[int], str | None] = backend.id_to_token
        added = backend.get_added_tokens_decoder()
        # An added token is written as it is read, also where its letters could stand for bytes, as "ü" could.
        literal = added if _byte_level in self._decoder.steps else {}
        self._literal = {i: token.content.encode() for i, token in literal.items()}
        self._cache: dict[int, bytes] = {}
        self.leading, self.trailing = self._decoder.leading, self._decoder.trailing
        self.special = frozenset(i for i, token in added.items() if token.special)

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that has no token."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._bytes(token_id, False)
        return known

    def first(self, token_id: int) -> bytes:
        """As the first token of a text."""
        return self._bytes(token_id, True)

    def _bytes(self, token_id: int, first: bool) -> bytes:
        if (literal := self._literal.get(token_id)) is not None:
            return literal
        if (token := self._token(token_id)) is None:
            return b""
        for step in self._decoder.steps:
            result = step(token, first)
            if isinstance(result, bytes):
                return result
            token = result
        return token.encode()


class Detokenizer:
    """The text of a growing sequence of tokens.

    Args:
        skip_special_tokens: leave special tokens out, but for those in ``shown``.
        after: tokens before these, whose text is not wanted: the first token then continues a text rather than begins
            one, and may complete a character that they left unfinished.

    >>> detokenizer = tokenizer.detokenizer()  # doctest: +SKIP
    >>> "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == tokenizer.decode(ids)  # doctest: +SKIP
    True
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
        shown: Sequence[int] = (),
    ) -> None:
        self._table = table
        self._skipped = table.special.difference(shown) if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip, self._strip_left = table.leading
        self._tail, self._tail_limit = table.trailing
        self._held = 0
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
        return self._without_trailing(self._without_leading(self._utf8.decode(data)))

    def flush(self) -> str:
        """The end of the text: what is left of an incomplete character."""
        text = self._without_trailing(self._without_leading(self._utf8.decode(b"", final=True)))
        self._held = 0
        return text

    def _without_leading(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            text, self._strip_left = text[1:], self._strip_left - 1
        return text

    def _without_trailing(self, text: str) -> str:
        """Holds back what would be stripped if the text ended here."""
        if not self._tail_limit or not text:
            return text
        text = self._tail * self._held + text
        self._held = min(len(text) - len(text.rstrip(self._tail)), self._tail_limit)
        return text[: len(text) - self._held]
