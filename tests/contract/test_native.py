"""The native kernels of every instruction set that this processor has, and the team of threads they share."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opsuite import CPU, DTYPES, EPS, SETS, SHAPES, Sequence, Shape, agree, mixed, packed, paged, run_attention
from penstock.kernels import SEGMENT, Batch, GroupBatch, GroupedWeight, Ops, make_ops, native
from penstock.quant import quantize
from test_ops import ROW_OPS, row_inputs, run

pytestmark = pytest.mark.skipif(not native(), reason="installed without a compiler")

if native():
    from penstock.kernels import _native

FUSED = [name for name in SETS if name not in ("portable", "avx2")] if "avx2" in SETS else []


def test_the_best_is_chosen_and_portable_is_always_there() -> None:
    assert _native.chosen() == SETS[0] and SETS[-1] == "portable"
    assert _native.chosen() in make_ops("cpu").numerics
    with pytest.raises(ValueError):
        _native.choose("abacus")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_op(name: str, dtype: torch.dtype, ops: Ops) -> None:
    for shape in (SHAPES["odd"], SHAPES["qwen2.5-0.5b"]):
        x_TX, weights = row_inputs(ROW_OPS[name], shape, 5, dtype)
        agree(run(ROW_OPS[name], ops, x_TX, weights), run(ROW_OPS[name], make_ops("ref"), x_TX, weights), dtype)


@pytest.mark.parametrize("name", ["linear", "linear in segments", "logits", "gate_up silu", "norm"])
def test_row_bits(name: str, ops: Ops) -> None:
    """Among more rows than one block, a row's bytes are those it has alone."""
    rng = random.Random(name)
    for shape, rows in (("odd", 70), ("stories260k", 300)):
        for dtype in DTYPES:
            x_TX, weights = row_inputs(ROW_OPS[name], SHAPES[shape], rows, dtype)
            whole = run(ROW_OPS[name], ops, x_TX.clone(), weights)
            for row in rng.sample(range(rows), 3):
                alone = run(ROW_OPS[name], ops, x_TX[row : row + 1].clone(), weights)
                assert torch.equal(alone[0], whole[row]), (shape, dtype, row)


