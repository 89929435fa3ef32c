"""Damaged GGUF files: they are refused as such, or load; nothing else happens, and memory stays bounded."""

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from oracle import CPU
from penstock.base import ModelFormatError
from penstock.kernels import Ops, make_ops, native
from penstock.layers import Placement
from penstock.models import load_decoder
from penstock.spec import ModelSpec
from penstock.spec.encoder import read_any_spec
from penstock.spec.generation import read_recommended
from penstock.text import load_chat_template, load_tokenizer
from small_gguf import small

BIASES: dict[str, tuple[int, ...] | None] = {
    "blk.0.attn_q.bias": (32,), "blk.0.attn_k.bias": (16,), "blk.0.attn_v.bias": (16,)
}  # fmt: skip
LARGE = (0, 1, 2, 7, 31, 255, 2**16, 2**20, 2**24, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
GROWTH = 300 << 20
"""Most memory that the process may take beside what it has; the files are of less than half a megabyte."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Real files: dense and sparse, of every kind of block, with each kind of rope."""
    folder = tmp_path_factory.mktemp("files")
    norms = {"blk.0.post_attention_norm": (32,), "blk.0.post_ffw_norm": (32,)}
    cases = [
        small(folder / "f32", rope__scaling__type="yarn", rope__scaling__factor=4.0),
        small(folder / "f16", "qwen2", Kind.F16, tensors={"output": (8, 32), **BIASES}),
        small(folder / "q8", "gemma2", Kind.Q8_0, tensors=norms, attention__sliding_window=16),
        small(folder / "q4", kind=Kind.Q4_0, experts=3, tensors={"rope_freqs": (8,)}),
        small(folder / "q5", "granite", Kind.Q5_1, attention__scale=0.5, logit_scale=2.0),
    ]
    for kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        rows = {"blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256)}
        rows["blk.0.attn_output"] = (256, 256)
        path = folder / kind.name
        cases.append(small(path, kind=kind, width=256, tensors=rows, attention__key_length=128))
    return [path.read_bytes() for path in cases]


def load_all(path: Path, ops: Ops) -> ModelSpec:
    """All that is read of a file when an engine starts, as a backend packs it."""
    spec = read_any_spec(path)
    load_tokenizer(path, spec.vocab_size)
    load_chat_template(path)
    read_recommended(path)
    # A context is cut to what memory holds before a rope table is made for it.
    load_decoder(path, replace(spec, max_positions=min(spec.max_positions, 64)), ops, Placement(torch.bfloat16, CPU))
    return spec


OPS = [make_ops(name) for name in ("torch", "cpu") if name == "torch" or native()]


def mutated(rng: random.Random, whole: bytes) -> bytes:
    """Bytes flipped, numbers replaced by telling ones, pieces doubled, cut out or cut off; mostly in the header."""
    data = bytearray(whole)
    header = whole.rindex(b".weight") + 60
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = min(header, len(data)) if rng.random() < 0.8 else len(data)
        at = rng.randrange(max(1, end))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
            case 2:
                data[at : at + 8] = struct.pack("<Q", rng.choice(LARGE))
            case 3:
                data[at : at + 4] = struct.pack("<I", rng.choice(LARGE) & 0xFFFFFFFF)
            case 4:
                data[at : at + rng.randint(0, 9)] = data[at : at + rng.choice((0, 1, 4, 8, 40))] * rng.randint(0, 2)
            case _ if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
        if not data:
            return b""
    return bytes(data)


@cache
def told(whole: bytes) -> list[int]:
    """Where the names of numbers end."""
    names = (
        rb"_count",
        rb"_length",
        rb"_kv",
        rb"epsilon",
        rb"freq_base",
        rb"\.factor",
        rb"scale",
        rb"sliding_window",
        rb"\.weight",
    )
    return [found.end() for name in names for found in re.finditer(name, whole)]


def lying(rng: random.Random, whole: bytes) -> bytes:
    """One of the numbers of the metadata or of a tensor's description is another one: the file still reads."""
    data = bytearray(whole)
    places = told(whole)
    at = rng.choice(places) + rng.choice((0, 4, 4, 4, 12, 20, 28))
    data[at : at + 4] = rng.choice((struct.pack("<I", rng.choice(LARGE) & 0xFFFFFFFF), rng.randbytes(4)))
    return bytes(data)


def survive(folder: Path, files: list[bytes], seeds: range) -> Counter[str]:
    """How often each came out."""
    outcomes: Counter[str] = Counter()
    before = reset_peak()
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"{seed % 2}.gguf"
        path.write_bytes((lying if seed % 4 == 0 else mutated)(rng, rng.choice(files)))
        try:
            load_all(path, OPS[seed // 4 % len(OPS)])
            outcomes["loaded"] += 1
        except ModelFormatError as error:
            assert error.what and error.code
            outcomes[error.code] += 1
        except BaseException:
            print(f"seed {seed}")
            raise
    assert peak() - before < GROWTH, f"{(peak() - before) >> 20} MiB"
    print(dict(outcomes))
    return outcomes


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory the process had since ``reset_peak``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def test_the_files_are_good(files: list[bytes], tmp_path: Path) -> None:
    for i, data in enumerate(files):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(data)
        for ops in OPS:
            load_all(path, ops)


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is asked of Linux")
def test_damaged_files(files: list[bytes], tmp_path: Path) -> None:
    outcomes = survive(tmp_path, files, range(2_000))
    assert outcomes["loaded"] > 200
    assert {"gguf_invalid", "gguf_truncated", "config_invalid", "weights_shape", "tokenizer_invalid"} <= set(outcomes)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is asked of Linux")
def test_many_damaged_files(files: list[bytes], tmp_path: Path) -> None:
    assert survive(tmp_path, files, range(10_000, 110_000))["loaded"] > 10_000
