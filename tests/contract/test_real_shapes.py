"""The native kernels at the shapes that are served: a row has the same bytes at any place, among any number of others,
at any number of threads. On the processor's best instruction set; with ``--all`` on every one that has a fused
multiply-add."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from opsuite import EPS, SETS, Sequence, Shape, run_attention
from penstock.base.segments import ffn_segments, sum_segments
from penstock.kernels import Batch, GroupBatch, GroupedWeight, Ops, Weight, native

MODELS = {
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151_936),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 64, 128_256),
}
COUNTS = (1, 2, 5, 8, 9, 13, 14, 19, 31, 32, 33, 64, 97, 129, 300)
"""Numbers of rows on both sides of every size at which a kernel changes its way; 13, 14 and 19 rows are the ones with a
stack of four in ``widened.h``. Others are drawn."""
MOST = 400
KINDS = ("fp32", "bf16", "int8", "int4")
SLOW = [pytest.mark.slow]
BEST, *OTHERS = [name for name in SETS if name != "portable"] or SETS or [None]
pytestmark = [
    pytest.mark.skipif(not native(), reason="installed without a compiler"),
    pytest.mark.parametrize("ops", [BEST, *(pytest.param(name, marks=SLOW) for name in OTHERS)], indirect=True),
]


@pytest.fixture
def draws(request: pytest.FixtureRequest) -> int:
    """Numbers of rows that are drawn beside COUNTS."""
    return 12 if request.config.getoption("--all") else 4


def weight_of(kind: str, *shape: int) -> Weight:
    """[..., outputs, inputs] of random numbers; small integers are drawn as such, since to find the nearest ones of a
    large matrix takes long."""
    *outputs, inputs = shape
    groups = (*outputs, inputs // 32)
    if kind == "int8":
        codes_NK = torch.randint(-127, 128, shape, dtype=torch.int8)
        return GroupedWeight(codes_NK, (torch.rand(groups) / 4000).half())
    if kind == "int4":
        codes_NK = torch.randint(0, 16, shape, dtype=torch.uint8)
        zeros_NG = torch.randint(100, 141, groups, dtype=torch.uint8)
        return GroupedWeight(codes_NK, (torch.rand(groups) / 200).half(), zeros_NG)
    return torch.randn(shape).div_(inputs**0.5).to(dtype_of(kind))


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind == "fp32" else torch.bfloat16


def inputs_of(kind: str, width: int) -> Tensor:
    x_TK = torch.randn(MOST, width)
    x_TK[::7] *= 30  # rows of another size, whose neighbours must not see it
    return x_TK.to(dtype_of(kind))


def product(shape: Shape, slot: str) -> tuple[int, int, int]:
    """(outputs, inputs, segments of the sum)."""
    width = shape.heads * shape.head_dim
    return {
        "qkv": (width + 2 * shape.kv_heads * shape.head_dim, shape.hidden, 1),
        "out": (shape.hidden, width, sum_segments(shape.heads)),
        "gate_up": (2 * shape.ffn, shape.hidden, 1),
        "down": (shape.hidden, shape.ffn, ffn_segments(shape.ffn)),
        "head": (shape.vocab, shape.hidden, 1),
    }[slot]


def check(compute: Callable[[list[int]], Iterable[Tensor]], rng: random.Random, draws: int, most: int = MOST) -> None:
    """``compute`` makes tensors of some of the MOST rows: those of a row alone have the same bytes among others."""
    torch.set_num_threads(1)
    alone = {at: [out[0] for out in compute([at])] for at in rng.sample(range(MOST), 6)}
    for count in [*(count for count in COUNTS if count <= most), *rng.choices(range(1, most + 1), k=draws)]:
        at, place = rng.choice(list(alone)), rng.randrange(count)
        others = rng.sample([i for i in range(MOST) if i != at], count - 1)
        torch.set_num_threads(threads := rng.choice((1, 2, 3, 4)))
        among = compute([*others[:place], at, *others[place:]])
        for one, out in zip(alone[at], among, strict=True):
            assert out.dtype == one.dtype and bytes_of(out[place]) == bytes_of(one), (count, place, threads)


def bytes_of(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()


SLOTS: list[Any] = ["qkv", "out", "gate_up", "down", pytest.param("head", marks=SLOW)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("model", [pytest.param(name, marks=SLOW * (name != "qwen3-0.6b")) for name in MODELS])
def test_row_bits(model: str, slot: str, kind: str, draws: int, ops: Ops) -> None:
    rng = random.Random(f"{model} {slot} {kind}")
    outputs, inputs, segments = product(MODELS[model], slot)
    x_TK, weight = inputs_of(kind, inputs), ops.pack(weight_of(kind, outputs, inputs))

    def rows(some: list[int]) -> list[Tensor]:
        if slot == "head":
            return [ops.logits(x_TK[some], weight)]
        if slot == "gate_up":
            return [ops.gate_up(x_TK[some], weight, None, "silu")]
        return [ops.linear(x_TK[some], weight, None, segments)]

    check(rows, rng, draws, 40 if slot == "head" else MOST)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW * (kind in ("fp32", "int4"))) for kind in KINDS])
def test_expert_bits(kind: str, draws: int, ops: Ops) -> None:
    """The bench's ``moe-64``: 64 experts, of which each row has 8 by its own logits."""
    hidden, ffn, count, active = 1024, 512, 64, 8
    x_TD, router_ED = inputs_of(kind, hidden), ops.pack(weight_of("fp32" if kind == "fp32" else "bf16", count, hidden))
    gate_up, down = weight_of(kind, count, 2 * ffn, hidden), weight_of(kind, count, hidden, ffn)
    stacks = (ops.pack(gate_up), None, ops.pack(down), None)

    def rows(some: list[int]) -> tuple[Tensor, ...]:
        chosen_TA, weights_TA = ops.route(x_TD[some], router_ED, None, active, True)
        return chosen_TA, weights_TA, ops.experts(x_TD[some], chosen_TA, weights_TA, *stacks, "silu")

    check(rows, random.Random(kind), draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_norm_bits(model: str, dtype: torch.dtype, draws: int, ops: Ops) -> None:
    width, kind = MODELS[model].hidden, "fp32" if dtype == torch.float32 else "bf16"
    x_TD, delta_TD = inputs_of(kind, width), inputs_of(kind, width)
    weight_D, bias_D = (torch.randn(2, width) + 1).to(dtype)

    def rows(some: list[int]) -> tuple[Tensor, ...]:
        own = ops.norm(x_TD[some], weight_D, EPS), ops.layer_norm(x_TD[some], weight_D, bias_D, EPS)
        return *own, *ops.add_norm(delta_TD[some], x_TD[some], weight_D, EPS, 0.5)

    check(rows, random.Random(f"{model} {kind}"), draws)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_rope_and_write_bits(model: str, kv_dtype: torch.dtype, draws: int, ops: Ops) -> None:
    """Queries, and K and V as they lie in the pool, of a row at a position and a slot of its own."""
    shape, rng = MODELS[model], random.Random(model)
    qkv_TC = inputs_of("bf16", shape.qkv)
    norms_2d = (torch.randn(2, shape.head_dim) + 1).bfloat16()
    norms = (norms_2d[0], norms_2d[1]) if model == "qwen3-0.6b" else None
    rope_Pd, block_size, blocks = torch.randn(2 * MOST, shape.head_dim), 16, MOST
    positions_T = torch.tensor(rng.choices(range(2 * MOST), k=MOST))
    slots_T = torch.tensor(rng.sample(range(blocks * block_size), MOST))
    (kv,) = ops.allocate_kv(1, blocks, block_size, shape.kv_heads, shape.head_dim, kv_dtype, torch.device("cpu"))

    def rows(some: list[int]) -> list[Tensor]:
        none = torch.zeros(0, dtype=torch.int64)
        group = GroupBatch(slots_T[some], torch.zeros(0, 0, dtype=torch.int32))
        batch = Batch(positions_T[some], [], none, [], none, block_size, [group])
        for pool in kv.pools():
            pool.zero_()
        q_TNd = ops.qk_norm_rope_write(qkv_TC[some], norms, EPS, rope_Pd, kv, batch, 0)
        at = slots_T[some]
        return [q_TNd, *(pool[at // block_size, at % block_size] for pool in kv.pools())]

    check(rows, rng, draws)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_attention_bits(model: str, kv_dtype: torch.dtype | None, draws: int, ops: Ops) -> None:
    """A request of one row, of some and of a whole chunk, and some that are drawn, alone and among the others."""
    rng = random.Random(model)
    lengths = [(1, 1), (700, 1), (129, 129), (900, 40), (260, 7), (64, 64)]
    lengths += [(context := rng.randint(1, 1000), rng.randint(1, min(context, 60))) for _ in range(draws)]
    sequences = [Sequence.random(MODELS[model], context, count, torch.bfloat16) for context, count in lengths]
    torch.set_num_threads(1)
    alone = [run_attention(ops, [sequence], 16, None, kv_dtype=kv_dtype)[0] for sequence in sequences]
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        order = rng.sample(range(len(sequences)), len(sequences))
        block = rng.choice((16, 64))
        among = run_attention(ops, [sequences[i] for i in order], block, None, seed=threads, kv_dtype=kv_dtype)
        for i, out in zip(order, among, strict=True):
            assert torch.equal(out, alone[i]), (lengths[i], threads, block)
