"""Paged attention from gathered keys and scaled_dot_product_attention.

Planned once per step and group, run once per layer. One-row slices (decodes) of similar context are gathered
into one padded batch, in which the g query heads of a KV head are its "queries", so that K and V are never
repeated. Longer slices run one request at a time. Padding points at the request's own newest slot: no
other memory is read, so a NaN in another request's block cannot leak through a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.paged import flat
from penstock.kernels.types import Batch, KVLayer

SHORTEST_BUCKET = 256
"""Contexts up to this length share one padded batch; longer ones share it within a factor of two."""


@dataclass(slots=True)
class Decodes:
    """Rows ``rows_r`` (None: all rows, in order) with the slots of their n keys, and a mask where padded."""

    rows_r: Tensor | None
    slots_rn: Tensor
    mask_r11n: Tensor | None


@dataclass(slots=True)
class Chunk:
    """Rows ``start .. end - 1`` of one request, the slots of its keys, and a mask unless plainly causal."""

    start: int
    end: int
    slots_n: Tensor
    mask_tn: Tensor | None


@dataclass(slots=True)
class GroupPlan:
    decodes: list[Decodes]
    chunks: list[Chunk]


def make_plan(batch: Batch, tables_RM: Tensor, window: int | None) -> GroupPlan:
    buckets: dict[int, list[int]] = {}
    chunks = []
    for request, (start, end) in enumerate(zip(batch.row_starts, batch.row_starts[1:], strict=False)):
        context = batch.contexts[request]
        if end - start > 1:
            chunks.append(_chunk(batch, tables_RM[request], start, end, context, window))
        elif end > start:
            seen = context if window is None else min(context, window)
            buckets.setdefault(max(SHORTEST_BUCKET, 1 << (seen - 1).bit_length()), []).append(request)
    return GroupPlan([_decodes(batch, tables_RM, requests, window) for requests in buckets.values()], chunks)


def _chunk(batch: Batch, table_M: Tensor, start: int, end: int, context: int, window: int | None) -> Chunk:
    count = end - start
    computed = context - count
    first = 0 if window is None else max(0, computed - window + 1)
    keys_n = torch.arange(first, context, device=table_M.device)
    slots_n = _slots(table_M, keys_n, batch.block_size)
    if computed == 0 and (window is None or context <= window):
        return Chunk(start, end, slots_n, None)
    queries_t1 = torch.arange(computed, context, device=table_M.device).unsqueeze(1)
    mask_tn = keys_n <= queries_t1
    if window is not None:
        mask_tn &= keys_n > queries_t1 - window
    return Chunk(start, end, slots_n, mask_tn)


def _decodes(batch: Batch, tables_RM: Tensor, requests: list[int], window: int | None) -> Decodes:
    device = tables_RM.device
    contexts = [batch.contexts[r] for r in requests]
    seen = contexts if window is None else [min(context, window) for context in contexts]
    longest = max(seen)
    whole = len(requests) == len(batch.contexts) == batch.row_starts[-1]
    requests_r = torch.tensor(requests, device=device)
    last_r1 = torch.tensor([context - 1 for context in contexts], device=device).unsqueeze(1)
    first_r1 = last_r1 + 1 - torch.tensor(seen, device=device).unsqueeze(1)
    keys_rn = first_r1 + torch.arange(longest, device=device)
    slots_rn = _slots(tables_RM if whole else tables_RM[requests_r], keys_rn.minimum(last_r1), batch.block_size)
    mask = None if min(seen) == longest else (keys_rn <= last_r1)[:, None, None]
    return Decodes(None if whole else batch.row_starts_R1[requests_r], slots_rn, mask)


def _slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    blocks = tables.long().gather(-1, positions // block_size)
    return blocks * block_size + positions % block_size


def attend(q_TNd: Tensor, kv: KVLayer, plan: GroupPlan, scale: float) -> Tensor:
    """[T, N d], as stored."""
    out_TNd = torch.empty_like(q_TNd)
    for decodes in plan.decodes:
        q_rNd = q_TNd if decodes.rows_r is None else q_TNd[decodes.rows_r]
        out_rNd = _attend_decodes(q_rNd, kv, decodes, scale)
        if decodes.rows_r is None:
            out_TNd = out_rNd
        else:
            out_TNd[decodes.rows_r] = out_rNd
    for chunk in plan.chunks:
        out_TNd[chunk.start : chunk.end] = _attend_chunk(q_TNd[chunk.start : chunk.end], kv, chunk, scale)
    return out_TNd.flatten(1)


def _attend_decodes(q_rNd: Tensor, kv: KVLayer, decodes: Decodes, scale: float) -> Tensor:
    k_rHnd, v_rHnd = (_gather(pool, decodes.slots_rn).transpose(1, 2) for pool in (kv.k_PBHd, kv.v_PBHd))
    rows, heads, head_dim = q_rNd.shape
    kv_heads = k_rHnd.shape[1]
    q_rHgd = q_rNd.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    out_rHgd = F.scaled_dot_product_attention(q_rHgd, k_rHnd, v_rHnd, decodes.mask_r11n, scale=scale)
    return out_rHgd.flatten(1, 2)


def _attend_chunk(q_tNd: Tensor, kv: KVLayer, chunk: Chunk, scale: float) -> Tensor:
    q_1Ntd = q_tNd.transpose(0, 1).unsqueeze(0)
    k_1Hnd, v_1Hnd = (_gather(pool, chunk.slots_n).transpose(0, 1).unsqueeze(0) for pool in (kv.k_PBHd, kv.v_PBHd))
    if chunk.mask_tn is None or not q_tNd.is_cuda:
        out_1Ntd = F.scaled_dot_product_attention(
            q_1Ntd, k_1Hnd, v_1Hnd, chunk.mask_tn, is_causal=chunk.mask_tn is None, scale=scale, enable_gqa=True
        )
        return out_1Ntd.squeeze(0).transpose(0, 1)
    # CUDA's masked kernels know no grouped heads, and the fallback holds all scores at once: a batch of g instead.
    kv_heads = k_1Hnd.shape[1]
    q_gHtd = q_1Ntd.view(kv_heads, -1, *q_1Ntd.shape[2:]).transpose(0, 1)
    k_gHnd, v_gHnd = (x.expand(len(q_gHtd), -1, -1, -1) for x in (k_1Hnd, v_1Hnd))
    out_gHtd = F.scaled_dot_product_attention(q_gHtd, k_gHnd, v_gHnd, chunk.mask_tn, scale=scale)
    return out_gHtd.permute(2, 1, 0, 3).flatten(1, 2)


def _gather(pool_PBHd: Tensor, slots: Tensor) -> Tensor:
    """The pool's vectors at these slots: [*slots, H, d]. index_select copies whole rows; indexing copies elements."""
    return flat(pool_PBHd).index_select(0, slots.flatten()).view(*slots.shape, *pool_PBHd.shape[2:])
