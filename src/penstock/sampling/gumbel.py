"""Gumbel-max: of each row the candidate with the largest gap + noise, ties to the lower id.

Two shortcuts change no outcome. What lies more than GUMBEL_SPAN below the best of its row cannot win, whatever its
noise. And noise is first taken roughly; exact noise goes to the few that may still win, the finalists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.sampling import philox
from penstock.sampling.candidates import Candidates, Filters, gaps
from penstock.sampling.philox import GUMBEL_SPAN

SLACK = 1.0
"""Tokens whose rough score is this close to the best are finalists; more than twice what rough scores are off."""

Finalists = tuple[Tensor, Tensor, Tensor]
"""Rows, tokens and exact scores."""


def open_finalists(logits_RV: Tensor, filters: Filters, sites_R5: Tensor) -> Finalists:
    """Of rows with neither top_k nor top_p, where any token may be a candidate."""
    largest_R1 = logits_RV.amax(dim=1, keepdim=True)
    rough_RV = (logits_RV - largest_R1) / filters.temperature.to(torch.float32)
    live_RV = rough_RV >= filters.min_gap.clamp(min=-GUMBEL_SPAN).to(torch.float32) - SLACK
    dense = 16 * int(live_RV.sum()) >= live_RV.numel() and bool(filters.min_gap.isneginf().all())
    if dense:
        bits_RV = philox.row_bits(sites_R5, logits_RV.shape[1])
        rough_RV += philox.rough_gumbel(bits_RV)
        live_RV = rough_RV >= rough_RV.amax(dim=1, keepdim=True) - SLACK
    rows_N, tokens_N = live_RV.nonzero(as_tuple=True)
    largest_N, temperature_N = largest_R1[rows_N, 0], filters.temperature[rows_N, 0]
    gaps_N = gaps(logits_RV[rows_N, tokens_N], largest_N, temperature_N)
    if dense:
        return rows_N, tokens_N, gaps_N + philox.gumbel(bits_RV[rows_N, tokens_N])
    kept_N = gaps_N >= filters.min_gap[rows_N, 0]
    return finalists(Candidates(rows_N[kept_N], tokens_N[kept_N], gaps_N[kept_N]), sites_R5)


def finalists(found: Candidates, sites_R5: Tensor) -> Finalists:
    """Of rows whose candidates are known."""
    bits_N = philox.token_bits(sites_R5[found.rows_N], found.tokens_N)
    rough_N = found.gaps_N + philox.rough_gumbel(bits_N)
    near_N = rough_N >= _row_max(rough_N, found.rows_N, len(sites_R5))[found.rows_N] - SLACK
    rows_N, tokens_N, gaps_N = (column[near_N] for column in found)
    return rows_N, tokens_N, gaps_N + philox.gumbel(bits_N[near_N])


def winners(entrants: list[Finalists], rows: int, none: int) -> Tensor:
    """The token of each row; ``none`` for a row without any."""
    rows_N, tokens_N, scores_N = map(torch.cat, zip(*entrants, strict=True))
    wins_N = scores_N == _row_max(scores_N, rows_N, rows)[rows_N]
    unset = torch.iinfo(torch.int64).max
    tokens_R = torch.full((rows,), unset, device=rows_N.device)
    tokens_R.scatter_reduce_(0, rows_N[wins_N], tokens_N[wins_N], "amin")
    return tokens_R.masked_fill_(tokens_R == unset, none)


def _row_max(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    start_R = torch.full((rows,), -torch.inf, dtype=values_N.dtype, device=values_N.device)
    return start_R.scatter_reduce_(0, rows_N, values_N, "amax")
