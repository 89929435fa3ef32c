"""Which tokens may be drawn: min_p, then top_k, then top_p, each a prefix of the order of tokens; then typical_p.

Rows are looked at in float64 as gaps, scaled logit minus the largest of the row, so that a token's weight is
exp(gap). How much is sorted, in what pieces, and whether a cut at p was so clear that library functions could make it,
sets the work done and never the outcome.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.sampling import blocks, exact, order

BINS, BINS_PER_NAT = 512, 16
"""Of the histogram of gaps that says how many tokens top_p may need."""

DOUBT = 1e-9
"""Sums of library functions are closer than this share to those of ``exact``."""


class Candidates(NamedTuple):
    """Tokens that may be drawn. A row may have none: all its logits are -inf or NaN."""

    rows_N: Tensor
    tokens_N: Tensor
    gaps_N: Tensor


class Filters(NamedTuple):
    """Parameters of each row as columns of shape (R, 1). What is off: top_k = V, top_p = inf, min_gap = -inf."""

    temperature: Tensor
    min_gap: Tensor
    top_k: Tensor
    top_p: Tensor

    def rows(self, index: Tensor) -> Filters:
        """Of some of the rows."""
        return Filters(*(column[index] for column in self))


def gaps(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Scaled logits minus the row's largest, in float64."""
    return (logits.to(torch.float64) / temperature).sub_(largest.to(torch.float64) / temperature)


def open_candidates(logits_RV: Tensor, maxima_RB: Tensor, filters: Filters) -> Candidates:
    """Candidates of rows with at most min_p, by id."""
    largest_R1 = maxima_RB.amax(dim=1, keepdim=True)
    slack_R1 = (largest_R1.abs() + 1e3 * filters.temperature) * 1e-5  # far more than float32 rounds off
    floor_R1 = (largest_R1 + filters.min_gap * filters.temperature - slack_R1).to(torch.float32)
    floor_R1.clamp_(min=torch.finfo(torch.float32).min)
    rows_N, tokens_N = blocks.at_least(logits_RV, maxima_RB, floor_R1)
    gaps_N = gaps(logits_RV[rows_N, tokens_N], largest_R1[rows_N, 0], filters.temperature[rows_N, 0])
    kept_N = gaps_N >= filters.min_gap[rows_N, 0]
    return Candidates(rows_N[kept_N], tokens_N[kept_N], gaps_N[kept_N])


def sorted_candidates(logits_RV: Tensor, maxima_RB: Tensor, filters: Filters) -> Candidates:
    """Candidates of rows with top_k or top_p, in order; the token that crosses p is kept."""
    vocab_size = logits_RV.shape[1]
    largest_R1 = maxima_RB.amax(dim=1, keepdim=True)
    endless_R1 = filters.top_k == vocab_size
    endless = endless_R1.squeeze(1).nonzero().squeeze(1)
    mass_R1 = torch.zeros_like(largest_R1, dtype=torch.float64)
    width = int(torch.where(endless_R1, 1, filters.top_k).max())
    if len(endless):
        gaps_RV = gaps(logits_RV[endless], largest_R1[endless], filters.temperature[endless])
        weights_RV = gaps_RV.exp().mul_(gaps_RV >= filters.min_gap[endless])
        mass_R1[endless] = weights_RV.sum(dim=1, keepdim=True)
        width = max(width, _enough(gaps_RV, weights_RV, filters.top_p[endless] * mass_R1[endless]))
    tokens_RK = order.top_ids(logits_RV, width, maxima_RB)
    gaps_RK = gaps(logits_RV.gather(1, tokens_RK), largest_R1, filters.temperature)
    kept_RK = (gaps_RK >= filters.min_gap) & (torch.arange(width, device=gaps_RK.device) < filters.top_k)
    weights_RK = gaps_RK.exp() * kept_RK
    mass_R1 = torch.where(endless_R1, mass_R1, weights_RK.sum(dim=1, keepdim=True))
    before_RK = weights_RK.cumsum(dim=1).sub_(weights_RK).sub_(filters.top_p * mass_R1)  # below 0 while p is not met
    unclear = (kept_RK & (before_RK.abs() <= DOUBT * mass_R1)).any(dim=1).nonzero().squeeze(1)
    in_RK = kept_RK & (before_RK < 0.0)
    if len(unclear):
        in_RK[unclear] = _exact_cut(logits_RV, largest_R1, gaps_RK, kept_RK, filters, unclear)
    rows_N, places_N = in_RK.nonzero(as_tuple=True)
    return Candidates(rows_N, tokens_RK[rows_N, places_N], gaps_RK[rows_N, places_N])


