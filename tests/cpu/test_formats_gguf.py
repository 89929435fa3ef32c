"""GGUF files: every kind of value and tensor is read, and no file can lie about itself."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gguf_files import ARRAY, STRING, gguf
from penstock.base import ModelFormatError
from penstock.formats import GGUFFile

VALUES: dict[str, tuple[int, Any]] = {
    "u8": (0, 255), "i8": (1, -128), "u16": (2, 65535), "i16": (3, -2), "u32": (4, 2**32 - 1), "i32": (5, -1),
    "f32": (6, 0.5), "bool": (7, True), "string": (8, "naïve 日本 🙂"), "u64": (10, 2**64 - 1), "i64": (11, -(2**63)),
    "f64": (12, 1e300), "numbers": (9, (5, [1, -2, 3])), "flags": (9, (7, [True, False])), "none": (9, (6, [])),
    "texts": (9, (8, ["a", "", "é"])), "nested": (9, (9, [(4, [1, 2]), (8, ["x"])])),
}  # fmt: skip


def write(folder: Path, data: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(data)
    return path


def refusal(folder: Path, data: bytes) -> ModelFormatError:
    with pytest.raises(ModelFormatError) as error:
        GGUFFile(write(folder, data))
    assert error.value.code in ("gguf_invalid", "gguf_truncated")
    return error.value


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(tmp_path: Path, version: int) -> None:
    metadata = GGUFFile(write(tmp_path, gguf(VALUES, version=version))).metadata
    expected = {key: item for key, (_, item) in VALUES.items()}
    expected |= {"numbers": [1, -2, 3], "flags": [True, False], "none": [], "texts": ["a", "", "é"]}
    assert metadata == expected | {"nested": [[1, 2], ["x"]]}


def test_tensors_are_found_in_the_shapes_of_everybody_else(tmp_path: Path) -> None:
    metadata = {"general.alignment": (4, 64)}
    data = struct.pack("<6f", *range(6)) + bytes(40) + bytes(range(36)) + bytes(28) + b"\x01"
    entries = [("q", (32, 2), 2, 64), ("w", (3, 2), 0, 0), ("scalar", (), 24, 128)]
    file = GGUFFile(write(tmp_path, gguf(metadata, entries, data, alignment=64)))
    assert {n: (t.dtype, t.shape) for n, t in file.tensors.items()} == {
        "w": ("F32", (2, 3)), "q": ("Q4_0", (2, 32)), "scalar": ("I8", ()),
    }  # fmt: skip
    assert struct.unpack("<6f", file.view("w")) == (0, 1, 2, 3, 4, 5)
    assert bytes(file.view("q")) == bytes(range(36)) and bytes(file.view("scalar")) == b"\x01"


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    key = struct.pack("<Q", 1) + b"k"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", ARRAY, kind, count) + rest


LIES = {
    "magic": b"GGML" + bytes(20),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "version 4": b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "keys that are not there": b"GGUF" + struct.pack("<IQQ", 3, 0, 1000),
    "string": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63),
    "array of bytes": array(0, 2**63),
    "array of strings": array(STRING, 2**40),
    "array of arrays": array(ARRAY, 2**22),
    "array of what": array(13, 1),
    "deep": array(ARRAY, 1, (struct.pack("<IQ", ARRAY, 1)) * 100_000),
    "many empty arrays": array(ARRAY, 2**23, struct.pack("<IQ", 0, 0) * 1000),
    "unknown type": gguf({}, []).replace(struct.pack("<QQ", 0, 0), struct.pack("<QQ", 0, 1)) + bytes(8) + b"\x63\0\0\0",
    "twice": gguf({"a": (0, 1)})[:24].replace(b"\x01", b"\x02") + gguf({"a": (0, 1)})[24:37] * 2 + bytes(9),
    "not UTF-8": gguf({"a": (STRING, b"\xff\xfe")}),
    "alignment": gguf({"general.alignment": (4, 3)}),
    "alignment 0": gguf({"general.alignment": (4, 0)}),
    "alignment text": gguf({"general.alignment": (STRING, "32")}),
    "alignment true": gguf({"general.alignment": (7, True)}),
    "tensor beyond the file": gguf({}, [("t", (8,), 0, 0)], bytes(31)),
    "tensor far beyond": gguf({}, [("t", (8,), 0, 2**63)], bytes(32)),
    "huge shape": gguf({}, [("t", (2**62, 2**62), 0, 0)], bytes(32)),
    "five dimensions": gguf({}, [("t", (1, 1, 1, 1, 1), 0, 0)], bytes(32)),
    "unknown tensor type": gguf({}, [("t", (1,), 4, 0)], bytes(32)),
    "part of a block": gguf({}, [("t", (33,), 2, 0)], bytes(64)),
    "not aligned": gguf({}, [("t", (1,), 0, 4)], bytes(64)),
    "overlap": gguf({}, [("t", (9,), 0, 0), ("u", (1,), 0, 32)], bytes(64)),
    "two of a name": gguf({}, [("t", (1,), 0, 0), ("t", (1,), 0, 32)], bytes(64)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_at_once(tmp_path: Path, lie: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    refusal(tmp_path, LIES[lie])
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = gguf(VALUES, [("t", (8,), 0, 0)], bytes(32))
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])
    assert len(GGUFFile(write(tmp_path, whole)).view("t")) == 32


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError) as error:
        GGUFFile(tmp_path / "x.gguf")
    assert error.value.code == "weights_missing" and "path" in error.value.fix


def mutated(seed: int, whole: bytes) -> bytes:
    rng, data = random.Random(seed), bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[place] = rng.randrange(256)
        else:
            data[place : place + rng.randint(0, 9)] = rng.randbytes(rng.choice([0, 1, 4, 8]))
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def damage(folder: Path, seeds: range) -> tuple[int, int]:
    """How many damaged files are refused and how many still read, all views inside the file."""
    whole = gguf(VALUES | {"general.alignment": (4, 32)}, [("t", (4, 2), 0, 0), ("u", (32,), 8, 32)], bytes(80))
    refused = read = 0
    for seed in seeds:
        try:
            file = GGUFFile(write(folder, mutated(seed, whole)))
        except ModelFormatError:
            refused += 1
            continue
        read += 1
        for name, entry in file.tensors.items():
            assert len(file.view(name)) == entry.end - entry.start
    return refused, read


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    refused, read = damage(tmp_path, range(300))
    assert refused > 100 and read > 5


@pytest.mark.slow
def test_much_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    refused, read = damage(tmp_path, range(1_000, 9_000))
    assert refused > 5_000 and read > 200
