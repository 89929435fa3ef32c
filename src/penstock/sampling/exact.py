"""Elementary functions with the same bits everywhere: any number of rows or threads, any device.

Library ``exp`` and ``log`` use one routine for whole vectors and another for their tails, and library sums split
by thread, so their last bits depend on what else is in the tensor. Here everything is float64 additions,
multiplications and divisions, each an operation of its own (so none is fused), all rounded as IEEE 754 demands;
sums follow trees that depend on the length alone (ONE_ANSWER rules 4 and 12).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2_HIGH = 0.693147180369123816490  # ln 2 = HIGH + LOW; HIGH ends in zeros, so that n * HIGH is exact (fdlibm)
LN2_LOW = 1.90821492927058770002e-10
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(13, -1, -1))
LOG_TERMS = tuple(1.0 / k for k in range(21, 0, -2))


PANEL = 1 << 15
"""Numbers worked on together, so that they stay in a cache between operations."""


def exp(x: Tensor) -> Tensor:
    """e to the x for float64 x <= 0, within 2 ulp; 0 below -700 and for NaN."""
    if x.numel() <= PANEL:
        return _exp(x)
    flat = x.flatten()
    return torch.cat([_exp(flat[start : start + PANEL]) for start in range(0, len(flat), PANEL)]).view(x.shape)


def _exp(x: Tensor) -> Tensor:
    # x = n ln 2 + r with |r| <= ln 2 / 2, then Taylor's series in r, then n is added to the exponent.
    live = x >= -700.0
    x = torch.where(live, x, 0.0)
    n = (x * (1.0 / math.log(2.0))).round_()
    r = x.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)
    series = r * EXP_TERMS[0]
    for term in EXP_TERMS[1:-1]:
        series.add_(term).mul_(r)
    series.add_(EXP_TERMS[-1])
    return series.mul_((n.long().add_(1023) << 52).view(torch.float64)).mul_(live)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 numbers, within 2 ulp."""
    # x = m * 2^e with m in [sqrt(1/2), sqrt 2); ln m = 2 artanh((m - 1) / (m + 1)).
    m, e = torch.frexp(x)
    low = m < math.sqrt(0.5)
    m = torch.where(low, m + m, m)
    n = (e - low.to(e.dtype)).to(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * LOG_TERMS[0]
    for term in LOG_TERMS[1:-1]:
        series = (series + term) * z
    half = s + s * series
    return n * LN2_HIGH + (half + half + n * LN2_LOW)


def tree_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension along a binary tree fixed by its length: (..., K) -> (...)."""
    width = 1 << max(0, x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x.squeeze(-1)


def prefix_sum(x: Tensor) -> Tensor:
    """Inclusive sums along the last dimension (Hillis and Steele 1986); entry i depends on entries 0 .. i alone."""
    shift = 1
    while shift < x.shape[-1]:
        x = torch.cat([x[..., :shift], x[..., shift:] + x[..., :-shift]], dim=-1)
        shift *= 2
    return x
