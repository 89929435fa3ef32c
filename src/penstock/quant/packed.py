"""Small integers in the layout of compressed-tensors: eight or four to an int32, the first in the lowest bits, each
moved up to be unsigned. A weight is scale * (code - zero).

Zeros are packed along the outputs. A scale of bfloat16 or fp32 becomes float16: exactly or nearly (2^-11), and no code
is changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from penstock.formats import Checkpoint
from penstock.kernels import GroupedWeight
from penstock.spec.quantization import GROUP, LARGER, OUTER_MODULES, Quantization

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def unpack(words_NW: Tensor, bits: int, inputs: int) -> Tensor:
    """uint8 [N, K] of int32 [N, W]; nothing of 8 bits is copied."""
    bytes_NB = words_NW.view(torch.uint8)
    if bits == 4:
        bytes_NB = torch.stack((bytes_NB & 15, bytes_NB >> 4), -1).flatten(1)
    return bytes_NB[:, :inputs]


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """int32 [N, W] of uint8 [N, K]; what is left of the last word is 0."""
    codes_NK = pad(codes_NK, (0, -codes_NK.shape[1] % (32 // bits)))
    if bits == 4:
        codes_NK = codes_NK[:, ::2] | codes_NK[:, 1::2] << 4
    # A single row may have any stride, which a view as other numbers does not allow.
    return codes_NK.flatten().view(torch.int32).view(len(codes_NK), -1)


def to_grouped(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> GroupedWeight:
    """4 bits in groups as they are stored, if kernels have them; of others scales are repeated for each 32 inputs.

    Args:
        codes_NK: uint8, 8 or 128 above the number that is meant; or int8, that number.
        scales_NG: G divides K by a multiple of 32.
        zeros_NG: uint8, moved up like 4-bit codes; None if they are 0.
    """
    if bits == 8:
        signed_NK = codes_NK if codes_NK.dtype == torch.int8 else (codes_NK ^ 128).view(torch.int8)
        return GroupedWeight(signed_NK, scales_NG.half()).in_groups(GROUP)
    zeros_NG = torch.full(scales_NG.shape, 8, dtype=torch.uint8) if zeros_NG is None else zeros_NG
    weight = GroupedWeight(codes_NK, scales_NG.half(), 16 * zeros_NG)
    return weight if weight.group in LARGER else weight.in_groups(GROUP)


def in_eight(weight: GroupedWeight) -> GroupedWeight:
    """The same numbers with 8-bit codes, in groups of 32; zeros are whole steps."""
    if weight.zeros_NG is None:
        return weight
    codes_NGg = weight.codes_NK.to(torch.int8).view(*weight.zeros_NG.shape, -1)
    codes_NK = (codes_NGg - (weight.zeros_NG // 16).to(torch.int8)[..., None]).flatten(-2)
    return GroupedWeight(codes_NK, weight.scales_NG).in_groups(GROUP)


def to_tensors(weight: GroupedWeight) -> dict[str, Tensor]:
    """A matrix as compressed-tensors names its parts; zeros are whole steps."""
    codes_NK = weight.codes_NK.view(torch.uint8)
    parts = {
        PACKED: pack(codes_NK if weight.bits == 4 else codes_NK ^ 128, weight.bits),
        SCALE: weight.scales_NG,
        SHAPE: torch.tensor(weight.shape),
    }
    if weight.zeros_NG is not None:
        parts[ZERO] = pack((weight.zeros_NG // 16).mT.contiguous(), 4).mT.contiguous()
    return parts


def stored_bits(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Bits of each module that has a matrix; those of numbers count as 16. Empty if there are no integers."""
    bits: dict[str, int] = {}
    for entry in map(checkpoint.entry, checkpoint.names):
        module, _, kind = entry.name.rpartition(".")
        if kind == PACKED and f"{module}.{SHAPE}" in checkpoint:
            inputs = int.from_bytes(checkpoint.view(f"{module}.{SHAPE}")[8:16], "little")
            bits[module] = 4 if entry.shape[-1] == -(-inputs // 8) else 8
        elif kind == "weight" and len(entry.shape) > 1 and not module.endswith(("gate", "router")):
            bits[module] = 8 if entry.dtype == "I8" else 16
    return bits if any(width < 16 for width in bits.values()) else {}


def recipe_of(bits: Mapping[str, int]) -> Quantization | None:
    """The leanest recipe that has no fewer bits for any module; None if some stay numbers."""
    if max(bits.values()) == 16:
        return None
    inner = [width for module, width in bits.items() if not module.endswith(OUTER_MODULES)]
    return "int8" if max(inner, default=8) == 8 else "int4"
