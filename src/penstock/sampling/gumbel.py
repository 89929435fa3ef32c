"""Gumbel-max: of each row the candidate with the largest gap + noise, ties to the lower id.

Seen as a race, a token arrives after -ln(u) / weight (Efraimidis and Spirakis 2006), and the first one is drawn; the
two views agree through -ln. Shortcuts change no outcome: bounds on the arrival leave a few finalists, library
logarithms decide between those unless the difference is within their error, and only then ``exact`` is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.sampling import blocks, philox
from penstock.sampling.candidates import Candidates, Filters, gaps

MARGIN = 1e-9
"""Scores made with library logarithms are off by far less."""


def open_winners(logits_RV: Tensor, maxima_RB: Tensor, filters: Filters, sites_R5: Tensor, none: int) -> Tensor:
    """Tokens of rows in which any token may be drawn; ``none`` where there is none to draw."""
    largest_R1 = maxima_RB.amax(dim=1, keepdim=True)
    lanes_RQ = philox.row_lanes(sites_R5, logits_RV.shape[1])
    # With c = 1 - u: c <= -ln(u) <= c / u. Arrivals are kept negative, so that the first one is the largest.
    minus_c_RV = philox.rough_complements(lanes_RQ, logits_RV.shape[1]).neg_()
    early_RV = (largest_R1 - logits_RV).div_(filters.temperature.to(torch.float32)).exp_().mul_(minus_c_RV)
    earliest_RB = blocks.maxima(early_RV)
    near_RW = blocks.places(earliest_RB.argmax(dim=1), logits_RV.shape[1])
    late_RW = early_RV.gather(1, near_RW) / (1.0 + minus_c_RV.gather(1, near_RW))
    rows_N, tokens_N = blocks.at_least(early_RV, earliest_RB, 1.001 * late_RW.amax(dim=1, keepdim=True))
    gaps_N = gaps(logits_RV[rows_N, tokens_N], largest_R1[rows_N, 0], filters.temperature[rows_N, 0])
    bits_N = philox.bits_at(lanes_RQ, rows_N, tokens_N)
    return _decide(Candidates(rows_N, tokens_N, gaps_N), bits_N, len(logits_RV), none)


def winners(found: Candidates, vocab_size: int, sites_R5: Tensor, none: int) -> Tensor:
    """Tokens of rows whose candidates are known; ``none`` for a row without any."""
    if 4 * len(found.tokens_N) < vocab_size * len(sites_R5):
        bits_N = philox.token_bits(sites_R5[found.rows_N], found.tokens_N)
    else:  # noise is made for four tokens at a time
        bits_N = philox.bits_at(philox.row_lanes(sites_R5, vocab_size), found.rows_N, found.tokens_N)
    return _decide(found, bits_N, len(sites_R5), none)


def _decide(found: Candidates, bits_N: Tensor, rows: int, none: int) -> Tensor:
    rows_N, tokens_N, gaps_N = found
    scores_N = gaps_N - philox.uniform(bits_N).log_().neg_().log_()
    wins_N = scores_N >= _row_max(scores_N, rows_N, rows)[rows_N] - MARGIN
    rows_N, tokens_N = rows_N[wins_N], tokens_N[wins_N]
    if bool((rows_N.bincount(minlength=rows) > 1).any()):
        scores_N = gaps_N[wins_N] + philox.gumbel(bits_N[wins_N])
        wins_N = scores_N == _row_max(scores_N, rows_N, rows)[rows_N]
        rows_N, tokens_N = rows_N[wins_N], tokens_N[wins_N]
    unset = torch.iinfo(torch.int64).max
    tokens_R = torch.full((rows,), unset, device=rows_N.device)
    tokens_R.scatter_reduce_(0, rows_N, tokens_N, "amin")
    return tokens_R.masked_fill_(tokens_R == unset, none)


def _row_max(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    start_R = torch.full((rows,), -torch.inf, dtype=values_N.dtype, device=values_N.device)
    return start_R.scatter_reduce_(0, rows_N, values_N, "amax")
