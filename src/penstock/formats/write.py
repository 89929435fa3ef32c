"""Writing safetensors: header first, then tensor after tensor, so that one at a time is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from penstock.formats.safetensors import DTYPE_BITS

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor, in the order of the file."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def write_safetensors(path: Path, header: Header, tensors: Iterable[bytes | memoryview]) -> None:
    """Writes a file, and has it on the disk when it returns. ``tensors`` come in the order of the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # data begin aligned
    with path.open("xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            file.write(tensor)
        if file.tell() != 8 + len(head) + end:
            raise ValueError(f"{file.tell() - 8 - len(head)} bytes of tensors were given, and {end} announced")
        file.flush()
        os.fsync(file.fileno())
