"""Writes SentencePiece models and trains small ones, for tests."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence
from functools import cache

import sentencepiece

BITS = [
    "the", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "日本語", "本", "한국어", "ｶﾞ", "🙂", "👩‍🚀", "é", "e\u0301",
    "ﬁ", "Ⅷ", "½", "naïve", "▁", "▁▁", "<s>", "</s>", "<0x0A>", "<0x41>", "<unk>", "Привет", "\u00a0", "\u3000",
    "\u200b", "▁x", "x", "ing", " and", "A", "!!", "...", "1234", "⁇", "[USER]", "<tag>", "[CTL]",
    "def f(x):\n    return 1",
]  # fmt: skip
"""What tokenizers trip over."""


def tricky_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(BITS) for _ in range(rng.randint(0, most)))


@cache
def _sentences() -> list[str]:
    rng = random.Random(1)
    story = "Once upon a time there was a little engine that wrote stories."
    return [tricky_text(rng, 20).replace("\n", " ") or "x" for _ in range(300)] + [story] * 20


@cache
def trained(kind: str, fallback: bool, prefix: bool, tidy: bool, rule: str, user: bool) -> bytes:
    """A model that SentencePiece's own trainer made."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=out,
        model_type=kind,
        vocab_size=420 if fallback else 170,
        byte_fallback=fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=tidy,
        normalization_rule_name=rule,
        user_defined_symbols=["[USER]", "<tag>", "ing"] if user else [],
        control_symbols=["[CTL]"],
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value & (1 << 64) - 1)


def model(pieces: Sequence[tuple[str, float, int]], *, trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    """A ModelProto of (text, score, kind)."""
    out = b""
    for text, score, kind in pieces:
        piece = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind)
        out += message(1, piece)
    return out + message(2, number(3, 2) + trainer) + message(3, normalizer)