def _enough(gaps_RV: Tensor, weights_RV: Tensor, goal_R1: Tensor) -> int:
    """Such a number of leading tokens that in each row their weight reaches the goal."""
    bins_RV = (gaps_RV * -BINS_PER_NAT).clamp_(max=BINS - 1).nan_to_num_().to(torch.int64)
    mass_RB = torch.zeros(len(gaps_RV), BINS, dtype=torch.float64, device=gaps_RV.device).scatter_add_(
        1, bins_RV, weights_RV
    )
    short_R = (mass_RB.cumsum_(dim=1) < goal_R1 * (1.0 + DOUBT)).sum(dim=1).clamp_(max=BINS - 1)
    return int((bins_RV <= short_R.unsqueeze(1)).sum(dim=1).max())


def _exact_cut(
    logits_RV: Tensor, largest_R1: Tensor, gaps_RK: Tensor, kept_RK: Tensor, filters: Filters, rows: Tensor
) -> Tensor:
    """Which tokens of some rows are kept, where p is met so closely that the last bits decide."""
    filters, kept_rK = filters.rows(rows), kept_RK[rows]
    running_rK = exact.prefix_sum(exact.exp(gaps_RK[rows]) * kept_rK)
    last_r1 = (kept_rK.sum(dim=1, keepdim=True) - 1).clamp_(min=0)  # not the last column: its tree has another shape
    mass_r1 = running_rK.gather(1, last_r1)
    endless_r = filters.top_k[:, 0] == logits_RV.shape[1]
    if bool(endless_r.any()):
        whole = rows[endless_r]
        gaps_rV = gaps(logits_RV[whole], largest_R1[whole], filters.temperature[endless_r])
        kept_rV = gaps_rV >= filters.min_gap[endless_r]
        mass_r1[endless_r] = exact.tree_sum(exact.exp(gaps_rV).mul_(kept_rV)).unsqueeze(1)
    return kept_rK & (torch.nn.functional.pad(running_rK[:, :-1], (1, 0)) < filters.top_p * mass_r1)


def typical(found: Candidates, typical_p: Tensor) -> Candidates:
    """Of each row's candidates the most typical ones (Meister et al. 2022), with probability ``typical_p`` (R,) in all.

    Those whose surprise, -ln p, is nearest to the expected one come first; the one that crosses p is kept.
    """
    parts = []
    for row, p in enumerate(typical_p.tolist()):
        mine = (found.rows_N == row).nonzero().squeeze(1)
        mine = mine[found.gaps_N[mine] > -torch.inf]
        if not len(mine):
            continue
        gaps_K = found.gaps_N[mine]
        weights_K = exact.exp(gaps_K)
        chances_K = weights_K / exact.tree_sum(weights_K)
        expected = exact.tree_sum(chances_K * gaps_K)  # the same constant is missing in both terms of the distance
        nearest_K = (gaps_K - expected).abs_().sort(stable=True).indices
        running_K = exact.prefix_sum(chances_K[nearest_K])
        parts.append(mine[nearest_K[torch.nn.functional.pad(running_K[:-1], (1, 0)) < p]])
    kept = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=found.rows_N.device)
    return Candidates(*(column[kept] for column in found))
