"""A vocabulary as llguidance reads it: the bytes that each token adds to a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import llguidance

NO_TEXT = b"\xff"
"""llguidance's mark of tokens that are not text: a grammar may name them, and no text contains them."""

BYTE_END = 256
"""End of sequence in the vocabulary of single bytes."""

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,  # building the lexer: about 20 ms
    step_lexer_fuel=200_000,  # a step: about 15 ms
    step_max_items=50_000,
    max_items_in_row=20_000,  # an object with 5000 properties
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What one grammar may take of time and memory; all else is an error of that grammar."""


MAX_FORCED = 512
"""Bytes of a text that must come which llguidance is told the tokens of at once. It asks anew with each token."""


class TokenTable:
    """The tokens of a model, or single bytes.

    Args:
        token_bytes: what each id adds to a text, in order; empty for an id without a token.
        special: ids that are not text.
        end_ids: ids that end a sequence.
    """

    def __init__(self, token_bytes: Sequence[bytes], special: Collection[int], end_ids: Collection[int]) -> None:
        self.token_bytes = tuple(token_bytes)
        self.special = frozenset(special) | {i for i, text in enumerate(self.token_bytes) if not text}
        self.end_ids = tuple(sorted(end_ids))

    @classmethod
    def bytes_only(cls) -> TokenTable:
        return cls([*(bytes([i]) for i in range(256)), b"<end>"], [BYTE_END], [BYTE_END])

    def __len__(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def backend(self) -> llguidance.LLTokenizer:
        """Made at first use; for a large vocabulary that takes some tenths of a second."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Wrapped(self)))

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        """The lowest id of each text."""
        last_first = reversed([(text, i) for i, text in enumerate(self.token_bytes) if i not in self.special])
        return dict(last_first)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of), default=0)

    def split(self, text: bytes) -> list[int]:
        """Tokens of a text, the longest first; what no token covers is left out."""
        tokens = []
        at = 0
        while at < len(text):
            for size in range(min(self._longest, len(text) - at), 0, -1):
                if (token := self._id_of.get(text[at : at + size])) is not None:
                    tokens.append(token)
                    at += size
                    break
            else:
                at += 1
        return tokens


class _Wrapped:
    """The attributes that llguidance asks a tokenizer for."""

    bos_token_id = None

    def __init__(self, table: TokenTable) -> None:
        self._split = table.split
        self.special_token_ids = sorted(table.special)
        self.eos_token_id = table.end_ids[0] if table.end_ids else min(self.special_token_ids, default=0)
        self.tokens = [
            NO_TEXT + (text or b"<%d>" % i) if i in table.special else text for i, text in enumerate(table.token_bytes)
        ]

    def __call__(self, text: bytes) -> list[int]:
        return self._split(text[:MAX_FORCED])
