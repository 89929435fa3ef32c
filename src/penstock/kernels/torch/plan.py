"""What attention reads, planned once per step and KV group and used by every layer of it.

One-row slices (decodes) of similar context are gathered into padded batches; longer slices are chunks, one request at a
time. Padding points at the request's own newest slot: no other memory is read, so a NaN in another request's block
cannot leak through a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from penstock.kernels.types import Batch, KVLayer

SHORTEST_BUCKET = 256
"""Contexts up to this length share one padded batch; longer ones share it within a factor of two."""
GATHERED_BYTES = 1 << 20
"""K and V that a padded batch gathers on a CPU, for each thread: what its own cache keeps until they are used. Measured
for 32 requests of 193 keys, 8 heads of 128: 10 ms a layer in one batch, 5 ms in batches of one request."""


Buffers = tuple[Tensor, ...]


@dataclass(slots=True)
class Keys:
    """The slots of n keys, and the memory they are gathered into: all Keys of a plan share it."""

    slots_n: Tensor
    k_nHd: Tensor
    v_nHd: Tensor

    def gather(self, k_SHd: Tensor, v_SHd: Tensor) -> None:
        """index_select copies whole rows, where indexing copies elements."""
        torch.index_select(k_SHd, 0, self.slots_n, out=self.k_nHd)
        torch.index_select(v_SHd, 0, self.slots_n, out=self.v_nHd)


@dataclass(slots=True)
class Decodes:
    """``rows`` of the plan's decodes: their keys, n for each, as gathered and by KV head, and a mask where padded."""

    rows: int
    keys: Keys
    k_rHnd: Tensor
    v_rHnd: Tensor
    mask_r11n: Tensor | None


@dataclass(slots=True)
class Chunk:
    """Rows ``start .. end - 1`` of one request, its keys, and a mask unless plainly causal."""

    start: int
    end: int
    keys: Keys
    mask_tn: Tensor | None


@dataclass(slots=True)
class GroupPlan:
    """Attributes:
    rows_r: the batch's rows that are decodes, in the order of ``decodes``; None if these are all rows as they are.
    """

    rows_r: Tensor | None
    decodes: list[Decodes]
    chunks: list[Chunk]


def make_plan(batch: Batch, tables_RM: Tensor, window: int | None, kv: KVLayer) -> GroupPlan:
    seen = batch.contexts if window is None else [min(context, window) for context in batch.contexts]
    counts = [end - start for start, end in pairwise(batch.row_starts)]
    single = [request for request, count in enumerate(counts) if count == 1]
    longer = [request for request, count in enumerate(counts) if count > 1]
    room = _keys_at_once(kv)
    if len(list(_cuts([seen[request] for request in single], room))) > 1:
        single.sort(key=seen.__getitem__)
    parts = [single[start:end] for start, end in _cuts([seen[request] for request in single], room)]
    spans = {request: _span(batch, request, counts[request], window) for request in longer}
    most = max(
        [len(part) * max(seen[r] for r in part) for part in parts] + [b - a for a, b in spans.values()], default=0
    )
    buffers = tuple(pool.new_empty(most, *pool.shape[2:]) for pool in (kv.k_PBHd, kv.v_PBHd))

    whole = single == list(range(batch.row_starts[-1]))
    at_r = torch.tensor(single, dtype=torch.int64, device=tables_RM.device)
    return GroupPlan(
        None if whole else batch.row_starts_R1[at_r],
        [_decodes(batch, tables_RM, seen, part, buffers) for part in parts],
        [_chunk(batch, tables_RM, request, spans[request], window, buffers) for request in longer],
    )


def _keys_at_once(kv: KVLayer) -> int:
    if kv.k_PBHd.is_cuda:
        return sys.maxsize
    _, _, kv_heads, head_dim = kv.k_PBHd.shape
    return GATHERED_BYTES * torch.get_num_threads() // (2 * kv_heads * head_dim * kv.k_PBHd.element_size())


def _cuts(lengths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Runs of requests to be padded to the longest of them."""
    start, least, most = 0, 0, 0
    for at, length in enumerate(lengths):
        low, high = min(least or length, length), max(most, length)
        if at > start and (high > max(SHORTEST_BUCKET, 2 * low) or (at - start + 1) * high > room):
            yield start, at
            start, low, high = at, length, length
        least, most = low, high
    if lengths:
        yield start, len(lengths)


def _span(batch: Batch, request: int, count: int, window: int | None) -> tuple[int, int]:
    """Positions first .. end - 1 that some row of a chunk sees."""
    end = batch.contexts[request]
    return (0 if window is None else max(0, end - count - window + 1)), end


def _chunk(
    batch: Batch, tables_RM: Tensor, request: int, span: tuple[int, int], window: int | None, buffers: Buffers
) -> Chunk:
    (start, end), (first, context) = batch.row_starts[request : request + 2], span
    positions_n = torch.arange(first, context, device=tables_RM.device)
    keys = _keys(tables_RM[request], positions_n, batch.block_size, buffers)
    computed = context - (end - start)
    if computed == 0 and (window is None or context <= window):
        return Chunk(start, end, keys, None)
    queries_t1 = torch.arange(computed, context, device=tables_RM.device).unsqueeze(1)
    mask_tn = positions_n <= queries_t1
    if window is not None:
        mask_tn &= positions_n > queries_t1 - window
    return Chunk(start, end, keys, mask_tn)


def _decodes(batch: Batch, tables_RM: Tensor, seen: Sequence[int], requests: list[int], buffers: Buffers) -> Decodes:
    device = tables_RM.device
    lengths = [seen[request] for request in requests]
    longest = max(lengths)
    last_r1 = torch.tensor([batch.contexts[request] - 1 for request in requests], device=device).unsqueeze(1)
    first_r1 = last_r1 + 1 - torch.tensor(lengths, device=device).unsqueeze(1)
    positions_rn = first_r1 + torch.arange(longest, device=device)
    tables_rM = tables_RM[torch.tensor(requests, device=device)]
    keys = _keys(tables_rM, positions_rn.minimum(last_r1), batch.block_size, buffers)
    k_rHnd, v_rHnd = (x.view(len(requests), longest, *x.shape[1:]).transpose(1, 2) for x in (keys.k_nHd, keys.v_nHd))
    mask_r11n = None if min(lengths) == longest else (positions_rn <= last_r1)[:, None, None]
    return Decodes(len(requests), keys, k_rHnd, v_rHnd, mask_r11n)


def _keys(tables: Tensor, positions: Tensor, block_size: int, buffers: Buffers) -> Keys:
    blocks = tables.long().gather(-1, positions // block_size)
    slots_n = (blocks * block_size + positions % block_size).flatten()
    return Keys(slots_n, *(buffer[: len(slots_n)] for buffer in buffers))
