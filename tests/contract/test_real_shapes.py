"""The native kernels at the shapes that are served: a row has the same bytes at any place, among any number of others,
at any number of threads, on every instruction set that computes with the same numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from opsuite import Sequence, Shape, run_attention
from penstock.base.segments import ffn_segments, sum_segments
from penstock.kernels import GroupedWeight, Weight, make_ops, native

pytestmark = pytest.mark.skipif(not native(), reason="installed without a compiler")

MODELS = {
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151_936),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 64, 128_256),
}
COUNTS = (1, 2, 5, 8, 9, 31, 32, 33, 64, 129, 300)
"""Numbers of rows on both sides of every size at which a kernel changes its way."""
KINDS = ("fp32", "bf16", "int8", "int4")


def weight_of(kind: str, outputs: int, inputs: int) -> Weight:
    """Random numbers; small integers are drawn as such, since to find the nearest ones of a large matrix takes long."""
    groups = (outputs, inputs // 32)
    if kind == "int8":
        codes_NK = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return GroupedWeight(codes_NK, (torch.rand(groups) / 4000).half())
    if kind == "int4":
        codes_NK = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        zeros_NG = torch.randint(100, 141, groups, dtype=torch.uint8)
        return GroupedWeight(codes_NK, (torch.rand(groups) / 200).half(), zeros_NG)
    return torch.randn(outputs, inputs).div_(inputs**0.5).to(torch.float32 if kind == "fp32" else torch.bfloat16)


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


SLOW = [pytest.mark.slow]
SLOTS: list[Any] = ["qkv", "out", "gate_up", "down", pytest.param("head", marks=SLOW)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("model", [pytest.param(name, marks=SLOW * (name != "qwen3-0.6b")) for name in MODELS])
def test_row_bits(model: str, slot: str, kind: str) -> None:
    ops, rng = make_ops("cpu"), random.Random(f"{model} {slot} {kind}")
    outputs, inputs, segments = product(MODELS[model], slot)
    x_TK = torch.randn(max(COUNTS), inputs)
    x_TK[::7] *= 30  # rows of another size, whose neighbours must not see it
    x_TK = x_TK if kind == "fp32" else x_TK.bfloat16()
    weight = ops.pack(weight_of(kind, outputs, inputs))

    def rows(some_TK: Tensor) -> Tensor:
        if slot == "head":
            return ops.logits(some_TK, weight)
        if slot == "gate_up":
            return ops.gate_up(some_TK, weight, None, "silu")
        return ops.linear(some_TK, weight, None, segments)

    torch.set_num_threads(1)
    alone = {at: rows(x_TK[at : at + 1]) for at in rng.sample(range(len(x_TK)), 6)}
    for count in COUNTS if slot != "head" else COUNTS[:8]:
        at = rng.choice(list(alone))
        others = rng.sample([i for i in range(len(x_TK)) if i != at], count - 1)
        place = rng.randrange(count)
        torch.set_num_threads(threads := rng.choice((1, 2, 3, 4)))
        among = rows(x_TK[[*others[:place], at, *others[place:]]])
        assert torch.equal(among[place : place + 1], alone[at]), (count, place, threads)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_attention_bits(model: str, kv_dtype: torch.dtype | None) -> None:
    """A request of one row, of some and of a whole chunk, alone and among the others."""
    ops, rng = make_ops("cpu"), random.Random(model)
    lengths = [(1, 1), (700, 1), (129, 129), (900, 40), (260, 7), (64, 64)]
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
