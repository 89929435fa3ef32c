"""Plain weights to small integers with a scale for each group of inputs (kernels.types.GroupedWeight)."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.base import ModelFormatError
from penstock.kernels import GroupedWeight

AT_ONCE = 1 << 18
"""Numbers worked on together: what is made of them stays in a cache."""

SHRINKS = tuple(1 - step / 32 for step in range(12))
"""Shares of a group's range that 4-bit codes are tried to span: a finer step for most, a cut for the farthest."""


def quantize(weight: Tensor, bits: int, group: int) -> GroupedWeight:
    """The codes nearest to a plain weight [..., N, K]; K is a multiple of ``group``.

    8 bits: the scale is the group's greatest size over 127. 4 bits: several spans around the group's middle give
    codes, to which scale and zero are fitted by least squares; the one with the least squared error is kept. Sums have
    an order of their own: the same weights become the same integers on every processor.

    Args:
        group: with 4 bits a power of two.

    Raises:
        ModelFormatError: (weights_too_large).
    """
    *rows, inputs = weight.shape
    codes_XK = torch.empty(weight.shape, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales_XG = torch.empty(*rows, inputs // group, dtype=torch.float16)
    zeros_XG = None if bits == 8 else torch.empty(scales_XG.shape, dtype=torch.uint8)
    outs = [codes_XK.view(-1, group), scales_XG.view(-1), *(() if zeros_XG is None else (zeros_XG.view(-1),))]
    pieces = [torch.split(tensor, AT_ONCE // group) for tensor in (weight.reshape(-1, group), *outs)]
    for source_Gg, *targets in zip(*pieces, strict=True):
        coded = _eight(source_Gg.float()) if bits == 8 else _four(source_Gg.float())
        for target, made in zip(targets, coded, strict=True):
            target.copy_(made)
    grouped = GroupedWeight(codes_XK, scales_XG, zeros_XG)
    check_scales(weight, grouped)
    return grouped


def check_scales(weight: Tensor, grouped: GroupedWeight) -> None:
    """Raises ModelFormatError: (weights_too_large) the scales of a weight are beyond fp16."""
    if not grouped.scales_NG.isfinite().all():
        raise ModelFormatError(
            "weights_too_large",
            "The weights cannot become small integers",
            why=f"one of them is {float(weight.abs().max()):.3g}, and fp16 scales end at 65504",
            fix="load the model without --quant",
        )


def _eight(w_Gg: Tensor) -> tuple[Tensor, Tensor]:
    scale_G1 = (w_Gg.abs().amax(-1, keepdim=True) / 127).half()
    return _steps(w_Gg, scale_G1).round_().clamp_(-127, 127), scale_G1.flatten()


def _four(w_Gg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low_G1, high_G1 = w_Gg.amin(-1, keepdim=True).clamp(max=0), w_Gg.amax(-1, keepdim=True).clamp(min=0)
    middle_G1, span_G1 = (low_G1 + high_G1) / 2, high_G1 - low_G1
    best: list[Tensor] = []
    for shrink in SHRINKS:
        scale_G1 = span_G1 * (shrink / 15)
        codes_Gg = _codes(w_Gg, *_stored(scale_G1, middle_G1 - span_G1 * (shrink / 2)))
        tried = [*_stored(*_fit(w_Gg, codes_Gg, scale_G1))]
        codes_Gg = _codes(w_Gg, *tried)
        error_Gg = (_value(codes_Gg, *tried) - w_Gg).square_()
        error_G1 = _total(error_Gg)
        tried = [error_G1, codes_Gg, *tried]
        better_G1 = error_G1 < best[0] if best else None
        best = tried if better_G1 is None else [torch.where(better_G1, a, b) for a, b in zip(tried, best, strict=True)]
    _, codes_Gg, scale_G1, zero_G1 = best
    return codes_Gg, scale_G1.flatten(), zero_G1.flatten()


def _fit(w_Gg: Tensor, codes_Gg: Tensor, scale_G1: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and lowest value of the straight line from codes to weights, by least squares."""
    group = w_Gg.shape[-1]
    mean_w_G1, mean_code_G1 = _total(w_Gg) / group, _total(codes_Gg) / group
    spread_Gg = codes_Gg - mean_code_G1
    variance_G1 = _total(spread_Gg.square())
    slope_G1 = _total(spread_Gg * (w_Gg - mean_w_G1)) / variance_G1
    slope_G1 = torch.where((variance_G1 > 0) & (slope_G1 > 0), slope_G1, scale_G1)
    return slope_G1, mean_w_G1 - slope_G1 * mean_code_G1


def _total(x_Gg: Tensor) -> Tensor:
    """Sums of groups [G, 1], along a binary tree, neighbours first."""
    while x_Gg.shape[-1] > 1:
        x_Gg = x_Gg[:, 0::2] + x_Gg[:, 1::2]
    return x_Gg


def _stored(scale_G1: Tensor, lowest_G1: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero as they are kept: fp16, and whole sixteenths of a step."""
    scale_G1 = scale_G1.half()
    return scale_G1, _steps(-16 * lowest_G1, scale_G1).round_().clamp_(0, 255)


def _codes(w_Gg: Tensor, scale_G1: Tensor, zero_G1: Tensor) -> Tensor:
    return (_steps(w_Gg, scale_G1) + zero_G1 / 16).round_().clamp_(0, 15)


def _value(codes_Gg: Tensor, scale_G1: Tensor, zero_G1: Tensor) -> Tensor:
    return (codes_Gg - zero_G1 / 16) * scale_G1.float()


def _steps(x: Tensor, scale_G1: Tensor) -> Tensor:
    """x / scale; 0 where there is no scale."""
    scale_G1 = scale_G1.float()
    return x * torch.where(scale_G1 > 0, 1 / scale_G1, 0)


def widen(weight: GroupedWeight, out_NK: Tensor) -> Tensor:
    """Writes the numbers of a grouped weight, rounded to the dtype of ``out_NK``; some rows after the other, so that
    little is held beside them."""
    rows_XK, targets_XK = weight.stacked(1), out_NK.view(-1, 1, out_NK.shape[-1])
    step = max(1, AT_ONCE // out_NK.shape[-1])
    for start in range(0, len(targets_XK), step):
        rows = slice(start, start + step)
        targets_XK[rows] = rows_XK[rows].widened()
    return out_NK
