"""Which tokens may be drawn: min_p, then top_k, then top_p, each a prefix of the order of tokens.

Rows are looked at in float64 as gaps, scaled logit minus the largest of the row, so that a token's weight is
exp(gap). How much is sorted, and in what pieces, sets the work done and never the outcome.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.sampling import exact, order

FIRST_WIDTH = 256
"""Tokens sorted at first for top_p; eight times as many for the rows where that does not reach p."""


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


def sorted_candidates(logits_RV: Tensor, filters: Filters) -> Candidates:
    """Candidates of rows with top_k or top_p; the token that crosses p is kept."""
    vocab_size = logits_RV.shape[1]
    largest_R1 = logits_RV.amax(dim=1, keepdim=True)
    mass_R1 = torch.zeros_like(largest_R1, dtype=torch.float64)
    endless_R = filters.top_k[:, 0] == vocab_size
    if bool(endless_R.any()):
        mass_R1[endless_R] = _mass(logits_RV[endless_R], largest_R1[endless_R], filters.rows(endless_R))
    width = int(torch.where(endless_R, FIRST_WIDTH, filters.top_k[:, 0]).max())
    return _prefix(logits_RV, order.sort_keys(logits_RV), largest_R1, mass_R1, filters, min(width, vocab_size))


def _mass(logits_RV: Tensor, largest_R1: Tensor, filters: Filters) -> Tensor:
    """Sum of the weights of all tokens that min_p leaves, for top_p without top_k: (R, 1)."""
    gaps_RV = gaps(logits_RV, largest_R1, filters.temperature)
    return exact.tree_sum(exact.exp(gaps_RV).mul_(gaps_RV >= filters.min_gap)).unsqueeze(1)


def _prefix(
    logits_RV: Tensor, keys_RV: Tensor, largest_R1: Tensor, mass_R1: Tensor, filters: Filters, width: int
) -> Candidates:
    vocab_size = logits_RV.shape[1]
    tokens_RK = order.top_ids(keys_RV, width)
    gaps_RK = gaps(logits_RV.gather(1, tokens_RK), largest_R1, filters.temperature)
    kept_RK = (gaps_RK >= filters.min_gap) & (torch.arange(width, device=gaps_RK.device) < filters.top_k)
    running_RK = exact.prefix_sum(exact.exp(gaps_RK) * kept_RK)
    last_R1 = (kept_RK.sum(dim=1, keepdim=True) - 1).clamp_(min=0)  # not the last column: its tree has another shape
    endless_R1 = filters.top_k == vocab_size
    mass = torch.where(endless_R1, mass_R1, running_RK.gather(1, last_R1))
    kept_RK &= torch.nn.functional.pad(running_RK[:, :-1], (1, 0)) < filters.top_p * mass
    unfinished_R1 = endless_R1 & kept_RK[:, -1:]
    if width == vocab_size or not bool(unfinished_R1.any()):
        rows_N, places_N = kept_RK.nonzero(as_tuple=True)
        return Candidates(rows_N, tokens_RK[rows_N, places_N], gaps_RK[rows_N, places_N])
    rows_N, places_N = (kept_RK & ~unfinished_R1).nonzero(as_tuple=True)
    here = Candidates(rows_N, tokens_RK[rows_N, places_N], gaps_RK[rows_N, places_N])
    rest = unfinished_R1.squeeze(1).nonzero().squeeze(1)
    tables = (logits_RV[rest], keys_RV[rest], largest_R1[rest], mass_R1[rest], filters.rows(rest))
    there = _prefix(*tables, min(8 * width, vocab_size))
    return Candidates(*map(torch.cat, zip(here, there._replace(rows_N=rest[there.rows_N]), strict=True)))
