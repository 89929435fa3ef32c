"""SentencePiece's compiled normalization rules (google/sentencepiece, normalizer.cc; s-yata/darts-clone, darts.h).

A double-array trie over the UTF-8 of what is replaced, then what replaces it, each ended by a zero byte.
"""

from __future__ import annotations

import struct

MAX_REPLACEMENT_BYTES = 256
"""The longest of NFKC has 33. Without a bound a small file could make any text grow without one."""

_WINDOW = 16
"""Characters looked at from one place; no rule of Unicode replaces that many."""
_MEMO = 1 << 16


class Charsmap:
    """Replaces, from left to right, the longest run of characters that has a rule.

    Args:
        data: ``precompiled_charsmap`` of a model.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError(f"its charsmap of {len(data)} bytes says that {size} are a trie")
        self._units = struct.unpack(f"<{size // 4}I", data[4 : 4 + size])
        self._texts = data[4 + size :]
        longest = max(map(len, self._texts.split(b"\0")))
        if (self._texts and self._texts[-1]) or longest > MAX_REPLACEMENT_BYTES:
            raise ValueError(f"its charsmap has a replacement of {longest} bytes")
        self._memo: dict[str, tuple[str, int]] = {}

    def apply(self, text: str) -> str:
        """The text with every rule applied once. Linear in its length."""
        parts, at, memo = [], 0, self._memo
        while at < len(text):
            # How a character is replaced depends on it and nearly always on no more than the next one.
            step = memo.get(text[at : at + 2]) or self._step(text[at : at + _WINDOW])
            parts.append(step[0])
            at += step[1]
        return "".join(parts)

    def _step(self, window: str) -> tuple[str, int]:
        """What is written for the beginning of ``window``, and how many characters that stands for."""
        data = window.encode("utf-8", "surrogatepass")
        length, place, seen = self._longest(data)
        step = window[0], 1
        if length:
            new = self._texts[place : self._texts.find(b"\0", place)] if place < len(self._texts) else b""
            step = new.decode(errors="replace"), max(len(data[:length].decode(errors="ignore")), 1)
        if seen < len(window[:2].encode("utf-8", "surrogatepass")):
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            self._memo[window[:2]] = step
        return step

    def _longest(self, data: bytes) -> tuple[int, int, int]:
        """The longest rule that ``data`` begins with: (its length, place of its text, bytes that led to a node)."""
        units, length, place, seen = self._units, 0, 0, 0
        node = _offset(units[0])
        for i, byte in enumerate(data):
            node ^= byte
            if node >= len(units) or units[node] & 0x8000_00FF != byte:
                break
            unit, seen = units[node], i + 1
            node ^= _offset(unit)
            if unit >> 8 & 1 and node < len(units):
                length, place = i + 1, units[node] & 0x7FFF_FFFF
        return length, place, seen


def _offset(unit: int) -> int:
    """Where the children of a node are, relative to it."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)
