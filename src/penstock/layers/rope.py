"""Positions: rotary embedding (Su et al. 2021), resolved at load into a table over absolute positions, and the slopes
of linear biases."""

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
    """fp32 [positions, rotated]: the cosines of the rotated / 2 angles of a position, then their sines.

    Angles are products of fp32 numbers, as the models were trained with; at position 100,000 an exact angle
    would differ by up to 4e-3. The functions of it are evaluated in fp64 and rounded once.
    """
    rope, rotated = rope.settled(positions), rope.dims or head_dim
    inverse = inverse_frequencies(rope, rotated)
    table_Pd, threads = torch.empty(positions, rotated), torch.get_num_threads()
    torch.set_num_threads(1)  # so few numbers take longer to share than to compute
    for start in range(0, positions, POSITIONS_AT_ONCE):
        at = torch.arange(start, start + POSITIONS_AT_ONCE, dtype=torch.float32)
        angles = (at[:, None] * inverse).double()
        rows_Pd = (torch.cat((angles.cos(), angles.sin()), 1) * rope.amplitude).float()
        table_Pd[start : start + POSITIONS_AT_ONCE] = rows_Pd[: positions - start]
    torch.set_num_threads(threads)
    return table_Pd.to(placement.device)


def alibi_slopes(heads: int, most: float, placement: Placement) -> Tensor:
    """fp32 [N] (ALiBi, Press et al. 2021). 2^(-i most / n) for i = 1 .. n, n being the next power of two; where that is
    more than there are heads, even i come first, and then as many odd ones as are needed."""
    n = 1 << (heads - 1).bit_length()
    order = range(1, n + 1) if n == heads else [*range(2, n + 1, 2), *range(1, n + 1, 2)]
    return torch.tensor([2.0 ** (-i * most / n) for i in order[:heads]], device=placement.device)


def inverse_frequencies(rope: RopeSpec, rotated: int) -> Tensor:
    """fp32 [rotated / 2]: radians per position, context-extension rule applied."""
    powers = rope.theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    match rope.kind:
        case "default":
            return 1.0 / powers
        case "linear":
            return 1.0 / powers / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / powers)
        case "yarn":
            return _yarn(rope, powers)
        case "scaled":
            return 1.0 / (torch.tensor(rope.factors) * powers)


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


def _yarn(rope: RopeSpec, powers: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): what turns more than ``beta_fast`` times within the original context stays,
    what turns less than ``beta_slow`` times stretches by ``factor``, with a linear ramp between."""
    rotated = 2 * len(powers)

    def element(turns: float) -> float:
        """The element that turns so many times."""
        return rotated * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = element(rope.beta_fast), element(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(len(powers), dtype=torch.float32) - low) / width).clamp(0, 1)
    return (1 - kept) / (rope.factor * powers) + kept / powers
