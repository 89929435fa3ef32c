"""Arithmetic of one row, in fp32, whose bits depend on that row alone.

Every sum is ``sum`` over the last, contiguous axis, whose order torch fixes by the length of that axis. A library
matrix product is not used: its bits change with the number of threads and with the place of an output. All the
rest is elementwise and either exactly rounded (add, multiply, divide, square root) or one of exp and tanh, which
torch evaluates by the same code at every place of a vector; its sigmoid and silu are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.kernels.ops import Activation
from penstock.kernels.types import GroupedWeight, Weight, plain

ERF_END = 4.0
"""From here erf is 1 to within half a unit of fp32: erfc(4) = 1.5e-8."""
ERF_SERIES = [(-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(64)]
"""Of erf(x) = 2 / sqrt(pi) x sum of c[n] x^2n. Terms grow to 3e4 at ERF_END, so fp64 keeps 11 digits of the sum; the
first one left out is 1e-14."""


def matvec(x_K: Tensor, weight_NK: Weight, bias_N: Tensor | None, segments: int = 1) -> Tensor:
    """fp32 [N]. ``segments`` partial sums of K add along a binary tree, neighbours first."""
    if isinstance(weight_NK, GroupedWeight):
        parts_NS = grouped_sums(x_K, weight_NK, segments)
    else:
        products_NK = plain(weight_NK) * x_K.float()
        parts_NS = products_NK.view(len(products_NK), segments, -1).sum(-1)
    while parts_NS.shape[1] > 1:
        parts_NS = parts_NS[:, 0::2] + parts_NS[:, 1::2]
    out_N = parts_NS[:, 0]
    return out_N if bias_N is None else out_N + bias_N.float()


def grouped_sums(x_K: Tensor, weight_NK: GroupedWeight, segments: int) -> Tensor:
    """fp32 [N, segments]. Whole numbers are summed in fp64, which holds all of them; so does the product that a fused
    multiply-add rounds together with its sum."""
    codes_Gg, scales_G = coded(x_K.float(), weight_NK.group)
    weight_scales_NG, shape = weight_NK.scales_NG.float(), (len(weight_NK.scales_NG), segments, -1)
    products_NG = (weight_NK.codes_NK.double().view(-1, *codes_Gg.shape) * codes_Gg).sum(-1)
    terms = [(products_NG * (scales_G * weight_scales_NG).double()).view(shape)]
    if weight_NK.zeros_NG is not None:
        zeros_NG = weight_NK.zeros_NG * (weight_scales_NG / 16)
        terms.append((zeros_NG.double() * -(scales_G * codes_Gg.sum(-1).float()).double()).view(shape))
    sums_NS = torch.zeros(terms[0].shape[:2], dtype=torch.float32, device=x_K.device)
    for addends in zip(*(term_NSh.unbind(-1) for term_NSh in terms), strict=True):
        for addend_NS in addends:
            sums_NS = rounded_once(sums_NS.double(), addend_NS)
    return sums_NS


def rounded_once(a: Tensor, b: Tensor) -> Tensor:
    """a + b of fp64 in fp32. The fp64 sum is made odd where it is not exact, so that rounding it again loses nothing
    (Boldo and Melquiond 2008)."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)  # Knuth's exact error of the sum
    even = total.view(torch.int64) & 1 == 0
    odd = torch.nextafter(total, torch.copysign(torch.full_like(total, math.inf), lost))
    return torch.where(even & (lost != 0) & lost.isfinite(), odd, total).float()


def coded(x_K: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes, whole numbers in fp64 [G, group], and their fp32 scales [G]."""
    x_Gg = x_K.view(-1, group)
    most_G = x_Gg.abs().amax(-1)  # NaN where there is one
    finite_G, something_G = most_G.isfinite(), most_G >= 2.0**-100
    # A tensor on the left: torch divides a plain number by way of the reciprocal, which rounds twice.
    factor_G = torch.where(finite_G & something_G, torch.full_like(most_G, 127.0) / most_G, 0.0)
    codes_Gg = torch.where(finite_G.unsqueeze(-1), x_Gg * factor_G.unsqueeze(-1), 0.0).round().double()
    scales_G = torch.where(something_G, most_G / 127.0, 0.0)
    return codes_Gg, torch.where(finite_G, scales_G, math.nan)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis; fp32 in and out."""
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean + eps) * weight.float()


def layer_norm(x_D: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    centred_D = x_D - x_D.sum(-1, keepdim=True) / x_D.shape[-1]
    variance = (centred_D * centred_D).sum(-1, keepdim=True) / x_D.shape[-1]
    out_D = centred_D / torch.sqrt(variance + eps) * weight_D.float()
    return out_D if bias_D is None else out_D + bias_D.float()


def rotate(x_Xd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of each head's leading elements, as many as there are cosines and sines: element i of the
    first half of them turns with element i of the second half."""
    half = len(cos)
    a, b, rest = torch.split(x_Xd, [half, half, x_Xd.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def erf(x: Tensor) -> Tensor:
    """By its Maclaurin series in fp64, rounded once to fp32."""
    x_64 = x.double().clamp(-ERF_END, ERF_END)
    square, series = x_64 * x_64, torch.zeros_like(x_64)
    for coefficient in reversed(ERF_SERIES):
        series = series * square + coefficient
    return (2 / math.sqrt(math.pi) * x_64 * series).float()


def quantize(x_Hd: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [H, d] and their bfloat16 scales [H], as ``Ops.qk_norm_rope_write`` has it."""
    size_H1 = x_Hd.abs().amax(-1, keepdim=True) / 127
    scale_H1 = size_H1.bfloat16()
    codes_Hd = torch.round(x_Hd * (1 / scale_H1.float()))
    small_H1, finite_H1 = size_H1 < torch.finfo(torch.float32).tiny, size_H1.isfinite()
    codes_Hd = codes_Hd.masked_fill(small_H1 | ~finite_H1, 0)
    scale_H1 = scale_H1.masked_fill(small_H1, 0).masked_fill(~finite_H1, float("nan"))
    return codes_Hd.to(torch.int8), scale_H1.squeeze(-1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel 2016."""
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The same paper's tanh form; sqrt(2 / pi) = 0.79788..."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def gate_up(x_D: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
    """fp32 [F]."""
    gate_F, up_F = matvec(x_D, weight_2FD, bias_2F).chunk(2)
    if activation == "swiglu_clamped":
        gate_F, up_F = gate_F.clamp(max=7.0), up_F.clamp(-7.0, 7.0)
        return (up_F + 1) * (gate_F / (1 + torch.exp(-1.702 * gate_F)))
    return ACTIVATIONS[activation](gate_F) * up_F