@pytest.mark.parametrize("rows", [33, 70])
@pytest.mark.parametrize(
    ("inputs", "segments"), [(514, 2), (2728, 8), (640, 2), (1032, 4), (1536, 8), (777, 1), (8192, 1)]
)
def test_row_bits_of_deep_sums(inputs: int, segments: int, rows: int, ops: Ops) -> None:
    """Sums over several pieces, segments of odd length, and more than one stack of rows. One addend of 2^30 in front
    of a pair of inputs makes another order of its two products another number."""
    for dtype in (torch.float32, torch.bfloat16):
        x_TK, w_NK = torch.randn(rows, inputs).to(dtype), torch.randn(40, inputs).to(dtype)
        x_TK[:, :: inputs // 7], w_NK[:, :: inputs // 7] = 2.0**15, 2.0**15
        x_TK[:, 1 :: inputs // 7], w_NK[:, 1 :: inputs // 7] = 2.0**15, -(2.0**15)
        (weight_NK,) = packed(ops, w_NK)
        assert weight_NK is not None
        whole = ops.linear(x_TK, weight_NK, None, segments)
        for row in (0, 31, 32, rows - 1):
            assert torch.equal(ops.linear(x_TK[row : row + 1], weight_NK, None, segments)[0], whole[row]), (dtype, row)


def test_what_would_be_read_as_it_lies_is_refused() -> None:
    ops, x_TK = make_ops("cpu"), torch.randn(3, 32)
    (weight_NK,) = packed(ops, torch.randn(8, 32))
    assert weight_NK is not None
    for bad in (x_TK.bfloat16(), x_TK[:, :16]):
        with pytest.raises((TypeError, ValueError)):
            ops.linear(bad, weight_NK, None)
    with pytest.raises(TypeError):
        ops.linear(x_TK, weight_NK, torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError):
        ops.linear(x_TK, weight_NK, None, 3)
    with pytest.raises(TypeError):
        ops.add_norm(x_TK, x_TK.bfloat16(), torch.ones(32).bfloat16(), 1e-5)
    with pytest.raises(TypeError):
        ops.norm(x_TK, torch.ones(32).bfloat16(), 1e-5)
    with pytest.raises(TypeError, match=r"float64: .*float32, torch\.bfloat16, torch\.float16"):
        ops.norm(x_TK.double(), torch.ones(32).double(), 1e-5)


def test_only_whole_matrices_are_packed(ops: Ops) -> None:
    """In place: what lies between their rows belongs to somebody else."""
    for base, part in ((torch.randn(32, 128), (slice(None), slice(64))), (torch.randn(3, 32, 64), (slice(None), 0))):
        before = base.clone()
        for matrix in (base[part], base.transpose(-1, -2)):
            with pytest.raises(TypeError, match="strides"):
                ops.pack(matrix)
        assert torch.equal(base, before)
    with pytest.raises(TypeError, match=r"float64: .*float32, torch\.bfloat16, torch\.float16"):
        ops.pack(torch.randn(32, 64).double())


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_ids_that_a_table_does_not_have(bits: int, ops: Ops) -> None:
    table_VD = torch.randn(40, 64)
    weight = ops.pack(quantize(table_VD, bits, 32) if bits else table_VD)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for wrong in (-1, 40, 2**62):
            with pytest.raises(IndexError):
                ops.embed(torch.tensor([3, wrong, 39]), weight, torch.float32)
        assert ops.embed(torch.tensor([0, 39]), weight, torch.float32).isfinite().all()
    for ids_T, dtype in ((torch.tensor([3]).int(), torch.float32), (torch.tensor([3]), torch.bfloat16)):
        if bits == 0 or ids_T.dtype == torch.int32:
            with pytest.raises(TypeError):
                ops.embed(ids_T, weight, dtype)


def changes(batch: Batch) -> dict[str, Batch]:
    """Batches that are not of the rows, requests, contexts or blocks of this one."""
    (group,) = batch.groups
    slots_T, tables_RM = group.slots_T, group.tables_RM
    return {
        "a position less": replace(batch, positions_T=batch.positions_T[1:]),
        "a slot less": replace(batch, groups=[GroupBatch(slots_T[1:], tables_RM)]),
        "a slot more": replace(batch, groups=[GroupBatch(torch.cat((slots_T, slots_T[:1])), tables_RM)]),
        "a start less": replace(batch, row_starts_R1=batch.row_starts_R1[1:]),
        "a context less": replace(batch, contexts_R=batch.contexts_R[1:]),
        "a context of more than its blocks": replace(batch, contexts=[batch.contexts[0] + 999, *batch.contexts[1:]]),
        "a table less": replace(batch, groups=[GroupBatch(slots_T, tables_RM[1:])]),
        "a column less": replace(batch, groups=[GroupBatch(slots_T, tables_RM[:, :-1].contiguous())]),
        "a row less": replace(batch, row_starts=[*batch.row_starts[:-1], batch.row_starts[-1] - 1]),
        "other blocks": replace(batch, block_size=2 * batch.block_size),
    }


CHANGES = ["", *(f"a {thing} less" for thing in ("position", "slot", "start", "context", "table", "column", "row"))]
CHANGES += ["a slot more", "a context of more than its blocks", "other blocks"]
WRITES = ["a position less", "a slot less", "a slot more", "other blocks"]
"""What matters where K and V are written."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_of_another_step_is_refused(change: str) -> None:
    """No kernel reads past the end of a vector or a table, or strides through a pool of other blocks."""
    ops, shape = make_ops("cpu"), SHAPES["stories260k"]
    sequences = mixed(shape, torch.float32)
    batch, kv = paged(ops, sequences, 16, None, CPU)
    if change:
        batch = changes(batch)[change]
    q_TNd = torch.cat([sequence.q_TNd for sequence in sequences])

    def attend() -> Tensor:
        return ops.attention(q_TNd, kv, batch, 0, None, 0.3)

    def write() -> Tensor:
        rope_Pd, qkv_TC = torch.zeros(max(batch.contexts), shape.head_dim), torch.randn(len(q_TNd), shape.qkv)
        return ops.qk_norm_rope_write(qkv_TC, None, EPS, rope_Pd, kv, batch, 0)

    for run_op, refused in ((attend, bool(change)), (write, change in WRITES)):
        if refused:
            with pytest.raises(ValueError):
                run_op()
        else:
            assert run_op().isfinite().all()


def test_heads_and_rope_tables_of_another_model_are_refused() -> None:
    ops, shape = make_ops("cpu"), SHAPES["stories260k"]  # 8 heads of 8 beside 4
    sequences = mixed(shape, torch.float32)
    batch, kv = paged(ops, sequences, 16, None, CPU)
    rows, longest = len(batch.positions_T), max(batch.contexts)
    for heads, head_dim in ((8, 4), (8, 16), (7, 8), (3, 8), (0, 8)):
        with pytest.raises(ValueError):
            ops.attention(torch.randn(rows, heads, head_dim), kv, batch, 0, None, 0.3)
    for width in (16 * 8 - 1, 16 * 8 + 1, 15 * 8, 8 * 8, 8):
        with pytest.raises(ValueError):
            ops.qk_norm_rope_write(torch.randn(rows, width), None, EPS, None, kv, batch, 0)
    for positions, rotated in ((longest - 1, 8), (longest, 10), (longest, 16)):
        rope_Pd = torch.zeros(positions, rotated)
        with pytest.raises(ValueError):
            ops.qk_norm_rope_write(torch.randn(rows, 16 * 8), None, EPS, rope_Pd, kv, batch, 0)
    with pytest.raises(ValueError):
        ops.attention(torch.randn(rows, 8, 8), replace(kv, v_PBHd=kv.v_PBHd[1:]), batch, 0, None, 0.3)


def test_vectors_of_another_length_are_refused() -> None:
    ops, x_TK, ones_N = make_ops("cpu"), torch.randn(3, 48), torch.ones(48)
    weight_NK, gate_up_E2FD, down_EDF = packed(ops, torch.randn(8, 48), torch.randn(2, 64, 48), torch.randn(2, 48, 32))
    assert weight_NK is not None and gate_up_E2FD is not None and down_EDF is not None
    chosen_TA, weights_TA = torch.tensor([[0], [1], [0]]), torch.ones(3, 1)

    def experts(up: int, down: int, rows: int, gates: int) -> Tensor:
        biases, shared = (torch.ones(2, up), torch.ones(2, down)), (torch.ones(rows, 48), torch.ones(gates, 1))
        given = (gate_up_E2FD, biases[0], down_EDF, biases[1])
        return ops.experts(x_TK, chosen_TA, weights_TA, *given, "silu", shared)  # type: ignore[arg-type]

    assert ops.linear(x_TK, weight_NK, torch.ones(8), 4).isfinite().all() and experts(64, 48, 3, 3).isfinite().all()
    for wrong in (47, 49):
        with pytest.raises(ValueError, match="48 numbers"):
            ops.norm(x_TK, torch.ones(wrong), EPS)
        with pytest.raises(ValueError, match="48 numbers"):
            ops.layer_norm(x_TK, ones_N, torch.ones(wrong), EPS)
        with pytest.raises(ValueError, match="144 numbers"):
            ops.add_norm(x_TK, torch.ones(3, wrong), ones_N, EPS)
        with pytest.raises(ValueError, match="8 numbers"):
            ops.linear(x_TK, weight_NK, torch.ones(wrong - 40))
    for sizes in ((63, 48, 3, 3), (64, 47, 3, 3), (64, 48, 2, 3), (64, 48, 3, 2)):
        with pytest.raises(ValueError, match="numbers are read"):
            experts(*sizes)
    for segments in (3, 6, 0, -1):
        with pytest.raises(ValueError, match=f"in {segments} segments"):
            ops.linear(x_TK, weight_NK, None, segments)


def test_a_batch_is_read_as_what_it_is() -> None:
    ops, shape = make_ops("cpu"), SHAPES["odd"]
    sequences = mixed(shape, torch.float32)[:2]
    batch, kv = paged(ops, sequences, 16, None, CPU)
    q_TNd, d = torch.cat([s.q_TNd for s in sequences]), shape.head_dim
    qkv_TC, rope_Pd = torch.randn(len(q_TNd), shape.qkv), torch.ones(40, d)

    def write(norms: tuple[int, int] | None = None, rope_Pd: Tensor = rope_Pd, **changes: Any) -> None:
        weights = None if norms is None else (torch.ones(norms[0]), torch.ones(norms[1]))
        ops.qk_norm_rope_write(qkv_TC, weights, EPS, rope_Pd, kv, replace(batch, **changes), 0)

    def attend(sinks: int = 3, slopes: int = 3, **changes: Any) -> None:
        rest = (None, torch.ones(sinks), torch.ones(slopes))
        ops.attention(q_TNd, kv, replace(batch, **changes), 0, None, 1.0, *rest)

    for good in (None, (d, d), (3 * d, d)):
        write(good)
    attend()
    slots_T = batch.groups[0].slots_T.int()
    for other in ({"positions_T": batch.positions_T.int()}, {"groups": [replace(batch.groups[0], slots_T=slots_T)]}):
        with pytest.raises(TypeError, match="int32"):
            write(**other)
    with pytest.raises(TypeError, match="float64"):
        write(rope_Pd=rope_Pd.double())
    for name in ("row_starts_R1", "contexts_R"):
        with pytest.raises(TypeError, match="int32"):
            attend(**{name: getattr(batch, name).int()})
    for norms in ((d, 3 * d), (3 * d, 3 * d), (2 * d, d), (2 * d, 2 * d), (d - 1, d - 1), (d, d + 1)):
        with pytest.raises(ValueError, match="numbers are read"):
            write(norms)
    for count in ((2, 3), (3, 4)):
        with pytest.raises(ValueError, match="3 numbers"):
            attend(*count)


def test_groups_are_whole() -> None:
    ops, scales_NG = make_ops("cpu"), torch.ones(4, 2).half()
    assert ops.quantize is not None
    for bits in (8, 4):
        with pytest.raises(ValueError, match="48 inputs in groups of 32"):
            ops.quantize(torch.randn(4, 48), bits, 32)
    codes_NK, zeros_NG = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 2, dtype=torch.uint8)
    for weight in (
        GroupedWeight(torch.ones(4, 65, dtype=torch.int8), scales_NG),
        GroupedWeight(codes_NK, scales_NG[:3]),
        GroupedWeight(codes_NK.byte(), scales_NG, zeros_NG[:3]),
    ):
        with pytest.raises(ValueError):
            ops.pack(weight)
    for weight in (
        GroupedWeight(codes_NK.int(), scales_NG),
        GroupedWeight(codes_NK, scales_NG.float()),
        GroupedWeight(codes_NK.byte(), scales_NG, zeros_NG.int()),
    ):
        with pytest.raises(TypeError):
            ops.pack(weight)


def test_a_query_that_is_not_contiguous(ops: Ops) -> None:
    sequences = mixed(SHAPES["wide heads"], torch.float32)
    strided = [replace(s, q_TNd=s.q_TNd.transpose(0, 1).contiguous().transpose(0, 1)) for s in sequences[:1]]
    assert torch.equal(run_attention(ops, strided, 16, None)[0], run_attention(ops, sequences[:1], 16, None)[0])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", ["odd", "wide heads", "qwen2.5-0.5b"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_attention(kv_dtype: torch.dtype | None, dtype: torch.dtype, shape: str, window: int | None, ops: Ops) -> None:
    sequences, more = mixed(SHAPES[shape], dtype), {"kv_dtype": kv_dtype}
    whole = run_attention(ops, sequences, 16, window, **more)
    for ours, ref in zip(whole, run_attention(make_ops("ref"), sequences, 16, window, **more), strict=True):
        agree(ours, ref, dtype)
    for sequence, expected in zip(sequences, whole, strict=True):
        assert torch.equal(run_attention(ops, [sequence], SEGMENT, window, seed=1, **more)[0], expected)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("shape", ["odd", "wide heads", "qwen2.5-0.5b"])
def test_a_long_request_is_cut_without_a_trace(shape: str, window: int | None, ops: Ops) -> None:
    """Threads that have nothing else to do share a request's segments; a few rows, and more than fit a piece."""
    more = {} if window is None else {"slopes_N": 2.0 ** -torch.linspace(1, 8, SHAPES[shape].heads)}
    for context, count in ((2100, 1), (1023, 2), (1800, 30)):
        sequence = Sequence.random(SHAPES[shape], context, count, torch.bfloat16)
        torch.set_num_threads(1)
        (expected,) = run_attention(ops, [sequence], 16, window, **more)
        for threads in (2, 8):
            torch.set_num_threads(threads)
            assert torch.equal(run_attention(ops, [sequence], 16, window, **more)[0], expected)
    torch.set_num_threads(1)


def test_special_numbers(ops: Ops) -> None:
    """NaN and infinity come out where they come out of ``ref``, and nowhere else."""
    op, shape = ROW_OPS["gate_up silu"], SHAPES["stories260k"]
    for name in ("linear", "gate_up silu", "norm"):
        op = ROW_OPS[name]
        x_TX, weights = row_inputs(op, shape, 40, torch.bfloat16)
        x_TX[3, 5], x_TX[7, 1], x_TX[11, 2] = float("nan"), float("inf"), 3e38
        ours, ref = run(op, ops, x_TX, weights), run(op, make_ops("ref"), x_TX, weights)
        assert torch.equal(ours.isnan().any(1), ref.isnan().any(1)), name
        assert not ours[12:].isnan().any()


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("at", ["q_TNd", "k_TPast", "v_TPast"])
def test_special_numbers_in_attention(at: str, kv_dtype: torch.dtype | None, ops: Ops) -> None:
    """They spoil the rows that see them, as in ``ref``, and no other request."""
    sequences = mixed(SHAPES["qwen2.5-0.5b"], torch.bfloat16)
    for bad in (float("nan"), float("inf")):
        spoiled = getattr(sequences[3], at).clone()
        spoiled[-6, 1, 3] = bad
        given = [*sequences[:3], replace(sequences[3], **{at: spoiled}), *sequences[4:]]
        ours = run_attention(ops, given, 16, None, kv_dtype=kv_dtype)
        ref = run_attention(make_ops("ref"), given, 16, None, kv_dtype=kv_dtype)
        for i, (mine, theirs) in enumerate(zip(ours, ref, strict=True)):
            assert torch.equal(mine.isfinite(), theirs.isfinite()), (bad, i)
            assert mine.isfinite().all() or i == 3
            agree(mine.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0), torch.bfloat16)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, one element behind an address that vectors like."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ROW_OPS)
def test_addresses_that_are_aligned_to_elements_alone(name: str, ops: Ops) -> None:
    for dtype in DTYPES:
        x_TX, weights = row_inputs(ROW_OPS[name], SHAPES["odd"], 5, dtype)
        moved = [shifted(w) if w.ndim < 2 else ops.pack(shifted(w)) for w in weights]
        ours = ROW_OPS[name].run(ops, shifted(x_TX), *moved)
        assert torch.equal(ours, run(ROW_OPS[name], ops, x_TX, weights)), dtype


@pytest.mark.parametrize("other", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sets_with_a_fused_multiply_add_agree(dtype: torch.dtype, other: str) -> None:
    """Bit for bit with AVX2, but for products of bf16 where an instruction adds pairs."""
    if dtype == torch.bfloat16 and ("bf16" in other or "amx" in other):
        pytest.skip("pairs of bf16 are added in another order")
    before, found = _native.chosen(), []
    cases = [
        (op, *row_inputs(op, SHAPES[shape], 37, dtype)) for op in ROW_OPS.values() for shape in ("odd", "one head")
    ]
    sequences = mixed(SHAPES["odd"], dtype)
    for name in ("avx2", other):
        _native.choose(name)
        ops = make_ops("cpu")
        rows = [run(op, ops, x_TX.clone(), weights) for op, x_TX, weights in cases]
        kept = [run_attention(ops, sequences, 16, 50, kv_dtype=kv_dtype) for kv_dtype in (None, torch.int8)]
        found.append(rows + kept[0] + kept[1])
    _native.choose(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 13))
def test_every_half_is_read_and_written(bits: int, ops: Ops) -> None:
    """All numbers of the two-byte types through a product with 1: the same number, NaN for NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        x_T1 = torch.arange(bits, bits + (1 << 13), dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1)
        ours = ops.linear(x_T1, *packed(ops, torch.ones(1, 1, dtype=dtype)), None)
        assert torch.equal(ours.isnan(), x_T1.isnan())
        tiny = 2.0**-126  # fp32 below this is zero in the kernels
        kept = ~x_T1.isnan() & (x_T1.float().abs() >= tiny)
        assert torch.equal(ours[kept], x_T1[kept])


def test_threads_of_two_callers(shape: Shape) -> None:
    """Calls from several threads take turns; a team is remade when its size changes."""
    ops, op = make_ops("cpu"), ROW_OPS["gate_up silu"]
    x_TX, weights = row_inputs(op, shape, 9, torch.bfloat16)
    expected, wrong = run(op, ops, x_TX, weights), []

    def work(threads: int) -> None:
        with torch.inference_mode():
            for _ in range(50):
                torch.set_num_threads(threads)
                if not torch.equal(run(op, ops, x_TX, weights), expected):
                    wrong.append(threads)

    workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    assert not wrong


def test_a_forked_child_has_threads_of_its_own() -> None:
    """Also where another thread of the parent is inside a kernel at that moment."""
    ops, x_TK, w_NK = make_ops("cpu"), torch.randn(64, 256), torch.randn(512, 256)
    torch.set_num_threads(2)
    (weight_NK,) = packed(ops, w_NK)
    assert weight_NK is not None
    expected: Tensor = ops.linear(x_TK, weight_NK, None)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            ops.linear(x_TK, weight_NK, None)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                os._exit(0 if ops.linear(x_TK, weight_NK, None).equal(expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        done.set()
        worker.join()
        torch.set_num_threads(1)
