"""Ops on the paged cache, and attention without one: the same three questions as ``test_ops``."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsuite import BACKENDS, CPU, DTYPES, EPS, EXACT, Place, Shape, agree, mixed, on, run_attention
from penstock.base import ConfigError
from penstock.kernels import SEGMENT, Batch, GroupBatch, KVLayer, Ops, make_ops

INT8 = [name for name in BACKENDS if name != "torch"]
SCORINGS = ["plain", "capped", "sinks", "capped with sinks", "slopes", "capped with sinks and slopes"]


def scoring(kind: str, shape: Shape) -> dict[str, float | Tensor | None]:
    """A cap that the scores of random vectors reach, sinks among the greatest of them, and slopes under which one head
    sees a few keys and another some hundreds."""
    sinks_N, slopes_N = 2 + 2 * torch.randn(shape.heads), 2.0 ** -torch.linspace(1, 8, shape.heads)
    return {
        "softcap": 1.5 if "capped" in kind else None,
        "sinks_N": sinks_N if "sinks" in kind else None,
        "slopes_N": slopes_N if "slopes" in kind else None,
    }


@pytest.mark.parametrize("window", [None, 1, 33, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, window: int | None, shape: Shape, place: Place) -> None:
    (ops, device), sequences = place, mixed(shape, dtype)
    ref = torch.cat(run_attention(make_ops("ref"), sequences, 16, window))
    agree(torch.cat(run_attention(ops, sequences, 16, window, device)), ref, dtype)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("kind", SCORINGS[1:])
def test_attention_with_more_than_a_scale(
    kind: str, window: int | None, shape: Shape, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few scores at once that chunks are cut into pieces.
    monkeypatch.setattr("penstock.kernels.torch.scored.SCORES_AT_ONCE", 7 * 200 * shape.heads)
    (ops, device), more = place, scoring(kind, shape)
    for dtype in (torch.float32, torch.bfloat16):
        sequences = [s for s in mixed(shape, dtype) if s.context < 600]
        ref = torch.cat(run_attention(make_ops("ref"), sequences, 16, window, **more))
        agree(torch.cat(run_attention(ops, sequences, 16, window, device, **more)), ref, dtype)


@pytest.mark.parametrize("window", [None, 1, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "slopes"])
@pytest.mark.parametrize("backend", INT8)
def test_attention_to_int8(backend: str, kind: str, dtype: torch.dtype, window: int | None, shape: Shape) -> None:
    """The same as ``ref``, and near attention to what was not rounded."""
    sequences, ops = [s for s in mixed(shape, dtype) if s.context < 600], make_ops(backend)
    more = scoring(kind, shape)
    ref = torch.cat(run_attention(make_ops("ref"), sequences, 16, window, kv_dtype=torch.int8, **more))
    agree(torch.cat(run_attention(ops, sequences, 16, window, kv_dtype=torch.int8, **more)), ref, dtype)
    exact = torch.cat(run_attention(make_ops("ref"), sequences, 16, window, **more))
    assert 0 < float((ref - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("kind", SCORINGS)
def test_attention_is_attention(kind: str, shape: Shape) -> None:
    """ref itself, against the textbook in float64."""
    window, more = 150, scoring(kind, shape)
    for sequence in mixed(shape, torch.float32):
        (ours,) = run_attention(make_ops("ref"), [sequence], 32, window, **more)
        q, k, v = (x.double() for x in (sequence.q_TNd, sequence.k_TPast, sequence.v_TPast))
        group = shape.heads // shape.kv_heads
        scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(group, 1)) * shape.head_dim**-0.5
        if more["softcap"] is not None:
            scores = more["softcap"] * (scores / more["softcap"]).tanh()
        at = torch.arange(sequence.context)
        ahead = at[None] - at[sequence.context - sequence.count :, None]
        if more["slopes_N"] is not None:
            scores = scores + more["slopes_N"].double()[:, None, None] * ahead
        scores[:, (ahead > 0) | (ahead <= -window)] = float("-inf")
        if more["sinks_N"] is not None:
            sinks = more["sinks_N"].double()[:, None, None].expand(-1, sequence.count, 1)
            scores = torch.cat((scores, sinks), -1)
            v = torch.cat((v, torch.zeros_like(v[:1])))
        textbook = torch.einsum("nts,snd->tnd", scores.softmax(-1), v.repeat_interleave(group, 1)).flatten(1)
        agree(ours, textbook.float(), torch.float32)


def test_one_kind_of_slice_at_a_time(shape: Shape, place: Place) -> None:
    """Pure decode batches and pure prefill batches take paths of their own in fast backends."""
    (ops, device), sequences = place, mixed(shape, torch.float32)
    for part in ([s for s in sequences if s.count == 1], [s for s in sequences if s.count > 1]):
        ref = torch.cat(run_attention(make_ops("ref"), part, 16, None))
        agree(torch.cat(run_attention(ops, part, 16, None, device)), ref, torch.float32)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("window", "kind"), [(None, "plain"), (60, "plain"), (None, "capped with sinks"), (60, "slopes")]
)
def test_attention_bits(
    window: int | None, kind: str, kv_dtype: torch.dtype | None, backend: str, shape: Shape
) -> None:
    """Whatever the batch, its order, the chunks, the block size and the threads: the same bytes."""
    ops, more = make_ops(backend), scoring(kind, shape) | {"kv_dtype": kv_dtype}
    sequences = [s for s in mixed(shape, torch.bfloat16) if s.context < 600]
    expected = run_attention(ops, sequences, 16, window, **more)
    for threads, block_size in ((1, SEGMENT), (2, 1), (4, 16)):
        torch.set_num_threads(threads)
        order = random.Random(threads).sample(range(len(sequences)), len(sequences))
        for part in (order[:3], order[3:4], order[4:]):
            mates = [sequences[i] for i in part]
            for index, out in zip(
                part, run_attention(ops, mates, block_size, window, CPU, threads, **more), strict=True
            ):
                assert torch.equal(out, expected[index]), (threads, block_size, index)
    place = next(i for i, s in enumerate(sequences) if s.count > 5 and s.context > s.count)
    chunk = sequences[place]
    for row in range(chunk.count):
        cut = chunk.context - chunk.count + row + 1
        alone = dataclasses.replace(
            chunk, q_TNd=chunk.q_TNd[row : row + 1], k_TPast=chunk.k_TPast[:cut], v_TPast=chunk.v_TPast[:cut], count=1
        )
        (out,) = run_attention(ops, [alone], 16, window, **more)
        assert torch.equal(out[0], expected[place][row])


WHOLE = [7, 1, 0, 33, 12, 12]
"""Rows of the sequences that the encoders' attention is tested with; one has none."""


