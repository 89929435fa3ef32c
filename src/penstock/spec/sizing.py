"""Bytes of weights, KV and activations: the one formula that runtime, `show` and the simulator share."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from penstock.spec.config import EngineConfig
from penstock.spec.model import DTYPE_BYTES, Dtype, KVDtype, KVGroup, ModelSpec
from penstock.spec.quantization import Quantization, format_of
from penstock.spec.tensors import checkpoint_tensors, layer_slots, model_slots, slot_inputs


def parameters(spec: ModelSpec) -> int:
    """Numbers in the checkpoint; a tied head counts once, a packed number as one."""
    return sum(map(prod, checkpoint_tensors(_unpacked(spec)).values()))


def active_parameters(spec: ModelSpec) -> int:
    """Those of them that one token's forward pass uses: of the experts, the chosen ones."""
    moe = spec.moe
    if moe is None:
        return parameters(spec)
    in_experts = sum(
        prod(shape)
        for layer in range(spec.layers)
        for slot, tensors in layer_slots(_unpacked(spec), layer).items()
        for shape in tensors.values()
        if slot.startswith("experts.")
    )
    return parameters(spec) - in_experts // moe.experts * (moe.experts - moe.active)


def weight_bytes(spec: ModelSpec, dtype: Dtype, quantization: Quantization = "none") -> int:
    """Resident weights, attention's sinks and those of norms with an offset in fp32, and the rope tables (fp32 cos and
    sin of every position) or slopes."""
    ropes = {rope for layer in range(spec.layers) if (rope := spec.rope_of(layer))}
    tables = sum(spec.max_positions * (rope.dims or spec.head_dim) * 4 for rope in ropes)
    slopes = 0 if spec.alibi is None else spec.heads * 4
    widened = _wide_parameters(spec) * (4 - DTYPE_BYTES[dtype])
    plain = parameters(spec) * DTYPE_BYTES[dtype] + widened + tables + slopes
    return plain if quantization == "none" else plain - _saved_bytes(_unpacked(spec), DTYPE_BYTES[dtype], quantization)


def _saved_bytes(spec: ModelSpec, dtype_bytes: int, quantization: Quantization) -> int:
    """How much smaller the matrices become that do not stay plain."""
    saved = 0
    for slots in (model_slots(spec), *(layer_slots(spec, layer) for layer in range(spec.layers))):
        for slot, tensors in slots.items():
            for shape in tensors.values():
                inputs = slot_inputs(spec, slot, shape)
                if len(shape) > 1 and (found := format_of(spec, slot, inputs, quantization)):
                    saved += prod(shape) * dtype_bytes - found.bytes(prod(shape) // inputs, inputs)
    return saved


def _unpacked(spec: ModelSpec) -> ModelSpec:
    return spec if spec.moe is None else replace(spec, moe=replace(spec.moe, packed=False))


def _wide_parameters(spec: ModelSpec) -> int:
    def wide(slot: str) -> bool:
        return slot == "sinks" or (spec.norm_offset != 0 and ("norm" in slot or "_after" in slot))

    slots = [model_slots(spec), *(layer_slots(spec, layer) for layer in range(spec.layers))]
    found = [tensors for of_one in slots for slot, tensors in of_one.items() if wide(slot)]
    return sum(prod(shape) for tensors in found for shape in tensors.values())


def kv_dtype_of(config: EngineConfig, dtype: Dtype) -> KVDtype:
    """As what K and V of a model that computes in ``dtype`` are stored."""
    return dtype if config.kv_dtype == "auto" else config.kv_dtype


def kv_block_bytes(group: KVGroup, block_size: int, dtype: KVDtype) -> int:
    """One block of a group: K and V of ``block_size`` tokens in all the group's layers."""
    return block_size * group.bytes_per_token(dtype)


def kv_bytes_per_token(spec: ModelSpec, dtype: KVDtype) -> int:
    """K and V of one token in all layers, while no window has dropped it."""
    return sum(group.bytes_per_token(dtype) for group in spec.kv_groups())


def kv_request_blocks(group: KVGroup, tokens: int, block_size: int) -> int:
    """Blocks of a group that a request of ``tokens`` tokens holds: in a window group only those it still sees.

    A window can straddle one block more than it fills.
    """
    blocks = -(-tokens // block_size)
    return blocks if group.window is None else min(blocks, -(-group.window // block_size) + 1)


def kv_request_bytes(spec: ModelSpec, tokens: int, block_size: int, dtype: KVDtype) -> int:
    """KV that a request of ``tokens`` tokens holds in all groups."""
    return sum(
        kv_request_blocks(group, tokens, block_size) * kv_block_bytes(group, block_size, dtype)
        for group in spec.kv_groups()
    )


def activation_bytes(spec: ModelSpec, tokens: int, logit_rows: int, dtype: Dtype) -> int:
    """Peak of one step of ``tokens`` rows: residual, normed input, the widest layer's input and outputs in
    fp32 and as stored, and two fp32 copies of the logits of ``logit_rows`` rows."""
    widest = max(spec.q_size + 2 * spec.kv_size, 3 * spec.ffn)
    if spec.moe is not None:  # each chosen expert's gate, up, product and output, beside the shared one's
        widest = max(widest, spec.moe.active * (3 * spec.moe.ffn + spec.hidden) + 3 * spec.moe.shared_ffn)
    row = 2 * spec.hidden * DTYPE_BYTES[dtype] + widest * (4 + DTYPE_BYTES[dtype])
    return tokens * row + 2 * logit_rows * spec.vocab_size * 4
