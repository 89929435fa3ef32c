"""The cache of packed weights: the same bits with and without it, and whatever happens to its files."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from oracle import CPU
from penstock import LLM, SamplingParams
from penstock.base import ModelFormatError
from penstock.formats import PackedFile, WeightCache, digest, file_digest
from penstock.formats.files import UNFINISHED
from penstock.formats.packed import VERSION
from penstock.kernels import GroupedWeight, make_ops, native
from penstock.layers import Packing, Read
from penstock.models import Decoder, Placement
from penstock.quant import quantize
from penstock.runtime.packed import WRITER, KeptWeights, checksum, load_kept
from penstock.spec import ModelSpec
from penstock.spec.encoder import read_any_spec
from penstock.spec.quantization import Quantization
from small_gguf import small
from small_model import CONFIG, write_model
from test_quantization import tensors_of

pytestmark = pytest.mark.skipif(not native(), reason="installed without a compiler")

WIDE = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
LIMIT = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_model(tmp_path / "model", WIDE)


@pytest.fixture
def store(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache", LIMIT)


def never(*_: object) -> None:
    pytest.fail("a weight was made that is in the cache")


def written() -> None:
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join()


def load(model: Path, store: WeightCache | None, quantization: Quantization = "int8") -> Decoder:
    ops, placement, spec = make_ops("cpu"), Placement(torch.float32, CPU), read_any_spec(model)
    assert isinstance(spec, ModelSpec)
    packing = Packing(ops, spec, placement, quantization)
    decoder, mapped = load_kept(model, spec, ops, placement, packing, store)
    written()
    assert mapped in (0, *((kept.bytes for kept in store.listing()) if store else ()))
    return decoder


def bits(decoder: Decoder) -> list[bytes]:
    return [bytes_of(tensor) for tensor in tensors_of(decoder)]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def only(store: WeightCache) -> Path:
    (kept,) = store.listing()
    return kept.path


def answer(**options: Any) -> list[Any]:
    with LLM(seed=1, max_model_len=128, **options) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=2)
        outputs = llm.generate(["Once upon a time", "The"], params, use_tqdm=False)
    written()
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_one_answer_whether_weights_are_made_or_mapped(
    quant: Quantization, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    without = answer(quant=quant, dtype=dtype, weight_cache=False)
    assert not list(tmp_path.iterdir())
    first = answer(quant=quant, dtype=dtype)
    assert len(list(tmp_path.glob("*.packed"))) == 1
    monkeypatch.setattr(Packing, "__call__", never)
    assert answer(quant=quant, dtype=dtype) == first == without


@pytest.mark.parametrize("experts", [0, 4])
def test_a_quantized_file_is_kept_as_well(
    experts: int, tmp_path: Path, store: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small(tmp_path / "small.gguf", kind=Kind.Q8_0, experts=experts)
    without, first = bits(load(file, None)), bits(load(file, store))
    monkeypatch.setattr(Packing, "__call__", never)
    assert bits(load(file, store)) == first == without


def test_what_is_kept_follows_all_that_makes_it(model: Path, store: WeightCache) -> None:
    for quantization in ("none", "int8", "int4", "int8"):
        load(model, store, quantization)  # type: ignore[arg-type]
    assert len(store.listing()) == 3
    write_model(model, WIDE)
    load(model, store)
    assert len(store.listing()) == 4


def test_stacks_of_matrices_come_back(store: WeightCache) -> None:
    ops = make_ops("cpu")
    sources: dict[str, Tensor | GroupedWeight] = {
        "8": quantize(torch.randn(3, 20, 64), 8, 32),
        "4": quantize(torch.randn(3, 20, 64), 4, 64),
        "plain": torch.randn(3, 20, 33).bfloat16(),
    }

    def make(slot: str, name: str, inputs: int, read: Read) -> Any:
        return ops.pack(read(False))

    made = KeptWeights(make, store, b"id", {})
    before = [made("", name, 64, lambda _, name=name: sources[name]) for name in sources]
    made.keep()
    written()
    mapped = KeptWeights(make, store, b"id", {})
    after = [mapped("", name, 64, lambda _: pytest.fail("made")) for name in sources]
    assert mapped.made == 0
    for old, new in zip(before, after, strict=True):
        assert type(old) is type(new) and old.shape == new.shape
        assert [bytes_of(t) for t in tensors_of(old[1])] == [bytes_of(t) for t in tensors_of(new[1])]
        assert (getattr(old, "bits", 0), getattr(old, "group", 0)) == (
            getattr(new, "bits", 0),
            getattr(new, "group", 0),
        )


# -- files that something happened to ----------------------------------------------------------------------------------


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """What a disk, a copy or another build may leave in a file's place."""
    whole, rng = path.read_bytes(), random.Random(7)
    header = int.from_bytes(whole[16:24], "little")
    for length in (0, 7, 47, 48, header, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))):
        yield f"cut at {length}", whole[:length]
    yield "longer", whole + b"\0"
    yield "zeros", bytes(len(whole))
    yield "another version", whole[:8] + (VERSION + 1).to_bytes(8, "little") + whole[16:]
    yield "written to the middle", whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    for at in (*range(0, 48, 5), *(rng.randrange(header, len(whole)) for _ in range(10))):
        yield f"header flipped at {at}", flipped(whole, at, 1 << rng.randrange(8))
    file = PackedFile(path, path.stem)
    for tensor in rng.sample(sorted(file.tensors.values(), key=lambda t: t.start), 5):
        at = rng.choice((tensor.start, tensor.end - 1, rng.randrange(tensor.start, tensor.end)))
        yield f"body flipped at {at}", flipped(whole, at, 1 << rng.randrange(8))
        yield f"page lost at {at}", whole[: at // 4096 * 4096] + bytes(4096) + whole[at // 4096 * 4096 + 4096 :]
    first, second = (tensor.start for tensor in list(file.tensors.values())[:2])
    pages = [whole[at : at + 4096] for at in (first, second)]
    swapped = whole[:first] + pages[1] + whole[first + 4096 :]
    yield "pages exchanged", swapped[:second] + pages[0] + swapped[second + 4096 :]
    yield "two highest bits of a page flipped", flipped(flipped(whole, first + 7, 128), first + 4095, 128)
    one, other = opposite_words(pages[0])
    yield "a bit set here and cleared there", flipped(flipped(whole, first + one, 1), first + other, 1)
    yield "sectors of a page exchanged", exchanged(whole, first, first + 512, 512)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def exchanged(data: bytes, one: int, other: int, size: int) -> bytes:
    """Pieces of ``size`` bytes, of which ``one`` is the first."""
    between = data[one + size : other]
    return data[:one] + data[other : other + size] + between + data[one : one + size] + data[other + size :]


def opposite_words(page: bytes) -> tuple[int, int]:
    """Where words begin whose lowest bits differ."""
    found = {page[at] & 1: at for at in range(0, len(page), 8)}
    return found[0], found[1]


def test_damage_is_noticed_and_mended(model: Path, store: WeightCache, caplog: pytest.LogCaptureFixture) -> None:
    before = bits(load(model, store))
    path = only(store)
    whole = path.read_bytes()
    for kind, damage in list(damages(path)):
        path.unlink()  # a new file: others may have the old one mapped
        path.write_bytes(damage)
        caplog.clear()
        assert bits(load(model, store)) == before, kind
        assert [record.levelno for record in caplog.records] == [logging.WARNING], kind
        assert path.read_bytes() == whole, kind


@pytest.mark.parametrize("pages", [1, 3, 1025])
def test_checksum_sees_what_cancels_in_a_sum(pages: int) -> None:
    """All that stays inside a page, and up to three words anywhere."""
    rng = random.Random(pages)
    data = torch.frombuffer(bytearray(rng.randbytes(pages * 4096 + 100)), dtype=torch.uint8)
    words, before, top = data[: pages * 4096].view(torch.int64), checksum(data), -(1 << 63)

    def seen(places: list[int], values: Tensor) -> bool:
        kept = words[places]
        words[places] = values
        changed = checksum(data) != before
        words[places] = kept
        return changed

    for _ in range(20):
        page, change = 512 * rng.randrange(pages), 1 << rng.randrange(63)
        inside = [page + at for at in rng.sample(range(512), 4)]
        for places in (inside, rng.sample(range(len(words)), 3)):
            for changes in ([change], [change, -change], [top, top], [change, change, -2 * change]):
                some = places[: len(changes)]
                assert seen(some, words[some] + torch.tensor(changes)), (some, changes)
        assert seen(inside, words[inside] + top)
        whole = list(range(page, page + 512))
        assert seen(whole, words[whole].roll(64 * rng.randrange(1, 8)))
        data[-1 - (at := rng.randrange(100))] ^= 1  # behind the last whole page
        assert checksum(data) != before
        data[-1 - at] ^= 1


def test_checksum_sees_where_pages_lie() -> None:
    """Two of the same sum, and a highest bit in every word of two pages."""
    words = torch.zeros(1024, dtype=torch.int64)
    words[3], words[512 + 7] = 5, 5
    turned = words.view(2, 512).flip(0).reshape(-1)
    sums = {checksum(x.view(torch.uint8)) for x in (words, turned, words ^ -(1 << 63))}
    assert len(sums) == 3


def test_every_bit_of_prefix_and_header_counts(model: Path, store: WeightCache, tmp_path: Path) -> None:
    load(model, store)
    whole, copy = only(store).read_bytes(), tmp_path / only(store).name
    header = int.from_bytes(whole[16:24], "little")
    for at in (*range(48), *range(header, len(whole), 7)):
        copy.write_bytes(flipped(whole, at, 1 << at % 8))
        with pytest.raises(ModelFormatError) as error:
            PackedFile(copy, copy.stem)
        assert error.value.code == "packed_damaged"


def test_a_file_under_the_name_of_another_is_not_taken(model: Path, store: WeightCache) -> None:
    int8, int4 = bits(load(model, None)), bits(load(model, None, "int4"))
    load(model, store)
    path = only(store)
    load(model, store, "int4")
    (other,) = (kept.path for kept in store.listing() if kept.path != path)
    shutil.copyfile(other, path)
    assert bits(load(model, store)) == int8
    assert bits(load(model, store, "int4")) == int4


# -- folders, disks and other processes --------------------------------------------------------------------------------

CHILD = """
import sys, hashlib
from penstock import LLM, SamplingParams
with LLM(quant="int4", dtype="float32", max_model_len=128, seed=1) as llm:
    outputs = llm.generate(["Once upon"], SamplingParams(max_tokens=8, temperature=0, logprobs=1), use_tqdm=False)
print(outputs[0].outputs[0].token_ids, outputs[0].outputs[0].cumulative_logprob)
"""


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    env = os.environ | {"PENSTOCK_CACHE": str(tmp_path)}
    for _ in range(2):  # making, then mapping
        runs = [subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, env=env) for _ in range(2)]
        said = [run.communicate(timeout=120)[0] for run in runs]
        assert len(set(said)) == 1 and said[0]
        assert not [run for run in runs if run.returncode]
        assert len(list(tmp_path.glob("*.packed"))) == 1
        assert not list(tmp_path.glob(f"*{UNFINISHED}"))


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = WeightCache(tmp_path / "file" / "cache", LIMIT)
    assert bits(load(model, store)) == bits(load(model, None))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(caplog.records)
    assert caplog.records and not store.listing()


