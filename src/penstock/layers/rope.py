"""Rotary position embedding (Su et al. 2021), resolved at load into a table over absolute positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.layers.placement import Placement
from penstock.spec import RopeSpec

POSITIONS_AT_ONCE = 64
"""Rows of the table computed by one call. Fixed, so that a row's bits depend neither on the table's length nor
on the number of threads."""


def rope_table(rope: RopeSpec, head_dim: int, positions: int, placement: Placement) -> Tensor:
    """fp32 [positions, head_dim]: the cosines of the d/2 angles of a position, then their sines.

    Angles are products of fp32 numbers, as the models were trained with; at position 100,000 an exact angle
    would differ by up to 4e-3. The functions of it are evaluated in fp64 and rounded once.
    """
    inverse = inverse_frequencies(rope, head_dim)
    table_Pd = torch.empty(positions, head_dim)
    for start in range(0, positions, POSITIONS_AT_ONCE):
        at = torch.arange(start, start + POSITIONS_AT_ONCE, dtype=torch.float32)
        angles = (at[:, None] * inverse).double()
        rows_Pd = torch.cat((angles.cos(), angles.sin()), 1).float()
        table_Pd[start : start + POSITIONS_AT_ONCE] = rows_Pd[: positions - start]
    return table_Pd.to(placement.device)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """fp32 [head_dim / 2]: radians per position, context-extension rule applied."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inverse)
    return inverse


def _llama3(rope: RopeSpec, inverse: Tensor) -> Tensor:
    """Llama 3.1: wavelengths beyond original / low_freq_factor stretch by ``factor``, those within
    original / high_freq_factor stay, and those between are blended."""
    wavelengths = 2 * math.pi / inverse
    blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    stretched = torch.where(blend < 0, inverse / rope.factor, blended)
    return torch.where(blend > 1, inverse, stretched)
