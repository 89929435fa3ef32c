"""What the contract suite of Ops runs on: backends, devices, dtypes, shapes, and requests laid out in a paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import Batch, GroupBatch, KVLayer, Ops, backends, make_ops, native

if native():
    from penstock.kernels import _native

CPU = torch.device("cpu")
BACKENDS = [name for name in backends if name != "cpu" or native()]
PLACES = [(name, "cpu") for name in BACKENDS] + [("torch", "cuda")] * torch.cuda.is_available()
SETS = _native.usable() if native() else []
"""Instruction sets of the native kernels that this processor has, the best one first."""
EXACT = [name for name in BACKENDS if make_ops(name).one_answer]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
EPS = 1e-5
UNREADABLE = 2**31 - 1

Place = tuple[Ops, torch.device]


@dataclass(frozen=True)
class Shape:
    """Widths of a model, named as in kernels.types."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    "stories260k": Shape(64, 172, 8, 4, 8, 512),
    "odd": Shape(51, 77, 3, 1, 22, 97),
    "one head": Shape(24, 40, 1, 1, 8, 33),
    "qwen2.5-0.5b": Shape(896, 1216, 14, 2, 64, 1000),
    "wide heads": Shape(256, 320, 4, 2, 256, 300),
}


def agree(ours: Tensor, ref: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == ref.shape and ours.dtype == ref.dtype
    distance = (ours.cpu().float() - ref.float()).abs().max()
    assert float(distance) <= TOLERANCE[dtype] * float(ref.abs().max()), float(distance / ref.abs().max())


def packed(ops: Ops, *weights: Tensor | None) -> list[Tensor | None]:
    """Matrices, and stacks of them, in copies as the backend reads them; vectors as they are."""
    return [w if w is None or w.ndim < 2 else ops.pack(w.clone(memory_format=torch.contiguous_format)) for w in weights]


def on(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@dataclass(frozen=True)
class Sequence:
    """A request: everything it knows, independent of where its blocks lie. The last ``count`` rows are computed."""

    q_TNd: Tensor
    k_TPast: Tensor
    v_TPast: Tensor
    count: int

    @classmethod
    def random(cls, shape: Shape, context: int, count: int, dtype: torch.dtype) -> Sequence:
        q = torch.randn(count, shape.heads, shape.head_dim).to(dtype)
        k, v = torch.randn(2, context, shape.kv_heads, shape.head_dim).to(dtype)
        return cls(q, k, v, count)

    @property
    def context(self) -> int:
        return len(self.k_TPast)


def mixed(shape: Shape, dtype: torch.dtype) -> list[Sequence]:
    """Decodes and chunks, shorter and longer than a segment, a first token, a whole prompt."""
    sizes = [(1, 1), (40, 40), (3 * 128 + 5, 1), (200, 9), (128, 1), (129, 2), (700, 1), (17, 1)]
    return [Sequence.random(shape, context, count, dtype) for context, count in sizes]


def paged(
    ops: Ops,
    sequences: list[Sequence],
    block_size: int,
    window: int | None,
    device: torch.device,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Batch, KVLayer]:
    """Lays sequences out over shuffled blocks of a pool of NaN; out-of-window and absent entries are unreadable."""
    needs = [-(-s.context // block_size) for s in sequences]
    kv_heads, head_dim = sequences[0].k_TPast.shape[1:]
    total = sum(needs) + 2
    stored = kv_dtype or sequences[0].k_TPast.dtype
    (kv,) = ops.allocate_kv(1, total, block_size, kv_heads, head_dim, stored, device)
    for pool in kv.pools():
        pool[:total] = 127 if pool.dtype == torch.int8 else float("nan")
    free = random.Random(seed).sample(range(total), total)
    positions, slots, rows, starts = [], [], [], [0]
    for sequence, need in zip(sequences, needs, strict=True):
        blocks = [free.pop() for _ in range(need)]
        first = sequence.context - sequence.count
        seen = 0 if window is None else max(0, first - window + 1)
        at = [blocks[p // block_size] * block_size + p % block_size for p in range(sequence.context)]
        write(ops, kv, sequence, at, seen)
        positions += range(first, sequence.context)
        slots += at[first:]
        table = [UNREADABLE if index < seen // block_size else block for index, block in enumerate(blocks)]
        rows.append(table + [UNREADABLE] * (max(needs) - need))
        starts.append(len(positions))
    contexts = [s.context for s in sequences]
    group = GroupBatch(torch.tensor(slots, device=device), torch.tensor(rows, dtype=torch.int32, device=device))
    batch = Batch(
        positions_T=torch.tensor(positions, device=device),
        row_starts=starts,
        row_starts_R1=torch.tensor(starts, device=device),
        contexts=contexts,
        contexts_R=torch.tensor(contexts, device=device),
        block_size=block_size,
        groups=[group],
    )
    return batch, kv


def write(ops: Ops, kv: KVLayer, sequence: Sequence, slots: list[int], first: int) -> None:
    """A sequence's K and V from position ``first`` on, by the op that writes them; no two backends store them alike."""
    past = (sequence.k_TPast[first:], sequence.v_TPast[first:])
    q_THd = torch.zeros(len(past[0]), sequence.q_TNd.shape[1], sequence.q_TNd.shape[2]).to(past[0].dtype)
    qkv_TC = torch.cat((q_THd, *past), 1).flatten(1).to(kv.k_PBHd.device)
    at = torch.tensor(slots[first:], device=qkv_TC.device)
    group, none = GroupBatch(at, torch.zeros(1, 1, dtype=torch.int32, device=at.device)), torch.zeros_like(at)
    ops.qk_norm_rope_write(qkv_TC, None, EPS, None, kv, Batch(none, [], none, [], none, kv.k_PBHd.shape[1], [group]), 0)


def run_attention(
    ops: Ops,
    sequences: list[Sequence],
    block_size: int,
    window: int | None,
    device: torch.device = CPU,
    seed: int = 0,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    slopes_N: Tensor | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    batch, kv = paged(ops, sequences, block_size, window, device, seed, kv_dtype)
    q_TNd = torch.cat([s.q_TNd for s in sequences]).to(device)
    more = (softcap, *on(device, sinks_N, slopes_N))
    out = ops.attention(q_TNd, kv, batch, 0, window, q_TNd.shape[-1] ** -0.5, *more)
    return list(out.split([s.count for s in sequences]))