def starts_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_whole(dtype: torch.dtype, shape: Shape, place: Place) -> None:
    (ops, device), starts = place, starts_of(WHOLE)
    width, scale = shape.heads * shape.head_dim, shape.head_dim**-0.5
    qkv_TC = torch.randn(starts[-1], 3 * width).to(dtype)
    ref = make_ops("ref").attend_whole(qkv_TC, shape.heads, starts, scale)
    agree(ops.attend_whole(qkv_TC.to(device), shape.heads, starts, scale), ref, dtype)
    for start, end in pairwise(starts) if dtype == torch.float32 else ():
        q, k, v = qkv_TC[start:end].double().view(-1, 3, shape.heads, shape.head_dim).permute(1, 2, 0, 3)
        textbook = ((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1).flatten(1)
        if end > start:
            agree(ref[start:end], textbook.float(), dtype)


def test_attend_whole_of_nothing(shape: Shape, place: Place) -> None:
    ops, device = place
    width = shape.heads * shape.head_dim
    for starts in ([0], [0, 0, 0]):
        out = ops.attend_whole(torch.empty(0, 3 * width, device=device), shape.heads, starts, 1.0)
        assert out.shape == (0, width)


@pytest.mark.parametrize("backend", EXACT)
def test_attend_whole_bits(backend: str, shape: Shape) -> None:
    """A sequence alone, and in any company: the same bytes."""
    ops, starts = make_ops(backend), starts_of(WHOLE)
    qkv_TC = torch.randn(starts[-1], 3 * shape.heads * shape.head_dim).bfloat16()
    expected = ops.attend_whole(qkv_TC, shape.heads, starts, 0.3)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for start, end in pairwise(starts):
            alone = ops.attend_whole(qkv_TC[start:end], shape.heads, [0, end - start], 0.3)
            assert torch.equal(alone, expected[start:end])


def run_write(
    ops: Ops,
    shape: Shape,
    qkv_TC: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    slots: list[int],
    first: int,
    rotated: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Tensor, KVLayer]:
    """``rotated``: elements of a head, all by default; 0 for none, and no table."""
    device, count = qkv_TC.device, len(qkv_TC)
    (kv,) = ops.allocate_kv(1, 8, 16, shape.kv_heads, shape.head_dim, kv_dtype or qkv_TC.dtype, device)
    positions = torch.arange(first, first + count, device=device)
    group = GroupBatch(torch.tensor(slots, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device))
    ends, context = torch.tensor([0, count]), torch.tensor([first + count])
    batch = Batch(positions, [0, count], ends.to(device), [first + count], context.to(device), 16, [group])
    rotated = shape.head_dim if rotated is None else rotated
    rope_Pd = rope(rotated).to(device) if rotated else None
    return ops.qk_norm_rope_write(qkv_TC, norms, EPS, rope_Pd, kv, batch, 0), kv


def rope(rotated: int) -> Tensor:
    angles = torch.arange(64.0)[:, None] * torch.rand(rotated // 2, generator=torch.Generator().manual_seed(3))
    return torch.cat((angles.cos(), angles.sin()), 1)


def norm_weights(kind: str, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    heads = (shape.heads, shape.kv_heads) if kind == "all" else (1, 1)
    sizes = [count * shape.head_dim for count in heads]
    return None if kind == "none" else (torch.rand(sizes[0]).to(dtype), torch.rand(sizes[1]).to(dtype))


@pytest.mark.parametrize(
    ("norm", "part"), [("none", 1), ("head", 1), ("all", 1), ("none", 2), ("head", 2), ("all", 0), ("none", 0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_write(dtype: torch.dtype, norm: str, part: int, shape: Shape, place: Place) -> None:
    """``part``: the rotation takes one part in so many of a head; 0 for no rotation."""
    ops, device = place
    rotated = shape.head_dim // part // 2 * 2 if part else 0
    qkv_TC, norms = torch.randn(6, shape.qkv).to(dtype), norm_weights(norm, shape, dtype)
    slots = [5, 127, -1, 40, 0, -1]
    ref_q, ref_kv = run_write(make_ops("ref"), shape, qkv_TC, norms, slots, 9, rotated)
    on_device = tuple(on(device, *norms)) if norms else None
    q, kv = run_write(ops, shape, qkv_TC.to(device), on_device, slots, 9, rotated)
    agree(q, ref_q, dtype)
    agree(kv.k_PBHd[:8], ref_kv.k_PBHd[:8], dtype)
    agree(kv.v_PBHd[:8], ref_kv.v_PBHd[:8], dtype)
    untouched = [slot for slot in range(128) if slot not in slots]
    assert not kv.k_PBHd[:8].flatten(0, 1)[untouched].any() and not kv.v_PBHd[:8].flatten(0, 1)[untouched].any()


@pytest.mark.parametrize("norm", ["none", "head", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", INT8)
def test_write_int8(backend: str, dtype: torch.dtype, norm: str, shape: Shape) -> None:
    """Half a step from the fp32 value, which a float32 model stores; from any value that is near it, a whole one."""
    qkv_TC, norms, slots = (
        torch.randn(6, shape.qkv).to(dtype),
        norm_weights(norm, shape, dtype),
        [5, 127, -1, 40, 0, -1],
    )
    wide = tuple(w.float() for w in norms) if norms else None
    q, kv = run_write(make_ops(backend), shape, qkv_TC, norms, slots, 9, kv_dtype=torch.int8)
    _, exact = run_write(make_ops("ref"), shape, qkv_TC.float(), wide, slots, 9)
    agree(q, run_write(make_ops("ref"), shape, qkv_TC, norms, slots, 9)[0], dtype)
    for codes, scales, x in zip(kv.pools()[:2], kv.pools()[2:], (exact.k_PBHd, exact.v_PBHd), strict=True):
        step = scales.float()[..., None]
        assert bool(((codes * step - x).abs() <= 0.5001 * step + 1e-6).all())
        assert bool((step - x.abs().amax(-1, keepdim=True) / 127 <= 2**-8 * step).all())


def test_int8_of_special_numbers(shape: Shape) -> None:
    """As in ``ref``: infinity and NaN, nothing, next to nothing, ties, and numbers near the largest."""
    qkv_TC = torch.randn(7, shape.qkv)
    qkv_TC[0, -1], qkv_TC[1, -1], qkv_TC[2], qkv_TC[3] = float("nan"), float("-inf"), 0.0, 1e-37
    qkv_TC[4], qkv_TC[5, ::2] = torch.arange(shape.qkv) % 128 - 0.5, 3e38
    runs = [run_write(make_ops(b), shape, qkv_TC, None, list(range(7)), 0, 0, torch.int8)[1] for b in INT8]
    for kv in runs:
        for ours, ref in zip(kv.pools(), runs[0].pools(), strict=True):
            torch.testing.assert_close(ours[0], ref[0], rtol=0, atol=0, equal_nan=True)
    assert runs[0].v_scales_PBH is not None
    last = runs[0].v_scales_PBH[0, :, -1]
    assert last[:2].isnan().all() and not last[2:4].any() and last[4:7].gt(0).all()


@pytest.mark.parametrize(("norm", "part"), [("none", 1), ("head", 1), ("all", 2), ("head", 0)])
def test_write_is_the_textbook(norm: str, part: int, shape: Shape) -> None:
    """ref itself, in float64: complex numbers turned by their angles."""
    rotated = shape.head_dim // part // 2 * 2 if part else 0
    qkv_TC, norms = torch.randn(6, shape.qkv), norm_weights(norm, shape, torch.float32)
    q_TNd, kv = run_write(make_ops("ref"), shape, qkv_TC, norms, list(range(6)), 9, rotated)
    widths = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = torch.split(qkv_TC.double(), widths, 1)
    turned = []
    for x, weight in ((q, norms and norms[0]), (k, norms and norms[1])):
        if weight is not None:
            x = F.rms_norm(x.view(6, -1, len(weight)), [len(weight)], weight.double(), EPS)
        x = x.reshape(6, -1, shape.head_dim)
        if rotated:
            real, imaginary = rope(rotated)[9:15].double().chunk(2, -1)
            a, b = x[..., :rotated].chunk(2, -1)
            z = torch.complex(a, b) * torch.complex(real, imaginary)[:, None]
            x = torch.cat((z.real, z.imag, x[..., rotated:]), -1)
        turned.append(x)
    agree(q_TNd, turned[0].float(), torch.float32)
    agree(kv.k_PBHd.flatten(0, 1)[:6], turned[1].float(), torch.float32)
    agree(kv.v_PBHd.flatten(0, 1)[:6], v.view(6, -1, shape.head_dim).float(), torch.float32)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("norm", ["head", "all"])
def test_write_bits(norm: str, backend: str, kv_dtype: torch.dtype | None, shape: Shape) -> None:
    ops, norms = make_ops(backend), norm_weights(norm, shape, torch.float32)
    qkv_TC = torch.randn(7, shape.qkv)
    q, kv = run_write(ops, shape, qkv_TC, norms, list(range(7)), 20, kv_dtype=kv_dtype)
    for row in range(7):
        q_1, kv_1 = run_write(ops, shape, qkv_TC[row : row + 1], norms, [row], 20 + row, kv_dtype=kv_dtype)
        assert torch.equal(q[row], q_1[0])
        assert all(torch.equal(a[0, row], b[0, row]) for a, b in zip(kv.pools(), kv_1.pools(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_copy_blocks(dtype: torch.dtype, place: Place) -> None:
    ops, device = place
    layers = ops.allocate_kv(3, 6, 4, 2, 8, dtype, device)
    for pool in (pool for layer in layers for pool in layer.pools()):
        pool.random_(-100, 100)
    before = [[pool.clone() for pool in layer.pools()] for layer in layers]
    ops.copy_blocks(layers, [(0, 3), (0, 5), (4, 1)])
    ops.copy_blocks(layers, [])
    source = [0, 4, 2, 0, 4, 0]
    for layer, old in zip(layers, before, strict=True):
        assert all(torch.equal(new[:6], pool[source]) for new, pool in zip(layer.pools(), old, strict=True))


@pytest.mark.parametrize("block_size", [0, -16, 3, 48, 256])
def test_block_sizes_divide_the_segment(block_size: int, place: Place) -> None:
    ops, device = place
    with pytest.raises(ConfigError) as error:
        ops.allocate_kv(1, 2, block_size, 1, 8, torch.float32, device)
    assert error.value.code == "block_size_invalid"


def test_pools_start_as_zeros_and_take_memory_when_they_are_written(place: Place) -> None:
    ops, device = place
    before, gigabyte = resident(), 1 << 30
    (kv,) = ops.allocate_kv(1, gigabyte // (16 * 64 * 2 * 2), 16, 1, 64, torch.bfloat16, device)
    for pool in kv.pools():
        assert pool[-1].count_nonzero() == 0
        pool[0], pool[-1] = 1, 2
        assert pool[0].unique().tolist() == [1] and pool[-1].unique().tolist() == [2] and not pool[1].any()
    assert device.type != "cpu" or resident() - before < gigabyte // 8


def resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says what is resident")
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
