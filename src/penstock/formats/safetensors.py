"""safetensors files: eight bytes of header length, a JSON header, then the tensors (huggingface/safetensors).

Nothing here trusts the file: every offset is checked against the file's size, in Python integers, before
a byte of tensor data is touched. Data is memory-mapped; a view costs nothing until it is read.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError
from penstock.formats.files import release_pages
from penstock.formats.jsonfile import parse_json_object

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_DIMENSIONS = 16
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: ``start`` and ``end`` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A validated, memory-mapped file.

    Attributes:
        tensors: entries by name.
        metadata: the header's ``__metadata__``, strings only.

    Raises:
        ModelFormatError: (weights_missing) no such file; (weights_truncated) it ends before its tensors do;
            (weights_header) its header is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                if self.size < 8:
                    raise _truncated(path, "the header length", 8, self.size)
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file shrank under us
            raise ModelFormatError(
                "weights_missing",
                f"The weight file {path.name} cannot be read",
                why=f"{path}: {error}",
                fix="check that the model folder was downloaded completely",
            ) from None
        header, data_start = self._header()
        self.metadata: Mapping[str, str] = _metadata(path, header.pop("__metadata__", {}))
        self.tensors = {name: _entry(path, name, raw, data_start) for name, raw in header.items()}
        self._check_layout(data_start)

    def view(self, name: str) -> memoryview:
        """The tensor's bytes, read-only, little-endian, row-major."""
        entry = self.tensors[name]
        return memoryview(self._map)[entry.start : entry.end]

    def release(self, name: str) -> None:
        """Lets the system reclaim the tensor's pages; views stay valid and would read the file again."""
        entry = self.tensors[name]
        release_pages(self._map, entry.start, entry.end)

    def _header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._map[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise bad_header(self.path, f"header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes")
        if 8 + length > self.size:
            raise _truncated(self.path, "the header", 8 + length, self.size)
        try:
            return parse_json_object(self._map[8 : 8 + length], self.path.name), 8 + length
        except ModelFormatError as error:
            raise bad_header(self.path, error.why) from None

    def _check_layout(self, data_start: int) -> None:
        """Tensors must tile the data exactly, as the format demands: no overlap, no hole, no tail."""
        end = data_start
        for entry in sorted(self.tensors.values(), key=lambda e: (e.start, e.end)):
            if entry.end > self.size:
                raise _truncated(self.path, f"tensor {entry.name!r}", entry.end, self.size)
            if entry.start != end:
                kind = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
                raise bad_header(self.path, f"tensor {entry.name!r} {kind}: it starts at {entry.start}, not {end}")
            end = entry.end
        if end != self.size:
            raise bad_header(self.path, f"the tensors end at byte {end} of a file of {self.size} bytes")


def _entry(path: Path, name: str, raw: object, data_start: int) -> TensorEntry:
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad_header(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad_header(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad_header(path, f"tensor {name!r} has the shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad_header(path, f"tensor {name!r} has the data_offsets {offsets!r}")
    expected, actual = prod(shape) * DTYPE_BITS[dtype] // 8, offsets[1] - offsets[0]
    if expected != actual:
        raise bad_header(
            path, f"tensor {name!r} of {dtype} {shape} takes {expected} bytes, its data_offsets span {actual}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(value: object) -> bool:
    """Whether value is a list of integers in [0, 2^63)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _metadata(path: Path, raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise bad_header(path, "__metadata__ does not map strings to strings")
    return raw


def _truncated(path: Path, part: str, expected: int, actual: int) -> ModelFormatError:
    return ModelFormatError(
        "weights_truncated",
        f"The weight file {path.name} is cut short",
        why=f"{part} ends at byte {expected}, the file at byte {actual}",
        fix="download the file again",
    )


def bad_header(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        "weights_header",
        f"The weight file {path.name} has a damaged header",
        why=why[:500],
        fix="download the file again",
    )
