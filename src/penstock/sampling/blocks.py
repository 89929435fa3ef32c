"""Where large values of long rows are, without sorting or listing the rows: the maxima of blocks say where to look."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 64


def maxima(x_RV: Tensor) -> Tensor:
    """Of each block of WIDTH entries of each row, the last one possibly shorter; NaN where there is one: (R, B)."""
    full = x_RV.shape[1] // WIDTH
    parts = [x_RV[:, : full * WIDTH].view(-1, full, WIDTH).amax(dim=2)] if full else []
    if x_RV.shape[1] % WIDTH:
        parts.append(x_RV[:, full * WIDTH :].amax(dim=1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def places(blocks: Tensor, length: int) -> Tensor:
    """Places in a row of the entries of some blocks: (...) -> (..., WIDTH). After the row's last comes that again."""
    return (blocks.unsqueeze(-1) * WIDTH + torch.arange(WIDTH, device=blocks.device)).clamp_(max=length - 1)


def argmax(x_RV: Tensor, maxima_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and the first place where it is; NaN if there is one."""
    best_R, block_R = maxima_RB.max(dim=1)
    places_RW = places(block_R, x_RV.shape[1])
    within_R = x_RV.gather(1, places_RW).max(dim=1).indices
    return best_R, places_RW.gather(1, within_R.unsqueeze(1)).squeeze(1)


def at_least(x_RV: Tensor, maxima_RB: Tensor, floor_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and places of the entries that are not below their row's floor, in order."""
    rows_M, blocks_M = (maxima_RB >= floor_R1).nonzero(as_tuple=True)
    places_MW = places(blocks_M, x_RV.shape[1])
    found_MW = x_RV[rows_M.unsqueeze(1), places_MW] >= floor_R1[rows_M]
    found_MW[:, 1:] &= places_MW[:, 1:] > places_MW[:, :-1]  # not the last one again
    m_N, w_N = found_MW.nonzero(as_tuple=True)
    return rows_M[m_N], places_MW[m_N, w_N]
