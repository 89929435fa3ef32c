"""Plain weights to small integers with a scale for each group of inputs (kernels.types.GroupedWeight)."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.base import ModelFormatError
from penstock.kernels import GroupedWeight

AT_ONCE = 1 << 18
"""Numbers worked on together: what is made of them stays in a cache."""

STEPS = tuple(range(127, 119, -1))
"""Steps between 0 and a group's greatest size that 8-bit codes are tried with: each rounds the other numbers otherwise,
and of eight tries the best leaves a sixth less squared error than the first."""

SPANS = tuple((25 - step) / 24 for step in range(8))
"""Parts of a group's range that 4-bit codes are tried to span: a finer step for most, a cut for the farthest."""

REFITS = 2
"""Turns in which the best of them gets a new scale for its codes, and new codes for that scale."""


def quantize(weight: Tensor, bits: int, group: int) -> GroupedWeight:
    """The codes nearest to a plain weight [..., N, K]; K is a multiple of ``group``.

    The one with the least squared error is kept: with 8 bits of several scales near the group's greatest size over 127;
    with 4 of several spans around the group's middle, which give a whole zero and codes, to which the scale is fitted
    by least squares. Zeros are whole steps, so that the formats of others hold them too. Sums have an order of their
    own: the same weights become the same integers on every processor.

    Args:
        group: a power of two.

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
    most_G1, best = w_Gg.abs().amax(-1, keepdim=True), list[Tensor]()
    for steps in STEPS:
        scale_G1 = (most_G1 / steps).half()
        codes_Gg = _steps(w_Gg, scale_G1).round_().clamp_(-127, 127)
        best = _better(best, w_Gg, codes_Gg, codes_Gg, scale_G1)
    _, codes_Gg, scale_G1 = best
    return codes_Gg, scale_G1.flatten()


def _four(w_Gg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low_G1, high_G1 = w_Gg.amin(-1, keepdim=True).clamp(max=0), w_Gg.amax(-1, keepdim=True).clamp(min=0)
    best = list[Tensor]()
    for span in SPANS:
        scale_G1 = (high_G1 - low_G1) * (span / 15)
        zero_G1 = (7.5 - _steps((low_G1 + high_G1) / 2, scale_G1)).round_().clamp_(0, 15)
        best = _fitted(best, w_Gg, scale_G1, zero_G1)
    for _ in range(REFITS):
        best = _fitted(best, w_Gg, *best[2:])
    _, codes_Gg, scale_G1, zero_G1 = best
    return codes_Gg, scale_G1.flatten(), 16 * zero_G1.flatten()


def _fitted(best: list[Tensor], w_Gg: Tensor, scale_G1: Tensor, zero_G1: Tensor) -> list[Tensor]:
    """``best``, or codes for this scale, the scale that fits them best, and the codes for that one."""
    from_zero_Gg = _codes(w_Gg, scale_G1.half(), zero_G1) - zero_G1
    square_G1 = _total(from_zero_Gg.square())
    slope_G1 = _total(w_Gg * from_zero_Gg) / square_G1
    scale_G1 = torch.where(square_G1 > 0, slope_G1, scale_G1.float()).half()
    codes_Gg = _codes(w_Gg, scale_G1, zero_G1)
    return _better(best, w_Gg, codes_Gg - zero_G1, codes_Gg, scale_G1, zero_G1)


def _better(best: list[Tensor], w_Gg: Tensor, steps_Gg: Tensor, *tried: Tensor) -> list[Tensor]:
    """Squared error and what was tried of each group; the earlier one where it is no worse."""
    error_G1 = _total((steps_Gg * tried[1].float() - w_Gg).square_())
    if not best:
        return [error_G1, *tried]
    better_G1 = error_G1 < best[0]
    return [torch.where(better_G1, new, old) for new, old in zip((error_G1, *tried), best, strict=True)]


def _total(x_Gg: Tensor) -> Tensor:
    """Sums of groups [G, 1], along a binary tree, neighbours first."""
    while x_Gg.shape[-1] > 1:
        x_Gg = x_Gg[:, 0::2] + x_Gg[:, 1::2]
    return x_Gg


def _codes(w_Gg: Tensor, scale_G1: Tensor, zero_G1: Tensor) -> Tensor:
    return (_steps(w_Gg, scale_G1) + zero_G1).round_().clamp_(0, 15)


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
