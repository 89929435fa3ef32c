"""Attention of one row: absolute segments, each with its own maximum, merged along a fixed binary tree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.ops import SEGMENT
from penstock.kernels.paged import flat
from penstock.kernels.types import KVLayer


class Row(NamedTuple):
    """One query's view of the cache: positions ``first .. last`` through its request's block table."""

    table_M: Tensor
    first: int
    last: int


class Partial(NamedTuple):
    """Softmax over some of the keys: maximum score, sum of exp(score - top), and the values so weighted."""

    top_Hg: Tensor
    weight_Hg: Tensor
    value_Hgd: Tensor


def attend(q_Nd: Tensor, kv: KVLayer, row: Row, scale: float) -> Tensor:
    """fp32 [N d] of one query row; g = N / H query heads share a KV head."""
    kv_heads, head_dim = kv.k_PBHd.shape[2:]
    q_Hgd = q_Nd.float().view(kv_heads, -1, head_dim)
    partials = {
        segment: attend_segment(q_Hgd, kv, row, segment, scale)
        for segment in range(row.first // SEGMENT, row.last // SEGMENT + 1)
    }
    total = merge_tree(partials)
    return (total.value_Hgd / total.weight_Hg.unsqueeze(-1)).flatten()


def attend_segment(q_Hgd: Tensor, kv: KVLayer, row: Row, segment: int, scale: float) -> Partial:
    """The keys of one segment that the row sees; the others are not touched, whatever lies there."""
    first, last = max(row.first, segment * SEGMENT), min(row.last, segment * SEGMENT + SEGMENT - 1)
    block_size = kv.k_PBHd.shape[1]
    positions_n = torch.arange(first, last + 1, device=row.table_M.device)
    slots_n = row.table_M[positions_n // block_size] * block_size + positions_n % block_size
    k_Hnd = flat(kv.k_PBHd)[slots_n].float().transpose(0, 1)
    v_Hdn = flat(kv.v_PBHd)[slots_n].float().permute(1, 2, 0).contiguous()

    scores_Hgn = (q_Hgd.unsqueeze(2) * k_Hnd.unsqueeze(1)).sum(-1) * scale
    top_Hg = scores_Hgn.amax(-1)
    weights_Hgn = torch.exp(scores_Hgn - top_Hg.unsqueeze(-1))
    value_Hgd = (weights_Hgn.unsqueeze(2) * v_Hdn.unsqueeze(1)).sum(-1)
    return Partial(top_Hg, weights_Hgn.sum(-1), value_Hgd)


def merge_tree(partials: dict[int, Partial]) -> Partial:
    """Node i of a level covers nodes 2i and 2i + 1 of the level below; an absent node is passed over.

    The tree hangs on absolute segment indices, so that whoever holds an aligned range of segments owns a subtree.
    """
    while len(partials) > 1:
        level: dict[int, Partial] = {}
        for index, partial in partials.items():  # ascending
            node = index // 2
            level[node] = merge(level[node], partial) if node in level else partial
        partials = level
    return next(iter(partials.values()))


def merge(a: Partial, b: Partial) -> Partial:
    top_Hg = torch.maximum(a.top_Hg, b.top_Hg)
    shrink_a, shrink_b = torch.exp(a.top_Hg - top_Hg), torch.exp(b.top_Hg - top_Hg)
    weight_Hg = a.weight_Hg * shrink_a + b.weight_Hg * shrink_b
    value_Hgd = a.value_Hgd * shrink_a.unsqueeze(-1) + b.value_Hgd * shrink_b.unsqueeze(-1)
    return Partial(top_Hg, weight_Hg, value_Hgd)
