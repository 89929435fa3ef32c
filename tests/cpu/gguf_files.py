"""Writes GGUF files, for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def gguf(
    metadata: Mapping[str, tuple[int, Any]],
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file with ``metadata`` {key: (type, value)}; an array's value is (type of its items, items).

    Args:
        tensors: (name, dimensions with the fastest first, type, offset).
        data: what follows the header and its padding.
    """
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, item) in metadata.items():
        out += text(key) + struct.pack("<I", kind) + value(kind, item)
    for name, dimensions, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % alignment) + data


def text(item: str | bytes) -> bytes:
    raw = item.encode() if isinstance(item, str) else item
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, item: Any) -> bytes:
    if kind == STRING:
        return text(item)
    if kind == ARRAY:
        inner, items = item
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack(f"<{CODES[kind]}", item)


def vocabulary(model: str, tokens: Sequence[str], kinds: Sequence[int], **more: tuple[int, Any]) -> dict[str, Any]:
    """The metadata of a vocabulary; ``more`` are further keys of tokenizer.ggml."""
    keys = {"model": (STRING, model), "tokens": (ARRAY, (STRING, tokens)), "token_type": (ARRAY, (5, kinds)), **more}
    return {f"tokenizer.ggml.{key}": item for key, item in keys.items()}
