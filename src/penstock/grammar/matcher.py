"""Matcher: where one completion stands in its grammar, and how it can still be brought to an end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.grammar.completion import scan
from penstock.grammar.grammar import Grammar

Mask = npt.NDArray[np.bool_]

LOOK_EVERY = 16
"""Tokens between looks at how a completion far from its limit could end."""
NEAR = 32
"""With less than twice its shortest ending and this many tokens left, every token is looked at."""

MAX_FAILURES = 4
"""Looks in a row that found no ending before no more are taken."""


class Matcher:
    """One completion, token by token.

    It carries an *ending*: a text that would complete what there is. Near the limit, and everywhere if the grammar is
    wider than what was asked for, a token is admitted only if such an ending is known that still fits; and when only
    the known one fits, its tokens are all that is allowed. All of this follows from the grammar, the tokens so far and
    the limit, so a matcher made anew from the same tokens is equal to this one.

    Args:
        room: tokens the completion may have, its end token included.
        end_ids: tokens that end it.
    """

    def __init__(self, grammar: Grammar, room: int, end_ids: tuple[int, ...]) -> None:
        self.grammar, self.room, self.end_ids = grammar, room, end_ids
        self.ended = False
        self._tokens = grammar.tokens.deep_copy()
        self._bytes = grammar.bytes.deep_copy() if grammar.bytes is not None else None
        self._text = b""
        self._lexer = (False, False)
        self._ending = grammar.closing
        self._current = True  # the ending is that of the text so far, not of an earlier one
        self._length = self._cost(self._ending)
        self._looked: dict[int, bytes | None] = {}
        self._failures = 0

    @property
    def may_end(self) -> bool:
        """What there is, is complete."""
        if self.ended:
            return True
        check = self.grammar.check
        return self._tokens.is_accepting() and (check is None or check.accepts(self._text))

    @property
    def least(self) -> int | None:
        """Tokens of the known ending, the end token included; None where none is known."""
        return self._length

    def mask(self, size: int) -> Mask:
        """Which of ``size`` tokens may come next; none if the grammar has come to a dead end."""
        allowed = np.zeros(size, np.bool_)
        if not self.ended:
            packed = np.frombuffer(self._tokens.compute_bitmask(), np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[:size].astype(np.bool_)
            allowed[: len(bits)] = bits
            if self._tokens.is_accepting() or self._tokens.is_stopped():  # elsewhere the grammar names such a token
                allowed[[i for i in self.grammar.table.end_ids if i < size]] = False
        if self.may_end:
            allowed[[i for i in self.end_ids if i < size]] = True
        if self._pressed() and (token := self.next_token()) is not None and allowed[token]:
            allowed[:] = False
            allowed[token] = True
            allowed[list(self.end_ids)] |= not self._ending
        return allowed

    def next_token(self) -> int | None:
        """The next token of the known ending."""
        if not self._current or self._ending is None:
            return None
        if not self._ending:
            return self.end_ids[0] if self.end_ids else None
        return next(iter(self.grammar.table.split(self._ending)), None)

    def admits(self, token: int) -> bool:
        """Whether a token that the mask allows leaves a way to a valid end within the limit."""
        if self.ended or token in self.end_ids or not self.looks:
            return True
        ending = self._look(token)
        if ending is None:
            return self.grammar.check is None and not self._fits(self._length, self.room)
        return self._fits(self._cost(ending), self.room - 1) or not self._fits(self._length, self.room)

    def advance(self, token: int) -> None:
        """Takes in the next token."""
        self.room -= 1
        if self.ended or (token in self.end_ids and self.may_end):
            self.ended = True
            return
        looks = self.looks or (self.room % LOOK_EVERY == 0 and self._failures < MAX_FAILURES)
        ending = self._look(token) if looks else None
        text = self.grammar.table.token_bytes[token]
        self._tokens.consume_token(token)
        if self._bytes is not None:
            self._bytes.consume_tokens(list(text))
        self._text += text
        self._lexer = scan(self._lexer, text)
        self._looked = {}
        self._current = looks
        if looks:
            self._failures = 0 if ending is not None else self._failures + 1
            self._ending = ending
            self._length = self._cost(ending)

    @property
    def looks(self) -> bool:
        """Whether each token's ending matters here."""
        if self._bytes is None or self._failures >= MAX_FAILURES:
            return False
        return self.grammar.check is not None or self.room <= (2 * self._length + NEAR if self._length else 2 * NEAR)

    def _look(self, token: int) -> bytes | None:
        """An ending after one more token."""
        if token not in self._looked:
            self._looked[token] = self._find(self.grammar.table.token_bytes[token])
        return self._looked[token]

    def _find(self, text: bytes) -> bytes | None:
        if self._bytes is None:
            return None
        ending, whole = self._ending, self._text + text
        if self._current and ending is not None and ending.startswith(text):
            return ending[len(text) :]
        after = self._bytes.deep_copy()
        if not after.consume_tokens(list(text)):
            return None
        if ending is not None and self._current and after.validate_tokens(list(ending)) == len(ending):
            ended = after.deep_copy()
            ended.consume_tokens(list(ending))
            if ended.is_accepting() and (self.grammar.check is None or self.grammar.check.accepts(whole + ending)):
                return ending
        return self.grammar.completion(after, whole, scan(self._lexer, text))

    def _pressed(self) -> bool:
        """Only the known ending fits."""
        return self._current and self._length == self.room

    def _cost(self, ending: bytes | None) -> int | None:
        """Tokens of an ending, the end token included."""
        return None if ending is None else len(self.grammar.table.split(ending)) + 1

    @staticmethod
    def _fits(cost: int | None, room: int) -> bool:
        return cost is not None and cost <= room
