"""Grammar: what a completion may be, compiled for one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from penstock.grammar.completion import Lexer, Meter, bits, completions
from penstock.grammar.instances import written
from penstock.grammar.tokens import LIMITS, TokenTable
from penstock.grammar.validation import InstanceCheck

BYTES = TokenTable.bytes_only()
STEPS_FIRST, STEPS = 6_000, 1_000
"""What is spent to find a valid completion of the empty text, and of one that has begun: about 100 and 10 ms."""

STEPS_MORE = 200
"""What is spent to find a shorter one than the rest of one that is known."""

SHORT, ENOUGH = 64, 4
"""Bytes of a completion that is taken at once; else the shortest of so many is."""

PEEK = 16
"""Bytes of a known completion's rest that are tried before all of it."""

BYTES_SET, ASCII_SET = (1 << 256) - 1, (1 << 128) - 1


class Grammar:
    """A compiled grammar; every request that asks for the same shares it.

    Attributes:
        tokens, bytes: matchers at the start, over the model's tokens and over single bytes; copy before use. ``bytes``
            is None for a grammar that names tokens which are not text: then no completion can be searched for.
        check: what a completion must pass beside the grammar, None where the grammar says all.
        closing: a completion of the empty text, None if none was found.

    Args:
        hints: JSON values that a valid completion may hold.
        names: those of properties, in the order of the schema.
        steps: what the search for ``closing`` may cost.

    Raises:
        ValueError: it cannot be compiled within LIMITS, or nothing satisfies it.
    """

    def __init__(
        self,
        source: str,
        table: TokenTable,
        check: InstanceCheck | None = None,
        *,
        is_json: bool = False,
        hints: Sequence[bytes] = (),
        names: Sequence[str] = (),
        steps: int = STEPS_FIRST,
    ) -> None:
        self.table, self.check, self.is_json, self._hints, self._names = table, check, is_json, hints, names
        self.tokens = LLMatcher(table.backend, source, log_level=0, limits=LIMITS)
        if self.tokens.is_error():
            raise ValueError(self.tokens.get_error())
        if not any(self.tokens.compute_bitmask()) or (self.tokens.is_stopped() and not self.tokens.is_accepting()):
            raise ValueError("nothing satisfies it")
        over_bytes = LLMatcher(BYTES.backend, source, log_level=0, limits=LIMITS)
        self.bytes = None if over_bytes.is_error() else over_bytes
        self.closing = None
        if self.bytes is not None:
            meter = Meter(steps)
            self.closing = self._search(self.bytes, b"", (False, False), meter)
            if self.closing is None:
                forced = self.bytes.deep_copy()
                forced.consume_tokens(list(forced.compute_ff_bytes()))
                if error := meter.error or forced.get_error():
                    raise ValueError(error)

    def completion(self, matcher: LLMatcher, text: bytes, lexer: Lexer) -> bytes | None:
        """A completion of ``text``, at whose end the byte matcher stands."""
        return self._search(matcher, text, lexer, Meter(STEPS))

    def _search(self, matcher: LLMatcher, text: bytes, lexer: Lexer, meter: Meter) -> bytes | None:
        found: list[bytes] = []
        if (rest := self._rest_of_closing(matcher, text)) is not None:
            found.append(rest)
            meter.left = min(meter.left, STEPS_MORE)
        for rest in completions(matcher, lexer, meter, is_json=self.is_json, hints=self._hints):
            if self.check is None or self.check.accepts(text + rest):
                found.append(rest)
                if len(rest) <= SHORT or len(found) == ENOUGH:
                    break
        return min(found, key=len, default=None)

    def _rest_of_closing(self, matcher: LLMatcher, text: bytes) -> bytes | None:
        """The shortest part of the known completion of the empty text that completes this one.

        What a text may be ended with is mostly what was needed from the start: a string that must hold a pattern is
        hard to find from inside of it, and stands in ``closing``.
        """
        matcher, begun = matcher.deep_copy(), b""
        while (possible := bits(matcher) & BYTES_SET) and not possible & ASCII_SET and len(begun) < 3:
            # the rest of a character
            begun += bytes([(possible & -possible).bit_length() - 1])
            matcher.consume_tokens(list(begun[-1:]))
        closing = self.closing or b""
        for start in range(len(closing) - 1, 0, -1):
            inside_a_word = closing[start - 1 : start + 1].isalnum()
            if inside_a_word or not possible >> closing[start] & 1:
                continue
            peek, rest = list(closing[start : start + PEEK]), list(closing[start:])
            if matcher.validate_tokens(peek) == len(peek) and matcher.validate_tokens(rest) == len(rest):
                ended = matcher.deep_copy()
                ended.consume_tokens(rest)
                if ended.is_accepting() and (self.check is None or self.check.accepts(text + begun + bytes(rest))):
                    return begun + bytes(rest)
        return None

    def accepts(self, value: Any) -> bool:
        """Whether a JSON value is what was asked for, in some order of its objects' names."""
        if self.bytes is None or (self.check and not self.check.accepts(json.dumps(value).encode())):
            return False
        return any(matcher.is_accepting() for matcher in written(self.bytes, value, self._names))
