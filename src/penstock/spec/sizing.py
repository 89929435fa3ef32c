"""Bytes of weights, KV and activations: the one formula that runtime, `show` and the simulator share."""

from __future__ import annotations

from math import prod

from penstock.spec.model import DTYPE_BYTES, Dtype, KVGroup, ModelSpec
from penstock.spec.tensors import checkpoint_tensors, layer_tensors


def parameters(spec: ModelSpec) -> int:
    """Numbers in the checkpoint; a tied head counts once."""
    return sum(map(prod, checkpoint_tensors(spec).values()))


def layer_parameters(spec: ModelSpec) -> int:
    """Numbers in one layer, all of which one token's forward pass reads."""
    return sum(map(prod, layer_tensors(spec).values()))


def weight_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Resident weights, and the rope tables (fp32 cos and sin of every position)."""
    return parameters(spec) * DTYPE_BYTES[dtype] + spec.max_positions * spec.head_dim * 4


def kv_block_bytes(group: KVGroup, block_size: int, dtype: Dtype) -> int:
    """One block of a group: K and V of ``block_size`` tokens in all the group's layers."""
    return block_size * group.bytes_per_token(dtype)


def kv_bytes_per_token(spec: ModelSpec, dtype: Dtype) -> int:
    """K and V of one token in all layers, while no window has dropped it."""
    return sum(group.bytes_per_token(dtype) for group in spec.kv_groups())


def kv_request_blocks(group: KVGroup, tokens: int, block_size: int) -> int:
    """Blocks of a group that a request of ``tokens`` tokens holds: in a window group only those it still sees.

    A window can straddle one block more than it fills.
    """
    blocks = -(-tokens // block_size)
    return blocks if group.window is None else min(blocks, -(-group.window // block_size) + 1)


def kv_request_bytes(spec: ModelSpec, tokens: int, block_size: int, dtype: Dtype) -> int:
    """KV that a request of ``tokens`` tokens holds in all groups."""
    return sum(
        kv_request_blocks(group, tokens, block_size) * kv_block_bytes(group, block_size, dtype)
        for group in spec.kv_groups()
    )


def activation_bytes(spec: ModelSpec, tokens: int, logit_rows: int, dtype: Dtype) -> int:
    """Peak of one step of ``tokens`` rows: residual, normed input, the widest layer's input and outputs in
    fp32 and as stored, and two fp32 copies of the logits of ``logit_rows`` rows."""
    widest = max(spec.q_size + 2 * spec.kv_size, 3 * spec.ffn)
    row = 2 * spec.hidden * DTYPE_BYTES[dtype] + widest * (4 + DTYPE_BYTES[dtype])
    return tokens * row + 2 * logit_rows * spec.vocab_size * 4
