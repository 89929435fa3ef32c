"""KV memory as every torch-based backend lays it out."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.base import ConfigError
from penstock.kernels.ops import SEGMENT
from penstock.kernels.types import KVLayer


def allocate_layers(
    layers: int,
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    orders: tuple[str, str, str] = ("PBHd", "PBHd", "PBH"),
    *,
    brief: bool = False,
) -> list[KVLayer]:
    """Zeros, not empty memory: an unwritten slot must not hold a NaN that some fast path multiplies by zero.

    Args:
        dtype: int8 brings scales.
        orders: of K, V and the scales in memory, outermost axis first.
        brief: for one call of an op, so that memory just freed is better than new pages.
    """
    if not 0 < block_size <= SEGMENT or SEGMENT % block_size:
        raise ConfigError(
            "block_size_invalid",
            f"block_size = {block_size} cannot be used",
            why=f"it must divide the attention segment of {SEGMENT} positions",
            fix="use 16, 32, 64 or 128",
        )
    sizes = {"P": blocks, "B": block_size, "H": kv_heads, "d": head_dim}

    def pool(order: str, dtype: torch.dtype) -> Tensor:
        shape = [sizes[axis] for axis in order]
        memory = torch.zeros(shape, dtype=dtype, device=device) if brief else untouched(shape, dtype, device)
        return memory.permute([order.index(axis) for axis in "PBHd" if axis in order])

    def layer() -> KVLayer:
        k_PBHd, v_PBHd = (pool(order, dtype) for order in orders[:2])
        if dtype != torch.int8:
            return KVLayer(k_PBHd, v_PBHd)
        return KVLayer(k_PBHd, v_PBHd, *(pool(orders[2], torch.bfloat16) for _ in range(2)))

    return [layer() for _ in range(layers)]


def untouched(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU pages that the system makes when they are first written, so that a pool costs no time at start,
    and the memory of the blocks that were ever used."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def copy_layer_blocks(layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
    if not pairs or not layers:
        return
    source, target = torch.tensor(list(pairs), device=layers[0].k_PBHd.device).unbind(1)
    for layer in layers:
        for pool in layer.pools():
            pool[target] = pool[source]


def flat(pool_PBX: Tensor) -> Tensor:
    """A pool that is contiguous, by slot: [P B, ...]."""
    return pool_PBX.view(-1, *pool_PBX.shape[2:])
