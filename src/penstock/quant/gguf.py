"""GGML's block formats (ggml-org/ggml, ggml-quants.c): to fp32 as ggml decodes them, and to ``GroupedWeight``.

A block's numbers are scale * code + offset, with a scale (and an offset) for 16 or 32 neighbours. What becomes of them:

    Q8_0, Q4_0, Q5_0     the same numbers
    Q4_1, Q4_K           4 bits; the scale is rounded to float16 and the offset to a sixteenth of a step: at most
                         0.04 steps off. A group with no 0 in its range (all its numbers of one sign) may not have
                         such an offset; it is quantized anew, half a step off
    Q5_1, Q5_K, Q6_K     8 bits, each 32 neighbours quantized anew: off by at most their largest / 250

float16 has no scale finer than 2^-24. Steps below 2^-14 (6.1e-5) cost up to 15 * 2^-25 (5e-7) more in 4 bits, and 32
neighbours below 0.001 are up to 127 * 2^-25 (4e-6) off in 8, all of it if they are so small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.formats import Checkpoint
from penstock.kernels import GroupedWeight
from penstock.spec.quantization import Quantization

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUP = 32
"""Neighbours that share a scale in every GroupedWeight made here."""


class Affine(NamedTuple):
    """Blocks as scale * code + offset.

    Attributes:
        codes_XE: int16, E elements in each of X blocks.
        scales_XG: fp32, for E / G neighbours each; so are the offsets, or None where they are 0.
    """

    codes_XE: Tensor
    scales_XG: Tensor
    offsets_XG: Tensor | None = None


def gguf_recipe(checkpoint: Checkpoint) -> Quantization | None:
    """The widest of a file's integers; None if some matrices are numbers."""
    kinds = {entry.dtype for entry in map(checkpoint.entry, checkpoint.names) if len(entry.shape) > 1}
    if not kinds <= BITS.keys():
        return None
    return "int8" if max(BITS[kind] for kind in kinds) == 8 else "int4"


def decode_rows(data_RB: Tensor, kind: str) -> Tensor:
    """Rows of a tensor as numbers [R, K]: fp32, or as they are stored.

    Args:
        data_RB: uint8, the bytes of each row.
        kind: the type's name, of FLOATS or BITS.
    """
    if kind in FLOATS:
        return data_RB.view(FLOATS[kind])
    return _numbers(_affine(data_RB, kind)).view(len(data_RB), -1)


def group_rows(data_RB: Tensor, kind: str, bits: int) -> GroupedWeight:
    """Rows of a tensor as small integers, [R, K]. Scales that float16 cannot hold come out infinite or NaN.

    Args:
        kind: one of BITS.
        bits: 8, or 4 for a kind of 4.
    """
    blocks, rows = _affine(data_RB, kind), len(data_RB)
    if bits == 4:
        parts = _with_zeros(blocks, signed=kind == "Q4_0")
        codes_NK, scales_NG, zeros_NG = (x.view(rows, -1) for x in parts)
        return GroupedWeight(codes_NK, scales_NG, zeros_NG)
    exact = blocks.offsets_XG is None and blocks.scales_XG.shape[1] == 1 and int(blocks.codes_XE.min()) >= -127
    codes, scales = (blocks.codes_XE, blocks.scales_XG) if exact else _symmetric(_numbers(blocks).view(-1, GROUP))
    return GroupedWeight(codes.to(torch.int8).view(rows, -1), scales.half().view(rows, -1))


AT_ONCE = 1 << 20
"""Numbers decoded at once: a few fp32 copies of them are in memory."""


def _numbers(blocks: Affine) -> Tensor:
    """fp32 [X, E], with ggml's two roundings: of the product, and of the sum."""
    values_XGg = blocks.codes_XE.float().view(*blocks.scales_XG.shape, -1) * blocks.scales_XG.unsqueeze(2)
    if blocks.offsets_XG is not None:
        values_XGg += blocks.offsets_XG.unsqueeze(2)
    return values_XGg.flatten(1)


