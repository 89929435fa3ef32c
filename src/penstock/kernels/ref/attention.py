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


class Scoring(NamedTuple):
    """What becomes of q k^T: a factor, a cap, slopes over the distance; and the logits of keys that have no value."""

    scale: float
    softcap: float | None = None
    sinks_N: Tensor | None = None
    slopes_N: Tensor | None = None


class Partial(NamedTuple):
    """Softmax over some of the keys: maximum score, sum of exp(score - top), and the values so weighted."""

    top_Hg: Tensor
    weight_Hg: Tensor
    value_Hgd: Tensor


def attend(q_Nd: Tensor, kv: KVLayer, row: Row, scoring: Scoring) -> Tensor:
    """fp32 [N d] of one query row; g = N / H query heads share a KV head."""
    kv_heads, head_dim = kv.k_PBHd.shape[2:]
    q_Hgd = q_Nd.float().view(kv_heads, -1, head_dim)
    partials = {
        segment: attend_segment(q_Hgd, kv, row, segment, scoring)
        for segment in range(row.first // SEGMENT, row.last // SEGMENT + 1)
    }
    total = merge_tree(partials)
    if scoring.sinks_N is not None:
        sink_Hg = scoring.sinks_N.float().view_as(total.top_Hg)
        total = merge(total, Partial(sink_Hg, torch.ones_like(sink_Hg), torch.zeros_like(q_Hgd)))
    return (total.value_Hgd / total.weight_Hg.unsqueeze(-1)).flatten()


def attend_segment(q_Hgd: Tensor, kv: KVLayer, row: Row, segment: int, scoring: Scoring) -> Partial:
    """The keys of one segment that the row sees; the others are not touched, whatever lies there."""
    first, last = max(row.first, segment * SEGMENT), min(row.last, segment * SEGMENT + SEGMENT - 1)
    block_size = kv.k_PBHd.shape[1]
    positions_n = torch.arange(first, last + 1, device=row.table_M.device)
    slots_n = row.table_M[positions_n // block_size] * block_size + positions_n % block_size
    distances_n = positions_n - row.last
    return attend_keys(q_Hgd, *(flat(pool)[slots_n] for pool in kv.pools()), scoring=scoring, distances_n=distances_n)


def attend_keys(
    q_Hgd: Tensor,
    k_nHd: Tensor,
    v_nHd: Tensor,
    k_scales_nH: Tensor | None = None,
    v_scales_nH: Tensor | None = None,
    *,
    scoring: Scoring,
    distances_n: Tensor | None = None,
) -> Partial:
    k_Hnd = k_nHd.float().transpose(0, 1)
    v_Hdn = v_nHd.float().permute(1, 2, 0).contiguous()
    scores_Hgn = (q_Hgd.unsqueeze(2) * k_Hnd.unsqueeze(1)).sum(-1)
    if k_scales_nH is not None:
        scores_Hgn = scores_Hgn * k_scales_nH.float().t().unsqueeze(1)
    scores_Hgn = scores_Hgn * scoring.scale
    if scoring.softcap is not None:
        scores_Hgn = scoring.softcap * torch.tanh(scores_Hgn / scoring.softcap)
    if scoring.slopes_N is not None and distances_n is not None:
        scores_Hgn = scores_Hgn + scoring.slopes_N.view(*q_Hgd.shape[:2], 1) * distances_n.float()
    top_Hg = scores_Hgn.amax(-1)
    weights_Hgn = torch.exp(scores_Hgn - top_Hg.unsqueeze(-1))
    weight_Hg = weights_Hgn.sum(-1)
    if v_scales_nH is not None:
        weights_Hgn = weights_Hgn * v_scales_nH.float().t().unsqueeze(1)
    value_Hgd = (weights_Hgn.unsqueeze(2) * v_Hdn.unsqueeze(1)).sum(-1)
    return Partial(top_Hg, weight_Hg, value_Hgd)


def attend_whole(qkv_tC: Tensor, heads: int, scoring: Scoring) -> Tensor:
    """fp32 [t, N d]: each row of one sequence over all of its keys, in one sum."""
    q_tNd, k_tNd, v_tNd = qkv_tC.view(len(qkv_tC), 3, heads, -1).unbind(1)
    out = []
    for q_Nd in q_tNd:
        total = attend_keys(q_Nd.float().unsqueeze(1), k_tNd, v_tNd, scoring=scoring)
        out.append((total.value_Hgd / total.weight_Hg.unsqueeze(-1)).flatten())
    return torch.stack(out)


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
