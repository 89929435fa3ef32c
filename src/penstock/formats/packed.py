"""Files of packed weights: tensors exactly as kernels read them, to be mapped by the next start.

A prefix of 48 bytes, integers little-endian:

    0   8   "penstock"
    8   8   version of this format
    16  8   where the header starts
    24  8   its length; the file ends with it
    32  16  blake2b-128 of bytes 0 to 31 and of the header

Tensors follow, each from a multiple of PAGE bytes, and behind them the header, a JSON object: ``key``, what the file is
kept under; ``about``, for people; ``tensors``, a PackedTensor each by name. The prefix is written last, and a file gets
its name when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError
from penstock.formats.files import written_whole
from penstock.formats.jsonfile import parse_json_object

MAGIC, VERSION, PAGE, PREFIX = b"penstock", 2, 4096, 48
MAX_HEADER_BYTES = READ_AT_ONCE = 1 << 28


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Attributes:
    dtype: of the bytes, as safetensors name it.
    shape: of the matrix or stack of matrices [..., N, K].
    bits, group: of small integers that share a scale; 0 for plain numbers.
    checksum: of the bytes, as whoever made them has it.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int
    group: int
    checksum: str
    start: int = 0
    end: int = 0


class PackedFile:
    """A mapped file whose header is whole. The checksums of its tensors are for the reader to compare.

    Raises:
        ModelFormatError: (packed_damaged) it is of another version, cut short, changed, or kept under another key.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PREFIX:
                raise damaged(path, f"it has {size} bytes")
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        header = self._header()
        if header.get("key") != key:
            raise damaged(path, f"it is kept under {header.get('key')!r}, not {key!r}")
        try:
            self.about: Mapping[str, str] = dict(header["about"])
            self.tensors = {name: _tensor(entry) for name, entry in header["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path, f"its header lacks something: {error!r}") from None
        for name, tensor in self.tensors.items():
            if tensor.start % PAGE or not PREFIX <= tensor.start <= tensor.end <= size:
                raise damaged(path, f"tensor {name!r} is said to be at {tensor.start} to {tensor.end}")

    def view(self, name: str) -> memoryview:
        """The tensor's bytes, read-only."""
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.start : tensor.end]

    def populate(self, told: Callable[[], None] = lambda: None) -> None:
        """Reads it in pieces of READ_AT_ONCE rather than page by page, where the system can; ``told`` hears of each."""
        with contextlib.suppress(OSError, ValueError):
            for start in range(0, self.bytes, READ_AT_ONCE):
                self._map.madvise(22, start, min(READ_AT_ONCE, self.bytes - start))  # MADV_POPULATE_READ, Linux 5.14
                told()

    @property
    def bytes(self) -> int:
        return len(self._map)

    def _header(self) -> dict[str, Any]:
        prefix = self._map[:PREFIX]
        version, start, length = (int.from_bytes(prefix[at : at + 8], "little") for at in (8, 16, 24))
        if prefix[:8] != MAGIC:
            raise damaged(self.path, "it does not begin as one")
        if version != VERSION:
            raise damaged(self.path, f"it is of version {version}, and this build reads {VERSION}")
        if start + length != self.bytes or start < PREFIX or length > MAX_HEADER_BYTES:
            raise damaged(self.path, f"it should have {start + length} bytes and has {self.bytes}")
        data = self._map[start:]
        if _digest(prefix[:32], data) != prefix[32:]:
            raise damaged(self.path, "its header has changed")
        return parse_json_object(data, self.path.name)


def write_packed(
    path: Path, key: str, about: Mapping[str, str], tensors: Iterable[tuple[str, PackedTensor, memoryview]]
) -> None:
    """Puts the file in its place when it is whole. Raises OSError."""
    entries, at = {}, PREFIX
    with written_whole(path) as file:
        for name, tensor, data in tensors:
            start = -(-at // PAGE) * PAGE
            file.seek(start)
            file.write(data)
            at = start + data.nbytes
            entries[name] = asdict(tensor) | {"start": start, "end": at}
        header = json.dumps({"key": key, "about": dict(about), "tensors": entries}).encode()
        file.seek(at)
        file.write(header)
        prefix = MAGIC + b"".join(number.to_bytes(8, "little") for number in (VERSION, at, len(header)))
        file.seek(0)
        file.write(prefix + _digest(prefix, header))


def damaged(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        "packed_damaged",
        "Packed weights that were kept cannot be used",
        why=f"{path}: {why}",
        fix="they are made anew; `penstock cache --clear` removes all that is kept",
    )


def _digest(prefix: bytes, header: bytes) -> bytes:
    return hashlib.blake2b(prefix + header, digest_size=16).digest()


def _tensor(entry: Any) -> PackedTensor:
    kinds = {"dtype": str, "shape": list, "bits": int, "group": int, "checksum": str, "start": int, "end": int}
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
        raise ValueError(f"{entry!r} describes no tensor")
    return PackedTensor(**entry | {"shape": tuple(entry["shape"])})