def _with_zeros(blocks: Affine, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, zeros of 4 bits; groups of 32 one below the other."""
    codes_G32 = blocks.codes_XE.view(-1, GROUP) + 8 * signed
    scales_G1 = blocks.scales_XG.half().view(-1, 1)
    if blocks.offsets_XG is None:
        return codes_G32.to(torch.uint8), scales_G1, torch.full_like(scales_G1, 16 * 8, dtype=torch.uint8)
    zeros_G1 = (-16 * blocks.offsets_XG.view(-1, 1) / scales_G1.float()).round()
    anew = ~((zeros_G1 >= 0) & (zeros_G1 <= 255)).flatten()
    if anew.any():
        codes_G32, zeros_G1 = codes_G32.float(), zeros_G1.clone()
        codes_G32[anew], scales_G1[anew], zeros_G1[anew] = _asymmetric(_numbers(blocks).view(-1, GROUP)[anew])
    return codes_G32.to(torch.uint8), scales_G1, zeros_G1.to(torch.uint8)


def _asymmetric(values_G32: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The range from lowest to highest, 0 included, in 15 steps."""
    low_G1, high_G1 = values_G32.amin(1, True).clamp(max=0), values_G32.amax(1, True).clamp(min=0)
    scales_G1 = ((high_G1 - low_G1) / 15).half()
    steps_G1 = scales_G1.float().masked_fill(scales_G1 == 0, torch.inf)
    zeros_G1 = (-16 * low_G1 / steps_G1).round().clamp(0, 255)
    return (values_G32 / steps_G1 + zeros_G1 / 16).round().clamp(0, 15), scales_G1, zeros_G1


def _symmetric(values_G32: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -127 to 127, and scales, in fp32 and as float16 holds them."""
    scales_G1 = (values_G32.abs().amax(1, True) / 127).half().float()
    codes_G32 = values_G32 / scales_G1.masked_fill(scales_G1 == 0, torch.inf)
    return codes_G32.round().clamp(-127, 127), scales_G1


def _affine(data_RB: Tensor, kind: str) -> Affine:
    read, size = _READERS[kind]
    return read(data_RB.reshape(-1, size))


def _half(bytes_X2: Tensor) -> Tensor:
    return bytes_X2.contiguous().view(torch.float16).float()


def _nibbles(bytes_XB: Tensor) -> Tensor:
    """[X, 2 B]: the low ones, then the high ones."""
    return torch.cat((bytes_XB & 15, bytes_XB >> 4), 1).short()


def _bits(bytes_XB: Tensor) -> Tensor:
    """[X, 8 B], the lowest bit of a byte first."""
    return ((bytes_XB.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1).short()


def _q4_0(data_XB: Tensor) -> Affine:
    return Affine(_nibbles(data_XB[:, 2:]) - 8, _half(data_XB[:, :2]))


def _q4_1(data_XB: Tensor) -> Affine:
    return Affine(_nibbles(data_XB[:, 4:]), _half(data_XB[:, :2]), _half(data_XB[:, 2:4]))


def _q5_0(data_XB: Tensor) -> Affine:
    return Affine(_nibbles(data_XB[:, 6:]) + 16 * _bits(data_XB[:, 2:6]) - 16, _half(data_XB[:, :2]))


def _q5_1(data_XB: Tensor) -> Affine:
    codes_XE = _nibbles(data_XB[:, 8:]) + 16 * _bits(data_XB[:, 4:8])
    return Affine(codes_XE, _half(data_XB[:, :2]), _half(data_XB[:, 2:4]))


def _q8_0(data_XB: Tensor) -> Affine:
    return Affine(data_XB[:, 2:].view(torch.int8).short(), _half(data_XB[:, :2]))


def _q4_k(data_XB: Tensor) -> Affine:
    codes_XE = _nibbles(data_XB[:, 16:].reshape(-1, 32)).view(len(data_XB), 256)
    return Affine(codes_XE, *_scales_and_minima(data_XB))


def _q5_k(data_XB: Tensor) -> Affine:
    codes_X8_32 = _nibbles(data_XB[:, 48:].reshape(-1, 32)).view(-1, 8, 32)
    fifth_X8_32 = (data_XB[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return Affine((codes_X8_32 + 16 * fifth_X8_32.short()).flatten(1), *_scales_and_minima(data_XB))


def _q6_k(data_XB: Tensor) -> Affine:
    low_X2_4_32 = _nibbles(data_XB[:, :128].reshape(-1, 64)).view(-1, 2, 4, 32)
    shifts_4_1 = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high_X2_4_32 = (data_XB[:, 128:192].view(-1, 2, 1, 32) >> shifts_4_1) & 3
    scales_XG = _half(data_XB[:, 208:]) * data_XB[:, 192:208].view(torch.int8).float()
    return Affine((low_X2_4_32 + 16 * high_X2_4_32.short()).flatten(1) - 32, scales_XG)


def _scales_and_minima(data_XB: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each, of six bits in twelve bytes, times the block's own two factors; minima are taken off."""
    low_X4, mid_X4, high_X4 = torch.split(data_XB[:, 4:16], 4, 1)
    scales_X8 = torch.cat((low_X4 & 63, (high_X4 & 15) | (low_X4 >> 6 << 4)), 1)
    minima_X8 = torch.cat((mid_X4 & 63, (high_X4 >> 4) | (mid_X4 >> 6 << 4)), 1)
    return _half(data_XB[:, :2]) * scales_X8.float(), -(_half(data_XB[:, 2:4]) * minima_X8.float())


_READERS: dict[str, tuple[Callable[[Tensor], Affine], int]] = {
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q8_0": (_q8_0, 34),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
}
"""How each kind is read, and the bytes of a block."""
BITS = {kind: 4 if kind.startswith("Q4") else 8 for kind in _READERS}
"""Block formats that are read, and the bits of the GroupedWeight that they become."""
