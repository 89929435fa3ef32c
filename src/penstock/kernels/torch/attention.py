"""Attention over gathered keys by scaled_dot_product_attention. The g query heads of a decode's KV head are its
"queries", so that K and V are never repeated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.paged import flat
from penstock.kernels.torch.plan import Chunk, Decodes, GroupPlan
from penstock.kernels.torch.scored import Scoring, scored
from penstock.kernels.types import KVLayer

Pools = tuple[Tensor, Tensor]
"""K and V by slot."""


def attend(q_TNd: Tensor, kv: KVLayer, plan: GroupPlan, scoring: Scoring) -> Tensor:
    """[T, N d], as stored."""
    out_TNd = torch.empty(q_TNd.shape, dtype=q_TNd.dtype, device=q_TNd.device)
    pools = flat(kv.k_PBHd), flat(kv.v_PBHd)
    if plan.rows_r is None:
        _attend_decodes(q_TNd, pools, plan, scoring, out_TNd)
    elif plan.decodes:
        q_rNd = q_TNd[plan.rows_r]
        out_rNd = torch.empty_like(q_rNd)
        _attend_decodes(q_rNd, pools, plan, scoring, out_rNd)
        out_TNd[plan.rows_r] = out_rNd
    for chunk in plan.chunks:
        chunk.keys.gather(*pools)
        out_TNd[chunk.start : chunk.end] = _attend_chunk(q_TNd[chunk.start : chunk.end], chunk, scoring)
    return out_TNd.flatten(1)


def _attend_decodes(q_rNd: Tensor, pools: Pools, plan: GroupPlan, scoring: Scoring, out_rNd: Tensor) -> None:
    (rows, heads, head_dim), kv_heads = q_rNd.shape, pools[0].shape[1]
    q_rHgd = q_rNd.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    counts = [part.rows for part in plan.decodes]
    outs = torch.split(out_rNd.view_as(q_rHgd), counts)
    for part, q_pHgd, out_pHgd in zip(plan.decodes, torch.split(q_rHgd, counts), outs, strict=True):
        part.keys.gather(*pools)
        out_pHgd.copy_(_attend_padded(q_pHgd, part, scoring))


def _attend_padded(q_rHgd: Tensor, part: Decodes, scoring: Scoring) -> Tensor:
    k_rHnd, v_rHnd, mask_r11n = part.k_rHnd, part.v_rHnd, part.mask_r11n
    if scoring.plain:
        return F.scaled_dot_product_attention(q_rHgd, k_rHnd, v_rHnd, mask_r11n, scale=scoring.scale)
    mask_r111n = None if mask_r11n is None else mask_r11n.unsqueeze(3)
    return scored(q_rHgd.unsqueeze(3), k_rHnd, v_rHnd, mask_r111n, scoring).squeeze(3)


def _attend_chunk(q_tNd: Tensor, chunk: Chunk, scoring: Scoring) -> Tensor:
    q_1Ntd, k_1Hnd, v_1Hnd = (x.transpose(0, 1).unsqueeze(0) for x in (q_tNd, chunk.keys.k_nHd, chunk.keys.v_nHd))
    kv_heads, causal = k_1Hnd.shape[1], chunk.mask_tn is None
    if not scoring.plain:
        q_1Hgtd = q_1Ntd.view(1, kv_heads, -1, *q_1Ntd.shape[2:])
        out_1Hgtd = scored(q_1Hgtd, k_1Hnd, v_1Hnd, chunk.mask_tn, scoring, causal=causal)
        return out_1Hgtd.flatten(0, 2).transpose(0, 1)
    if causal or not q_tNd.is_cuda:
        out_1Ntd = F.scaled_dot_product_attention(
            q_1Ntd, k_1Hnd, v_1Hnd, chunk.mask_tn, is_causal=causal, scale=scoring.scale, enable_gqa=True
        )
        return out_1Ntd.squeeze(0).transpose(0, 1)
    # CUDA's masked kernels know no grouped heads, and the fallback holds all scores at once: a batch of g instead.
    q_gHtd = q_1Ntd.view(kv_heads, -1, *q_1Ntd.shape[2:]).transpose(0, 1)
    k_gHnd, v_gHnd = (x.expand(len(q_gHtd), -1, -1, -1) for x in (k_1Hnd, v_1Hnd))
    out_gHtd = F.scaled_dot_product_attention(q_gHtd, k_gHnd, v_gHnd, chunk.mask_tn, scale=scoring.scale)
    return out_gHtd.permute(2, 1, 0, 3).flatten(1, 2)


def attend_whole(qkv_TC: Tensor, heads: int, row_starts: Sequence[int], scale: float) -> Tensor:
    """[T, N d], as stored: one sequence after the other."""
    q_NTd, k_NTd, v_NTd = qkv_TC.view(len(qkv_TC), 3, heads, qkv_TC.shape[1] // (3 * heads)).permute(1, 2, 0, 3)
    out_TNd = qkv_TC.new_empty(len(qkv_TC), heads, q_NTd.shape[-1])
    for start, end in pairwise(row_starts):
        if start < end:
            q, k, v = (x_NTd[None, :, start:end] for x_NTd in (q_NTd, k_NTd, v_NTd))
            out_TNd[start:end] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out_TNd.flatten(1)