def test_a_disk_that_is_full(model: Path, store: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        load(model, store)
        assert not [path for path in store.folder.iterdir() if path.name != "digests.json"]
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        load(model, store)
        assert not store.listing()
    load(model, store)
    assert store.listing()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    models, store = [], WeightCache(tmp_path / "cache", LIMIT)
    for name in "abcd":
        (tmp_path / name).mkdir()
        models.append(write_model(tmp_path / name, WIDE))
    for at, model in enumerate(models[:3]):
        load(model, store)
        os.utime(store.listing()[0].path, (at, at))
    assert [kept.used for kept in store.listing()] == [2, 1, 0]
    size = store.listing()[0].bytes
    load(models[0], store)  # used again
    abandoned = store.folder / f"x{UNFINISHED}"
    abandoned.write_bytes(b"x")
    os.utime(abandoned, (0, 0))
    store = WeightCache(store.folder, 3 * size + size // 2)
    load(models[3], store)
    kept = {store.about(file)["model"] for file in store.listing()}
    assert kept == {str(models[at]) for at in (0, 2, 3)}
    assert not abandoned.exists()
    small_store = WeightCache(tmp_path / "none", size // 2)
    load(models[0], small_store)
    assert not small_store.listing()
    assert len(store.clear()) == 3 and not list(store.folder.iterdir())


# -- digests -----------------------------------------------------------------------------------------------------------


def old(path: Path, data: bytes) -> Path:
    """A file that was not changed just now, as far as one can tell by what can be set."""
    path.write_bytes(data)
    os.utime(path, (1, 1))
    return path


def test_digests_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = old(tmp_path / "x", b"abc"), tmp_path / "new" / "digests.json"
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    monkeypatch.setattr(digest, "_known", {})
    wanted = hashlib.sha256(b"abc").hexdigest()
    heard: list[None] = []
    assert file_digest(file, memory, lambda: heard.append(None)) == wanted and heard == [None]
    with monkeypatch.context() as patch:
        patch.setattr(digest, "_known", {})
        patch.setattr(digest, "_digest", lambda *_: pytest.fail("it was hashed again"))
        assert file_digest(file, memory) == wanted
    for damage in (b"", b"{", b"[]", b'{"x": 1}', b"\xff"):
        memory.write_bytes(damage)
        monkeypatch.setattr(digest, "_known", {})
        assert file_digest(file, memory) == wanted


def test_another_content_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, inode and time, as far as times can be set; and right after the last change."""
    memory = tmp_path / "digests.json"
    for settled in (0, digest.SETTLED_NS):
        monkeypatch.setattr(digest, "SETTLED_NS", settled)
        for data in (b"abc", b"abd", b"abc"):
            file = old(tmp_path / "x", data)
            for _ in range(2):
                assert file_digest(file, memory) == hashlib.sha256(data).hexdigest()
        assert len(memory.read_text().splitlines()) == 3  # the latest of the file, alone


def test_few_digests_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "digests.json"
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    monkeypatch.setattr(digest, "REMEMBERED", 3)
    for name in "abcde":
        file_digest(old(tmp_path / name, b"abc"), memory)
    assert [line.rsplit("/", 1)[1][0] for line in memory.read_text().splitlines()[1:-1]] == list("cde")


def test_a_blob_is_not_believed_its_name(tmp_path: Path) -> None:
    """What is kept under the digest of a damaged blob would outlive its mending under the same name."""
    blob, link = tmp_path / ("a" * 64), tmp_path / "model.safetensors"
    blob.write_bytes(b"damaged")
    link.symlink_to(blob)
    assert file_digest(link) == "a" * 64
    assert file_digest(link, tmp_path / "memory.json") == hashlib.sha256(b"damaged").hexdigest()
