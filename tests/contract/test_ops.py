"""One suite for every Ops backend: each op against ref within the dtype's tolerance, and the promises of
``one_answer`` byte for byte. A CUDA device, where there is one, joins the torch backend's runs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.base import ConfigError
from penstock.kernels import SEGMENT, Batch, GroupBatch, KVLayer, Ops, backends, make_ops, sum_segments

CPU = torch.device("cpu")
PLACES = [(name, "cpu") for name in backends] + [("torch", "cuda")] * torch.cuda.is_available()
EXACT = [name for name in backends if make_ops(name).one_answer]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
EPS = 1e-5
UNREADABLE = 2**31 - 1


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
    "wide heads": Shape(256, 320, 4, 4, 128, 300),
}


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request: pytest.FixtureRequest) -> tuple[Ops, torch.device]:
    return make_ops(request.param[0]), torch.device(request.param[1])


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.inference_mode():
        yield


def agree(ours: Tensor, ref: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == ref.shape and ours.dtype == ref.dtype
    distance = (ours.cpu().float() - ref.float()).abs().max()
    assert float(distance) <= TOLERANCE[dtype] * float(ref.abs().max()), float(distance / ref.abs().max())


# Ops of independent rows


@dataclass(frozen=True)
class RowOp:
    """An op as a function of its rows [T, X]; ``inputs`` makes the weights it closes over."""

    width: Callable[[Shape], int]
    weights: Callable[[Shape], list[tuple[int, ...]]]
    run: Callable[..., Tensor]


def _stack(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(pair, -1)


ROW_OPS: dict[str, RowOp] = {
    "norm": RowOp(lambda s: s.hidden, lambda s: [(s.hidden,)], lambda ops, x, w: ops.norm(x, w, EPS)),
    "add_norm": RowOp(
        lambda s: 2 * s.hidden,
        lambda s: [(s.hidden,)],
        lambda ops, x, w: _stack(ops.add_norm(*(half.contiguous() for half in x.chunk(2, -1)), w, EPS)),
    ),
    "linear": RowOp(lambda s: s.hidden, lambda s: [(s.qkv, s.hidden)], lambda ops, x, w: ops.linear(x, w, None)),
    "linear with bias": RowOp(
        lambda s: s.hidden, lambda s: [(s.qkv, s.hidden), (s.qkv,)], lambda ops, x, w, b: ops.linear(x, w, b)
    ),
    "row_linear": RowOp(
        lambda s: s.ffn,
        lambda s: [(s.hidden, s.ffn), (s.hidden,)],
        lambda ops, x, w, b: ops.row_linear(x, w, b, sum_segments(x.shape[1])),
    ),
    "gate_up silu": RowOp(
        lambda s: s.hidden, lambda s: [(2 * s.ffn, s.hidden)], lambda ops, x, w: ops.gate_up(x, w, None, "silu")
    ),
    "gate_up gelu": RowOp(
        lambda s: s.hidden,
        lambda s: [(2 * s.ffn, s.hidden), (2 * s.ffn,)],
        lambda ops, x, w, b: ops.gate_up(x, w, b, "gelu_tanh"),
    ),
    "logits": RowOp(lambda s: s.hidden, lambda s: [(s.vocab, s.hidden)], lambda ops, x, w: ops.logits(x, w)),
}


def row_inputs(op: RowOp, shape: Shape, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x_TX = torch.randn(rows, op.width(shape)).to(dtype)
    return x_TX, [(torch.randn(size) / size[-1] ** 0.5).to(dtype) for size in op.weights(shape)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_op(name: str, dtype: torch.dtype, shape: Shape, place: tuple[Ops, torch.device]) -> None:
    (ops, device), op = place, ROW_OPS[name]
    x_TX, weights = row_inputs(op, shape, 5, dtype)
    ref = op.run(make_ops("ref"), x_TX, *weights)
    agree(op.run(ops, x_TX.to(device), *(w.to(device) for w in weights)), ref, dtype)
    assert ref.dtype == (torch.float32 if name == "logits" else dtype)


@pytest.mark.parametrize("name", ROW_OPS)
def test_no_rows(name: str, place: tuple[Ops, torch.device]) -> None:
    """A step that draws no token asks for the hidden states and logits of no row."""
    (ops, device), op = place, ROW_OPS[name]
    x_TX, weights = row_inputs(op, SHAPES["odd"], 2, torch.bfloat16)
    x_TX, weights = x_TX.to(device), [w.to(device) for w in weights]
    some, none = op.run(ops, x_TX.clone(), *weights), op.run(ops, x_TX[:0], *weights)
    assert none.shape == (0, *some.shape[1:]) and none.dtype == some.dtype


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_bits(name: str, backend: str, shape: Shape) -> None:
    """A row at any place, among any number of others, at any number of threads: the same bytes."""
    ops, op, rng = make_ops(backend), ROW_OPS[name], random.Random(name)
    for dtype in (torch.float32, torch.bfloat16):
        x_TX, weights = row_inputs(op, shape, 12, dtype)
        expected = op.run(ops, x_TX.clone(), *weights)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for count in (1, 3, 8):
                rows = rng.sample(range(12), count)
                assert torch.equal(op.run(ops, x_TX[rows], *weights), expected[rows]), (dtype, threads, rows)


@pytest.mark.parametrize("backend", EXACT)
def test_sum_tree_is_that_of_the_parallel_ranks(backend: str, shape: Shape) -> None:
    """Two ranks that each sum half of the segments, added in fp32, are the one-rank sum bit for bit; so are
    two ranks that each hold half of the outputs."""
    ops, segments = make_ops(backend), sum_segments(shape.ffn)
    x_TK, w_NK = torch.randn(3, shape.ffn), torch.randn(shape.hidden, shape.ffn)
    whole = ops.row_linear(x_TK, w_NK, None, segments)
    if segments > 1:
        halves = [
            ops.row_linear(x.contiguous(), w.contiguous(), None, segments // 2)
            for x, w in zip(x_TK.chunk(2, 1), w_NK.chunk(2, 1), strict=True)
        ]
        assert torch.equal(whole, halves[0] + halves[1])
    outputs = torch.cat([ops.row_linear(x_TK, w.contiguous(), None, segments) for w in w_NK.chunk(2)], 1)
    assert torch.equal(whole, outputs)


def test_add_norm_reads_the_sum_as_stored(place: tuple[Ops, torch.device]) -> None:
    """1 + 2^-9 rounds to 1 in bfloat16: the norm must see 1, and so must the next layer."""
    ops, device = place
    one = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    normed, residual = ops.add_norm(one * 2**-9, one.clone(), one[0], 0.0)
    assert torch.equal(residual, one) and torch.equal(normed, one)


def test_embed(place: tuple[Ops, torch.device]) -> None:
    ops, device = place
    table_VD = torch.randn(20, 6, device=device)
    assert torch.equal(ops.embed(torch.tensor([3, 19, 3], device=device), table_VD), table_VD[[3, 19, 3]])


@pytest.mark.parametrize(("units", "segments"), [(1, 1), (14, 2), (8, 8), (12, 4), (96, 8), (7, 1), (40, 8)])
def test_sum_segments(units: int, segments: int) -> None:
    assert sum_segments(units) == segments


# Ops on the paged cache


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


def paged(
    ops: Ops, sequences: list[Sequence], block_size: int, window: int | None, device: torch.device, seed: int = 0
) -> tuple[Batch, KVLayer]:
    """Lays sequences out over shuffled blocks of a pool of NaN; out-of-window and absent entries are unreadable."""
    needs = [-(-s.context // block_size) for s in sequences]
    kv_heads, head_dim = sequences[0].k_TPast.shape[1:]
    total = sum(needs) + 2
    (kv,) = ops.allocate_kv(1, total, block_size, kv_heads, head_dim, sequences[0].k_TPast.dtype, device)
    kv.k_PBHd[:total], kv.v_PBHd[:total] = float("nan"), float("nan")
    free = random.Random(seed).sample(range(total), total)
    positions, slots, rows, starts = [], [], [], [0]
    for sequence, need in zip(sequences, needs, strict=True):
        blocks = [free.pop() for _ in range(need)]
        first = sequence.context - sequence.count
        seen = 0 if window is None else max(0, first - window + 1)
        at = [blocks[p // block_size] * block_size + p % block_size for p in range(sequence.context)]
        kept = list(range(seen, sequence.context))
        for pool, past in ((kv.k_PBHd, sequence.k_TPast), (kv.v_PBHd, sequence.v_TPast)):
            pool.flatten(0, 1)[[at[p] for p in kept]] = past[kept].to(device)
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


def run_attention(
    ops: Ops, sequences: list[Sequence], block_size: int, window: int | None, device: torch.device = CPU, seed: int = 0
) -> list[Tensor]:
    batch, kv = paged(ops, sequences, block_size, window, device, seed)
    q_TNd = torch.cat([s.q_TNd for s in sequences]).to(device)
    out = ops.attention(q_TNd, kv, batch, 0, window, q_TNd.shape[-1] ** -0.5)
    return list(out.split([s.count for s in sequences]))


def mixed(shape: Shape, dtype: torch.dtype) -> list[Sequence]:
    """Decodes and chunks, shorter and longer than a segment, a first token, a whole prompt."""
    sizes = [(1, 1), (40, 40), (3 * SEGMENT + 5, 1), (200, 9), (SEGMENT, 1), (SEGMENT + 1, 2), (700, 1), (17, 1)]
    return [Sequence.random(shape, context, count, dtype) for context, count in sizes]


@pytest.mark.parametrize("window", [None, 1, 33, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, window: int | None, shape: Shape, place: tuple[Ops, torch.device]) -> None:
    (ops, device), sequences = place, mixed(shape, dtype)
    ref = torch.cat(run_attention(make_ops("ref"), sequences, 16, window))
    agree(torch.cat(run_attention(ops, sequences, 16, window, device)), ref, dtype)


def test_attention_is_attention(shape: Shape) -> None:
    """ref itself, against the textbook in float64."""
    window = 150
    for sequence in mixed(shape, torch.float32):
        (ours,) = run_attention(make_ops("ref"), [sequence], 32, window)
        q, k, v = (x.double() for x in (sequence.q_TNd, sequence.k_TPast, sequence.v_TPast))
        group = shape.heads // shape.kv_heads
        scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(group, 1)) * shape.head_dim**-0.5
        at = torch.arange(sequence.context)
        ahead = at[None] - at[sequence.context - sequence.count :, None]
        scores[:, (ahead > 0) | (ahead <= -window)] = float("-inf")
        textbook = torch.einsum("nts,snd->tnd", scores.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
        agree(ours, textbook.float(), torch.float32)


def test_one_kind_of_slice_at_a_time(shape: Shape, place: tuple[Ops, torch.device]) -> None:
    """Pure decode batches and pure prefill batches take paths of their own in fast backends."""
    (ops, device), sequences = place, mixed(shape, torch.float32)
    for part in ([s for s in sequences if s.count == 1], [s for s in sequences if s.count > 1]):
        ref = torch.cat(run_attention(make_ops("ref"), part, 16, None))
        agree(torch.cat(run_attention(ops, part, 16, None, device)), ref, torch.float32)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("window", [None, 60])
def test_attention_bits(window: int | None, backend: str, shape: Shape) -> None:
    """Whatever the batch, its order, the chunks, the block size and the threads: the same bytes."""
    ops = make_ops(backend)
    sequences = [s for s in mixed(shape, torch.bfloat16) if s.context < 600]
    expected = run_attention(ops, sequences, 16, window)
    for threads, block_size in ((1, SEGMENT), (2, 1), (4, 16)):
        torch.set_num_threads(threads)
        order = random.Random(threads).sample(range(len(sequences)), len(sequences))
        for part in (order[:3], order[3:4], order[4:]):
            for index, out in zip(
                part, run_attention(ops, [sequences[i] for i in part], block_size, window, seed=threads), strict=True
            ):
                assert torch.equal(out, expected[index]), (threads, block_size, index)
    place = next(i for i, s in enumerate(sequences) if s.count > 5 and s.context > s.count)
    chunk = sequences[place]
    for row in range(chunk.count):
        cut = chunk.context - chunk.count + row + 1
        alone = dataclasses.replace(
            chunk, q_TNd=chunk.q_TNd[row : row + 1], k_TPast=chunk.k_TPast[:cut], v_TPast=chunk.v_TPast[:cut], count=1
        )
        (out,) = run_attention(ops, [alone], 16, window)
        assert torch.equal(out[0], expected[place][row])


def run_write(
    ops: Ops, shape: Shape, qkv_TC: Tensor, norms: tuple[Tensor, Tensor] | None, slots: list[int], first: int
) -> tuple[Tensor, KVLayer]:
    device, count = qkv_TC.device, len(qkv_TC)
    (kv,) = ops.allocate_kv(1, 8, 16, shape.kv_heads, shape.head_dim, qkv_TC.dtype, device)
    positions = torch.arange(first, first + count, device=device)
    group = GroupBatch(torch.tensor(slots, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device))
    ends, context = torch.tensor([0, count]), torch.tensor([first + count])
    batch = Batch(positions, [0, count], ends.to(device), [first + count], context.to(device), 16, [group])
    angles = torch.arange(64.0)[:, None] * torch.rand(shape.head_dim // 2, generator=torch.Generator().manual_seed(3))
    rope_Pd = torch.cat((angles.cos(), angles.sin()), 1).to(device)
    return ops.qk_norm_rope_write(qkv_TC, norms, EPS, rope_Pd, kv, batch, 0), kv


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_write(dtype: torch.dtype, normed: bool, shape: Shape, place: tuple[Ops, torch.device]) -> None:
    ops, device = place
    qkv_TC = torch.randn(6, shape.qkv).to(dtype)
    norms = tuple(torch.rand(2, shape.head_dim).to(dtype)) if normed else None
    slots = [5, 127, -1, 40, 0, -1]
    ref_q, ref_kv = run_write(make_ops("ref"), shape, qkv_TC, norms, slots, 9)
    on_device = tuple(w.to(device) for w in norms) if norms else None
    q, kv = run_write(ops, shape, qkv_TC.to(device), on_device, slots, 9)
    agree(q, ref_q, dtype)
    agree(kv.k_PBHd[:8], ref_kv.k_PBHd[:8], dtype)
    agree(kv.v_PBHd[:8], ref_kv.v_PBHd[:8], dtype)
    untouched = [slot for slot in range(128) if slot not in slots]
    assert not kv.k_PBHd[:8].flatten(0, 1)[untouched].any() and not kv.v_PBHd[:8].flatten(0, 1)[untouched].any()


@pytest.mark.parametrize("backend", EXACT)
def test_write_bits(backend: str, shape: Shape) -> None:
    ops, norms = make_ops(backend), tuple(torch.rand(2, shape.head_dim))
    qkv_TC = torch.randn(7, shape.qkv)
    q, kv = run_write(ops, shape, qkv_TC, norms, list(range(7)), 20)
    for row in range(7):
        q_1, kv_1 = run_write(ops, shape, qkv_TC[row : row + 1], norms, [row], 20 + row)
        assert torch.equal(q[row], q_1[0])
        assert torch.equal(kv.k_PBHd[0, row], kv_1.k_PBHd[0, row])
        assert torch.equal(kv.v_PBHd[0, row], kv_1.v_PBHd[0, row])


def test_copy_blocks(place: tuple[Ops, torch.device]) -> None:
    ops, device = place
    layers = ops.allocate_kv(3, 6, 4, 2, 8, torch.bfloat16, device)
    for layer in layers:
        layer.k_PBHd.normal_()
        layer.v_PBHd.normal_()
    before = [(layer.k_PBHd.clone(), layer.v_PBHd.clone()) for layer in layers]
    ops.copy_blocks(layers, [(0, 3), (0, 5), (4, 1)])
    ops.copy_blocks(layers, [])
    source = [0, 4, 2, 0, 4, 0]
    for layer, (k, v) in zip(layers, before, strict=True):
        assert torch.equal(layer.k_PBHd[:6], k[source]) and torch.equal(layer.v_PBHd[:6], v[source])


@pytest.mark.parametrize("block_size", [0, -16, 3, 48, 256])
def test_block_sizes_divide_the_segment(block_size: int, place: tuple[Ops, torch.device]) -> None:
    ops, device = place
    with pytest.raises(ConfigError) as error:
        ops.allocate_kv(1, 2, block_size, 1, 8, torch.float32, device)
    assert error.value.code == "block_size_invalid"


def test_backends_have_names_and_numerics() -> None:
    assert {make_ops(name).name for name in backends} == set(backends) == {"ref", "torch"}
    assert len({make_ops(name).numerics for name in backends}) == 2
    assert EXACT == ["ref"]
    with pytest.raises(ConfigError) as error:
        make_ops("abacus")
    assert error.value.code == "unknown_variant"
