"""KV memory as every torch-based backend lays it out."""

from __future__ import annotations

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
) -> list[KVLayer]:
    """Zeros, not empty memory: an unwritten slot must not hold a NaN that some fast path multiplies by zero."""
    if not 0 < block_size <= SEGMENT or SEGMENT % block_size:
        raise ConfigError(
            "block_size_invalid",
            f"block_size = {block_size} cannot be used",
            why=f"it must divide the attention segment of {SEGMENT} positions",
            fix="use 16, 32, 64 or 128",
        )
    shape = (blocks, block_size, kv_heads, head_dim)

    def pool() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [KVLayer(pool(), pool()) for _ in range(layers)]


def copy_layer_blocks(layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
    if not pairs or not layers:
        return
    source, target = torch.tensor(list(pairs), device=layers[0].k_PBHd.device).unbind(1)
    for layer in layers:
        for pool_PBHd in (layer.k_PBHd, layer.v_PBHd):
            pool_PBHd[target] = pool_PBHd[source]


def flat(pool_PBHd: Tensor) -> Tensor:
    """The pool by slot: [P B, H, d]."""
    return pool_PBHd.flatten(0, 1)
