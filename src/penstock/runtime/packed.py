"""Packed weights that outlive the process: a start writes what it made to the weight cache, the next one maps it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penstock.formats import PackedFile, PackedTensor, WeightCache, damaged
from penstock.formats.packed import PAGE
from penstock.kernels import GroupedWeight, Ops, PackedWeight, Weight
from penstock.layers import Pack, Packing, Placement, Read, frozen_bytes
from penstock.models import Decoder, load_decoder, numerics_id
from penstock.spec import ModelSpec

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAKERS = ("formats", "kernels", "layers", "models", "quant", "spec")
"""Rooms that have a part in what becomes of a checkpoint."""

WRITER = "penstock-weight-cache"
"""Name of the thread that writes. The process does not end before it has."""

PAGE_WORDS, WORDS_AT_ONCE = PAGE // 8, 1 << 19
APART = PAGE_WORDS + 1
"""More words than a page has, so that no two of one page are in one sum; nor, since it is odd, two at the same place of
neighbouring pages or sectors."""


def load_kept(
    folder: Path,
    spec: ModelSpec,
    ops: Ops,
    placement: Placement,
    packing: Packing,
    store: WeightCache | None,
    told: Callable[[float], None] = lambda _: None,
) -> tuple[Decoder, int]:
    """``load_decoder`` by way of the cache, if there is one and the backend packs weights; and how many bytes of memory
    belong to its file: the system counts them as free, and the model reads them in every step."""
    if store is None or not ops.layout:
        return load_decoder(folder, spec, ops, placement, packing, told), 0
    identity = partial(numerics_id, folder, spec, ops, replace(placement, kv_dtype=None), packing.recipe, store.digest)
    numerics = identity()
    kept = KeptWeights(packing, store, numerics + ops.layout.encode(), {"model": str(folder), "weights": packing.name})
    decoder = load_decoder(folder, spec, ops, placement, kept, told)
    if identity() == numerics:  # no other files took the place of these meanwhile
        kept.keep()
    return decoder, 0 if kept.file is None else kept.file.bytes


class KeptWeights:
    """A Pack that takes from the cache what it has, and lets another make the rest.

    All of a file is compared with its checksums when it is opened: that reads it at the speed of memory, and the first
    token would read it anyway.

    Args:
        identity: what the weights are made of, by which arithmetic, and in which order.
        about: for people who look at the cache.
    """

    def __init__(self, make: Pack, store: WeightCache, identity: bytes, about: Mapping[str, str]) -> None:
        self.make, self.store, self.about = make, store, about
        self.key = hashlib.blake2b(identity + _source_digest(), digest_size=16).hexdigest()
        self.file = self._open()
        self.weights: dict[str, Weight] = {}
        self.made = 0

    def __call__(self, slot: str, name: str, inputs: int, read: Read) -> Weight:
        if self.file is not None and name in self.file.tensors:
            weight = _weight(self.file.tensors[name], self.file.view(name))
        else:
            weight = self.make(slot, name, inputs, read)
            self.made += 1
        self.weights[name] = weight
        return weight

    def keep(self) -> None:
        """When the model is complete: writes in a thread what had to be made."""
        if self.made:
            threading.Thread(target=self._write, name=WRITER).start()

    def _write(self) -> None:
        size = sum(_bytes(weight).numel() for weight in self.weights.values())
        self.store.keep(self.key, self.about, self._tensors(), size)

    def _tensors(self) -> Iterator[tuple[str, PackedTensor, memoryview]]:
        for name, weight in self.weights.items():
            dtype = weight.dtype if isinstance(weight, Tensor) else torch.uint8
            bits, group = (0, 0) if isinstance(weight, Tensor) else (weight.bits, weight.group)
            data = _bytes(weight)
            yield name, PackedTensor(NAMES[dtype], tuple(weight.shape), bits, group, checksum(data)), data.numpy().data

    def _open(self) -> PackedFile | None:
        file = self.store.find(self.key)
        if file is None:
            return None
        file.populate(self.store.told)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for name, tensor in file.tensors.items():
                self.store.told()
                if checksum(frozen_bytes(file.view(name)), pool) != tensor.checksum:
                    self.store.discard(self.key, damaged(file.path, f"the bytes of {name!r} have changed"))
                    return None
        return file


def checksum(data: Tensor, pool: Executor | None = None) -> str:
    """Of uint8 in one piece: blake2b over sums of its 64-bit words, modulo 2^64. Each word is in two: that of its page
    and, of each WORDS_AT_ONCE, that of every APART-th word. What fills neither goes in as it is.

    Damage that stays inside a page, words in another order too, and damage of up to three words is always found: in one
    of the two, some word that changed has a sum to itself. Other damage is missed where all changes add up to 0 in each
    sum: once in about 2^64 for bytes that chance put in place of a page's. All is read twice, the second time from the
    processor's cache. It is no defence against someone who may write to the folder.
    """
    numbers = data.numpy()
    whole = numbers.size // PAGE * PAGE
    words = numbers[:whole].view(np.int64)
    pieces = [words[at : at + WORDS_AT_ONCE] for at in range(0, words.size, WORDS_AT_ONCE)]
    digest = hashlib.blake2b(digest_size=16)
    for parts in map(_sums, pieces) if pool is None else pool.map(_sums, pieces):
        for part in parts:
            digest.update(part.data)
    digest.update(numbers[whole:].data)
    return digest.hexdigest()


def _sums(words: np.ndarray) -> tuple[np.ndarray, ...]:
    """By numpy, which does it in the thread that asks: torch's threads wait for each other in every call."""
    end = words.size // APART * APART
    return words.reshape(-1, PAGE_WORDS).sum(1), words[:end].reshape(-1, APART).sum(0), words[end:]


def _bytes(weight: Weight) -> Tensor:
    assert not isinstance(weight, GroupedWeight)  # of backends that pack nothing, whose weights are not kept
    return (weight if isinstance(weight, Tensor) else weight.data).view(-1).view(torch.uint8)


def _weight(tensor: PackedTensor, view: memoryview) -> Weight:
    data, shape = frozen_bytes(view), torch.Size(tensor.shape)
    if tensor.bits == 0:
        return data.view(DTYPES[tensor.dtype]).view(shape)
    return PackedWeight(data.view(*shape[:-2], -1), shape, tensor.bits, tensor.group)


@cache
def _source_digest() -> bytes:
    """Of the code that makes weights: what another version made is not looked for."""
    package, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=16)
    for path in sorted(path for room in MAKERS for path in (package / room).rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.digest()
