"""The one order of tokens: value descending, then id ascending (ONE_ANSWER rule 13)."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def sort_keys(logits_RV: Tensor) -> Tensor:
    """int64 keys, all different, whose descending order is the order of tokens; a token's id is in the low half."""
    bits = (logits_RV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    return keys.bitwise_or_(MASK - torch.arange(logits_RV.shape[1], device=logits_RV.device))


def top_ids(keys_RV: Tensor, count: int) -> Tensor:
    """The first ``count`` ids of each row, in order: (R, count)."""
    return MASK - (keys_RV.topk(count, dim=1).values & MASK)
