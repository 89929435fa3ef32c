"""MXFP4 (OCP Microscaling Formats 1.0, 2023): blocks of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes: sign, two bits of exponent, one of mantissa."""
E8M0 = (*(2.0 ** (code - 127) for code in range(255)), math.nan)
"""Values of the 256 scales; the last code is the format's NaN."""


def decode_mxfp4(blocks_XRG16: Tensor, scales_XRG: Tensor, dtype: torch.dtype) -> Tensor:
    """[X, R, 32 G] in ``dtype``, rounded once (bfloat16 holds every value exactly).

    Args:
        blocks_XRG16: uint8, two codes each, the low nibble first, as gpt-oss's ``*_blocks`` (experts, rows, blocks).
        scales_XRG: uint8, one for each block, as its ``*_scales``.

    One expert at a time, so that what is held beside the result is small.
    """
    pairs_256_2 = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)])
    powers_256 = torch.tensor(E8M0)
    experts, rows, groups, _ = blocks_XRG16.shape
    out_XRK = torch.empty(experts, rows, groups * 32, dtype=dtype, device=blocks_XRG16.device)
    pairs_256_2, powers_256 = pairs_256_2.to(out_XRK.device), powers_256.to(out_XRK.device)
    for out_RK, blocks_RG16, scales_RG in zip(out_XRK, blocks_XRG16, scales_XRG, strict=True):
        values_RG32 = pairs_256_2[blocks_RG16.int()].flatten(2)
        out_RK.copy_((values_RG32 * powers_256[scales_RG.int()].unsqueeze(2)).flatten(1))
    return out_XRK
