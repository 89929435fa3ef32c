"""Filling in the middle: how models are shown what comes before a gap and what after it.

Bavarian et al. (2022), "Efficient Training of Language Models to Fill in the Middle"; the tokens are those of each
model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.text.tokenizer import Tokenizer

_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
_SUFFIX_FIRST = (("[PREFIX]", "[SUFFIX]", ""),)  # Codestral


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens around a gap; without ``middle`` what comes after it is shown first."""

    prefix: int
    suffix: int
    middle: int | None

    def around(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """A prompt whose completion fills the gap."""
        if self.middle is None:
            return [self.suffix, *after, self.prefix, *before]
        return [self.prefix, *before, self.suffix, *after, self.middle]


def gap_tokens(tokenizer: Tokenizer) -> Gap | None:
    """None if the model knows of no gaps."""
    known = tokenizer.added_tokens
    for prefix, suffix, middle in (*_MARKS, *_SUFFIX_FIRST):
        if {prefix, suffix, middle} - {""} <= set(known):
            return Gap(known[prefix], known[suffix], known[middle] if middle else None)
    return None
