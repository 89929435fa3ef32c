"""GGUF files: metadata, tensor entries, then the tensors (ggml-org/ggml, docs/gguf.md). Versions 2 and 3.

Nothing here trusts the file: every length is checked against the bytes that are left before anything is made of it, so
that no file can claim more than it holds. Data is memory-mapped; a view costs nothing until it is read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError
from penstock.formats.files import release_pages
from penstock.formats.safetensors import TensorEntry

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 512 << 20
MAX_KEYS = 1 << 16
MAX_ITEMS = 1 << 23
"""Values in all arrays of the metadata together."""
MAX_NESTING = 4
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4

BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Tensor types: name, elements in a block, bytes of a block (ggml.h, ggml-common.h)."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFFile:
    """A validated, memory-mapped file.

    Attributes:
        metadata: numbers, booleans, strings, and lists of them.
        tensors: entries by name; a shape has its slowest dimension first, as elsewhere, which GGUF writes last.

    Raises:
        ModelFormatError: (weights_missing) no such file; (gguf_truncated) it ends before its contents do;
            (gguf_invalid) it is no such file, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                if self.size < 24:
                    raise _truncated(path, "the header", 24, self.size)
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file shrank under us
            raise ModelFormatError(
                "weights_missing",
                f"The GGUF file {path.name} cannot be read",
                why=f"{path}: {error}",
                fix="give the path of a GGUF file that you may read",
            ) from None
        reader = _Reader(path, self._map, min(self.size, MAX_HEADER_BYTES))
        num_tensors, num_keys = reader.start()
        self.metadata: Mapping[str, Any] = reader.metadata(num_keys)
        infos = [reader.tensor() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _invalid(path, f"its alignment is {str(alignment)[:40]}")
        self.tensors = self._layout(infos, -(-reader.at // alignment) * alignment, alignment)

    def view(self, name: str) -> memoryview:
        """The tensor's bytes, read-only, in the blocks of its type."""
        entry = self.tensors[name]
        return memoryview(self._map)[entry.start : entry.end]

    def release(self, name: str) -> None:
        """Lets the system reclaim the tensor's pages; views stay valid and would read the file again."""
        entry = self.tensors[name]
        release_pages(self._map, entry.start, entry.end)

    def _layout(self, infos: list[TensorEntry], data_start: int, alignment: int) -> dict[str, TensorEntry]:
        """Entries with offsets from the beginning of the file, all inside it, aligned, none over another."""
        tensors: dict[str, TensorEntry] = {}
        end = data_start
        for info in sorted(infos, key=lambda entry: entry.start):
            entry = TensorEntry(info.name, info.dtype, info.shape, data_start + info.start, data_start + info.end)
            if entry.end > self.size:
                raise _truncated(self.path, f"tensor {info.name!r}", entry.end, self.size)
            if info.start % alignment or entry.start < end:
                why = "is not aligned" if info.start % alignment else "lies over the one before it"
                raise _invalid(self.path, f"tensor {info.name!r} at offset {info.start} {why}")
            if info.name in tensors:
                raise _invalid(self.path, f"there are two tensors {info.name!r}")
            tensors[info.name], end = entry, entry.end
        return tensors


def read_gguf(path: Path) -> GGUFFile:
    """``GGUFFile(path)``, or the one read last if it is still that: a large vocabulary takes half a second to read."""
    try:
        stat = path.stat()
    except OSError:
        return GGUFFile(path)  # says what is wrong
    return _read_once(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(1)
def _read_once(path: Path, *_: int) -> GGUFFile:
    return GGUFFile(path)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant by a path: that file, or the only one of a folder without config.json."""
    if path.is_file():
        return path
    found = [] if (path / "config.json").exists() else list(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


class _Reader:
    """Reads the part before the tensors from front to back."""

    def __init__(self, path: Path, data: mmap.mmap, end: int) -> None:
        self.at = 0
        self._path, self._data, self._end, self._items = path, data, end, 0

    def start(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata keys."""
        if self._take(4, "the header") != MAGIC:
            raise _invalid(self._path, "it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            why = f"it is of version {version}, 2 and 3 are read"
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            raise _invalid(self._path, "it is written for big-endian machines" if swapped in (2, 3) else why)
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise _invalid(self._path, f"it claims {num_tensors} tensors and {num_keys} metadata keys")
        return num_tensors, num_keys

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in values:
                raise _invalid(self._path, f"the key {key[:80]!r} appears twice")
            values[key] = self._value(self._number("I"), key)
        return values

    def tensor(self) -> TensorEntry:
        """An entry whose ``start`` and ``end`` are relative to the beginning of the data."""
        name, rank = self._string(), self._number("I")
        if rank > MAX_DIMENSIONS:
            raise _invalid(self._path, f"tensor {name[:80]!r} has {rank} dimensions")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        kind, start = self._number("I"), self._number("Q")
        if kind not in BLOCKS:
            raise _invalid(self._path, f"tensor {name[:80]!r} is of the unknown type {kind}")
        dtype, elements, size = BLOCKS[kind]
        if shape and shape[-1] % elements:
            raise _invalid(self._path, f"tensor {name[:80]!r} has rows of {shape[-1]}, {dtype} blocks hold {elements}")
        return TensorEntry(name, dtype, shape, start, start + prod(shape) // elements * size)

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == MAX_NESTING:
            why = f"of the unknown type {kind}" if kind != _ARRAY else f"nested more than {MAX_NESTING} deep"
            raise _invalid(self._path, f"the value of {key[:80]!r} is {why}")
        kind, count = self._number("I"), self._number("Q")
        self._items += count
        if kind not in (*_NUMBERS, _STRING, _ARRAY) or self._items > MAX_ITEMS:
            raise _invalid(self._path, f"{key[:80]!r} is an array of {count} values of type {kind}")
        if kind in _NUMBERS:
            layout = f"<{count}{_NUMBERS[kind]}"
            return list(struct.unpack(layout, self._take(struct.calcsize(layout), key)))
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        raw = self._take(self._number("Q"), "a string")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _invalid(self._path, f"the string before byte {self.at} is not UTF-8: {error.reason}") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code), "a number"))[0]

    def _take(self, size: int, what: str) -> bytes:
        if size > self._end - self.at:
            raise _truncated(self._path, what[:80], self.at + size, self._end)
        self.at += size
        return self._data[self.at - size : self.at]


def _truncated(path: Path, part: str, expected: int, actual: int) -> ModelFormatError:
    return ModelFormatError(
        "gguf_truncated",
        f"The GGUF file {path.name} is cut short",
        why=f"{part} ends at byte {expected}, what can be read at byte {actual}",
        fix="download the file again",
    )


def _invalid(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        "gguf_invalid", f"The GGUF file {path.name} cannot be used", why=why[:300], fix="download the file again"
    )
