"""Products with weights, and the row tiles in which elementwise work is done."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MATRIX_UNIT = torch.cpu._is_amx_tile_supported()
FEW_ROWS = 64
"""Up to so many rows, bf16 weights go on the left where the processor has AMX: W x^T needs no repacking of W, which
costs more than the sum itself. For K = 1,024 and N = 6,144 on one thread, 32 rows take 1.26 ms instead of 1.51, 8 rows
1.02 instead of 1.38; at 128 rows the transposed output costs what the packing did, and without AMX it is a loss."""
LOGITS_AT_ONCE = 8192
"""Vocabulary entries of one product of few rows: their logits are transposed and widened while still in cache (for
32 rows of 151,936 logits 46 ms become 34)."""
TILE = 1 << 17
"""fp32 elements of one tile for each thread, 512 KiB: a chain of elementwise operations stays in the core's own cache
and its temporaries are not pages fetched from the system each time. RMSNorm of 2,048 rows of 1,024: 11 ms become 1.5;
QK-norm with rope of 24 heads of 128: 48 ms become 10."""


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + bias, rounded once; rows are contiguous."""
    if few_rows(x_TK):
        return left_product(x_TK, weight_NK, bias_N).t().contiguous()
    return F.linear(x_TK, weight_NK, bias_N)


def few_rows(x_TK: Tensor) -> bool:
    return MATRIX_UNIT and 1 < len(x_TK) <= FEW_ROWS and x_TK.dtype == torch.bfloat16 and not x_TK.is_cuda


def left_product(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """W x^T + bias, rounded once: [N, T]."""
    if bias_N is None:
        return torch.mm(weight_NK, x_TK.t())
    return torch.addmm(bias_N.unsqueeze(1), weight_NK, x_TK.t())


def product(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T in fp32. On a CPU the library has no bf16 x bf16 -> fp32 product: there the sum is rounded once."""
    if x_TK.is_cuda and x_TK.dtype != torch.float32:
        return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)
    if not few_rows(x_TK):
        return F.linear(x_TK, weight_NK).float()
    out_TN = torch.empty(len(x_TK), len(weight_NK))
    for out_Tn, weight_nK in zip(
        torch.split(out_TN, LOGITS_AT_ONCE, 1), torch.split(weight_NK, LOGITS_AT_ONCE), strict=True
    ):
        out_Tn.copy_(left_product(x_TK, weight_nK, None).t())
    return out_TN


def tiles(x_TX: Tensor) -> Iterator[slice]:
    """Rows to be worked on together; all at once where caches are not the matter."""
    rows = max(1, len(x_TX))
    step = rows if x_TX.is_cuda else max(1, TILE * torch.get_num_threads() * rows // max(1, x_TX.numel()))
    for start in range(0, len(x_TX), step):
        yield slice(start, start + step)


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis, in place; fp32."""
    return x.mul_(x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
