"""Counter-based noise: the random number of a token is a function of where it stands, not of when it is drawn.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    key      low and next 32 bits of the request's seed
    counter  (token id // 4, absolute position of the drawn token, sample index, seed // 2^64)
    lane     token id % 4 of the four output words

so that every (seed, sample, position, token) has its own 32 bits b. The uniform is u = (b + 1/2) / 2^32 and the noise
is Gumbel(0, 1): g = -ln(-ln u). A token drawn as the argmax of logit + g is distributed as the softmax (Gumbel 1954;
Maddison, Tarlow and Minka 2014), and neither batch mates nor the order of draws can be seen in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock.sampling import exact

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds on ints, int64 arrays or int64 tensors that hold 32-bit words; returns four of the same.

    Products wrap around in 64 bits, whose high half is still right after the mask. Words that will only be
    xored and masked in the next round are left unmasked. Words broadcast: one that is the same for all tokens of a row,
    or for all rows, costs nothing until it mixes with others.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c2 = (p1 >> 32) ^ c1, (p0 >> 32) ^ c3
        c0 ^= k0
        c0 &= MASK
        c2 ^= k1
        c2 &= MASK
        c1, c3 = p1, p0
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1 & MASK, c2, c3 & MASK


def words(seed: int) -> tuple[int, int, int]:
    """A seed in [-2^63, 2^64) as the two words of the key and the one in the counter."""
    return seed & MASK, (seed >> 32) & MASK, (seed >> 64) & MASK


def token_bits(sites_N5: Tensor, tokens_N: Tensor) -> Tensor:
    """32 random bits, as int64, for one token at each site.

    Args:
        sites_N5: int64; the three ``words(seed)``, the sample index and the position.
        tokens_N: int64 token ids.
    """
    low, middle, high, sample, position = sites_N5.T.contiguous()
    lanes = philox4x32((tokens_N >> 2, position, sample, high), (low, middle))
    return torch.stack(lanes, dim=1).gather(1, (tokens_N & 3).unsqueeze(1)).squeeze(1)


def row_lanes(sites_R5: Tensor, vocab_size: int) -> Lanes:
    """``token_bits`` for every token of a vocabulary at each site, token id // 4 by token id."""
    low, middle, high, sample, position = sites_R5.T.unsqueeze(2)
    quads = torch.arange((vocab_size + 3) // 4, device=sites_R5.device).unsqueeze(0)
    lanes = philox4x32((quads, position, sample, high), (low, middle))
    first, second, third, fourth = (lane.expand(len(sites_R5), -1) for lane in lanes)
    return first, second, third, fourth


def bits_at(lanes_RQ: Lanes, rows_N: Tensor, tokens_N: Tensor) -> Tensor:
    """Some of the bits of ``row_lanes``."""
    quads_N = tokens_N >> 2
    of_lanes = torch.stack([lane_RQ[rows_N, quads_N] for lane_RQ in lanes_RQ], dim=1)
    return of_lanes.gather(1, (tokens_N & 3).unsqueeze(1)).squeeze(1)


def rough_complements(lanes_RQ: Lanes, vocab_size: int) -> Tensor:
    """1 - u in float32, within a millionth of itself: (R, V)."""
    rows, quads = lanes_RQ[0].shape
    rest = torch.empty(rows, quads, 4, device=lanes_RQ[0].device)
    for lane, bits_RQ in enumerate(lanes_RQ):
        rest[:, :, lane].copy_(bits_RQ ^ MASK)
    return rest.add_(0.5).mul_(2.0**-32).view(rows, -1)[:, :vocab_size]


def uniform(bits: Tensor) -> Tensor:
    """u in float64, exact."""
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel(0, 1) noise in float64 from 32 random bits; increasing in them."""
    return -exact.log(-exact.log(uniform(bits)))
