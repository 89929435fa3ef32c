"""The one order of tokens: value descending, then id ascending (ONE_ANSWER rule 13)."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.sampling import blocks

MASK = 0xFFFFFFFF


def sort_keys(values_RK: Tensor, ids_RK: Tensor) -> Tensor:
    """int64 keys, all different, whose descending order is the order of tokens; a token's id is in the low half."""
    bits = (values_RK + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    return keys.bitwise_or_(MASK - ids_RK)


def top_ids(logits_RV: Tensor, count: int, maxima_RB: Tensor | None = None) -> Tensor:
    """The first ``count`` ids of each row, in order: (R, count)."""
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    if 2 * count * blocks.WIDTH >= vocab_size:
        return _first(sort_keys(logits_RV, torch.arange(vocab_size, device=device)), count)
    # Each block before a token's own, in the order of blocks by their maxima, holds a token before it.
    maxima_RB = blocks.maxima(logits_RV) if maxima_RB is None else maxima_RB
    blocks_RC = _first(sort_keys(maxima_RB, torch.arange(maxima_RB.shape[1], device=device)), count)
    ids_RK = blocks.places(blocks_RC, vocab_size).flatten(1)
    keys_RK = sort_keys(logits_RV.gather(1, ids_RK), ids_RK)
    short = vocab_size % blocks.WIDTH
    if short:  # after the last token it comes again
        again_RK = (blocks_RC == maxima_RB.shape[1] - 1).repeat_interleave(blocks.WIDTH, dim=1)
        again_RK &= (torch.arange(ids_RK.shape[1], device=device) % blocks.WIDTH) >= short
        keys_RK.masked_fill_(again_RK, torch.iinfo(torch.int64).min)
    return _first(keys_RK, count)


def _first(keys_RK: Tensor, count: int) -> Tensor:
    return MASK - (keys_RK.topk(count, dim=1).values & MASK)
