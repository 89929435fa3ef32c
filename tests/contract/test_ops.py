"""Ops of independent rows, on every backend: ref against the textbook in float64, the others against ref within the
dtype's tolerance, and the promises of ``one_answer`` byte for byte. A CUDA device, where there is one, joins in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsuite import BACKENDS, DTYPES, EPS, EXACT, SHAPES, Place, Shape, agree, packed
from penstock.base import ConfigError
from penstock.base.segments import sum_segments
from penstock.kernels import Ops, backends, make_ops

Widths = list[tuple[int, ...]]


@dataclass(frozen=True)
class RowOp:
    """An op as a function of its rows [T, X] and weights of shapes; ``textbook`` is the same in float64."""

    width: Callable[[Shape], int]
    weights: Callable[[Shape], Widths]
    run: Callable[..., Tensor]
    textbook: Callable[..., Tensor]


def _hidden(s: Shape) -> int:
    return s.hidden


def _vector(s: Shape) -> Widths:
    return [(s.hidden,)]


def _gates(s: Shape) -> Widths:
    return [(2 * s.ffn, s.hidden), (2 * s.ffn,)]


def _inner(s: Shape) -> Widths:
    return [(s.ffn, s.hidden), (s.ffn,)]


def _add_norm(ops, x, w, scale=1.0):  # type: ignore[no-untyped-def]
    return torch.cat(ops.add_norm(*(half.contiguous() for half in x.chunk(2, -1)), w, EPS, scale), -1)


def _sum(x: Tensor, scale: float) -> Tensor:
    delta, residual = x.chunk(2, -1)
    return residual + scale * delta


def _add_centred(ops, x, w, b):  # type: ignore[no-untyped-def]
    return torch.cat(ops.add_norm(*(half.contiguous() for half in x.chunk(2, -1)), w, EPS, 1.0, b, centred=True), -1)


def _rms(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


def _clamped(g: Tensor, u: Tensor) -> Tensor:
    g, u = g.clamp(max=7), u.clamp(-7, 7)
    return (u + 1) * g * (1.702 * g).sigmoid()


ROW_OPS: dict[str, RowOp] = {
    "norm": RowOp(_hidden, _vector, lambda ops, x, w: ops.norm(x, w, EPS), _rms),
    "layer_norm": RowOp(
        _hidden,
        lambda s: [(s.hidden,), (s.hidden,)],
        lambda ops, x, w, b: ops.layer_norm(x, w, b, EPS),
        lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt() * w + b,
    ),
    "layer_norm without bias": RowOp(
        _hidden,
        _vector,
        lambda ops, x, w: ops.layer_norm(x, w, None, EPS),
        lambda x, w: F.layer_norm(x, x.shape[-1:], w, None, EPS),
    ),
    "add_norm": RowOp(
        lambda s: 2 * s.hidden,
        _vector,
        _add_norm,
        lambda x, w: torch.cat((_rms(sum(x.chunk(2, -1)), w), sum(x.chunk(2, -1))), -1),
    ),
    "add_norm, centred": RowOp(
        lambda s: 2 * s.hidden,
        lambda s: [(s.hidden,), (s.hidden,)],
        _add_centred,
        lambda x, w, b: torch.cat((F.layer_norm(sum(x.chunk(2, -1)), w.shape, w, b, EPS), sum(x.chunk(2, -1))), -1),
    ),
    "add_norm of a part": RowOp(
        lambda s: 2 * s.hidden,
        _vector,
        lambda ops, x, w: _add_norm(ops, x, w, 0.22),
        lambda x, w: torch.cat((_rms(_sum(x, 0.22), w), _sum(x, 0.22)), -1),
    ),
    "add_norm without norm": RowOp(
        lambda s: 2 * s.hidden,
        lambda _: [],
        lambda ops, x: _add_norm(ops, x, None, 1.7),
        lambda x: torch.cat((_sum(x, 1.7), _sum(x, 1.7)), -1),
    ),
    "linear": RowOp(
        _hidden,
        lambda s: [(s.qkv, s.hidden)],
        lambda ops, x, w: ops.linear(x, w, None),
        lambda x, w: x @ w.T,
    ),
    "linear with bias": RowOp(_hidden, _inner, lambda ops, x, w, b: ops.linear(x, w, b), lambda x, w, b: x @ w.T + b),
    "linear in segments": RowOp(
        lambda s: s.ffn,
        lambda s: [(s.hidden, s.ffn), (s.hidden,)],
        lambda ops, x, w, b: ops.linear(x, w, b, sum_segments(x.shape[1])),
        lambda x, w, b: x @ w.T + b,
    ),
    "logits": RowOp(_hidden, lambda s: [(s.vocab, s.hidden)], lambda ops, x, w: ops.logits(x, w), lambda x, w: x @ w.T),
    "gate_up without bias": RowOp(
        _hidden,
        lambda s: [(2 * s.ffn, s.hidden)],
        lambda ops, x, w: ops.gate_up(x, w, None, "silu"),
        lambda x, w: F.silu((x @ w.T).chunk(2, -1)[0]) * (x @ w.T).chunk(2, -1)[1],
    ),
}

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, u: g * g.sigmoid() * u,
    "gelu": lambda g, u: g * (1 + torch.erf(g / 2**0.5)) / 2 * u,
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "swiglu_clamped": _clamped,
}
for _name, _gate in GATES.items():  # rows times 8, so that erf saturates and clamps bite
    ROW_OPS[f"gate_up {_name}"] = RowOp(
        _hidden,
        _gates,
        lambda ops, x, w, b, name=_name: ops.gate_up(8 * x, w, b, name),
        lambda x, w, b, gate=_gate: gate(*(8 * x @ w.T + b).chunk(2, -1)),
    )
    if _name != "swiglu_clamped":
        ROW_OPS[f"linear {_name}"] = RowOp(
            _hidden,
            _inner,
            lambda ops, x, w, b, name=_name: ops.linear(8 * x, w, b, 1, name),
            lambda x, w, b, gate=_gate: gate(8 * x @ w.T + b, torch.ones((), dtype=torch.float64)),
        )


def row_inputs(op: RowOp, shape: Shape, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x_TX = torch.randn(rows, op.width(shape)).to(dtype)
    return x_TX, [(torch.randn(size) / size[-1] ** 0.5).to(dtype) for size in op.weights(shape)]


def run(op: RowOp, ops: Ops, x_TX: Tensor, weights: list[Tensor]) -> Tensor:
    return op.run(ops, x_TX, *packed(ops, *weights))


@pytest.mark.parametrize("name", ROW_OPS)
def test_ref_is_the_textbook(name: str, shape: Shape) -> None:
    op = ROW_OPS[name]
    x_TX, weights = row_inputs(op, shape, 5, torch.float32)
    textbook = op.textbook(x_TX.double(), *(w.double() for w in weights))
    agree(run(op, make_ops("ref"), x_TX, weights), textbook.float(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_op(name: str, dtype: torch.dtype, shape: Shape, place: Place) -> None:
    (ops, device), op = place, ROW_OPS[name]
    x_TX, weights = row_inputs(op, shape, 5, dtype)
    ref = run(op, make_ops("ref"), x_TX, weights)
    agree(run(op, ops, x_TX.to(device), [w.to(device) for w in weights]), ref, dtype)
    assert ref.dtype == (torch.float32 if name == "logits" else dtype)


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("name", ROW_OPS)
def test_many_rows_and_few(name: str, rows: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast backends choose their way by the number of rows, and cut rows and vocabularies into pieces."""
    monkeypatch.setattr("penstock.kernels.torch.linear.TILE", 7 * 64)
    monkeypatch.setattr("penstock.kernels.torch.linear.LOGITS_AT_ONCE", 100)
    (ops, device), op = place, ROW_OPS[name]
    x_TX, weights = row_inputs(op, SHAPES["stories260k"], rows, torch.bfloat16)
    ref = run(op, make_ops("ref"), x_TX, weights)
    agree(run(op, ops, x_TX.to(device), [w.to(device) for w in weights]), ref, torch.bfloat16)


@pytest.mark.parametrize("name", ROW_OPS)
def test_no_rows(name: str, place: Place) -> None:
    """A step that draws no token asks for the hidden states and logits of no row."""
    (ops, device), op = place, ROW_OPS[name]
    x_TX, weights = row_inputs(op, SHAPES["odd"], 2, torch.bfloat16)
    x_TX, weights = x_TX.to(device), [w.to(device) for w in weights]
    some, none = run(op, ops, x_TX.clone(), weights), run(op, ops, x_TX[:0], weights)
    assert none.shape == (0, *some.shape[1:]) and none.dtype == some.dtype


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("name", ROW_OPS)
def test_row_bits(name: str, backend: str, shape: Shape) -> None:
    """A row at any place, among any number of others, at any number of threads: the same bytes."""
    ops, op, rng = make_ops(backend), ROW_OPS[name], random.Random(name)
    for dtype in (torch.float32, torch.bfloat16):
        x_TX, weights = row_inputs(op, shape, 12, dtype)
        expected = run(op, ops, x_TX.clone(), weights)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for count in (1, 3, 8):
                rows = rng.sample(range(12), count)
                assert torch.equal(run(op, ops, x_TX[rows], weights), expected[rows]), (dtype, threads, rows)


@pytest.mark.parametrize(
    "name", [name for name in ROW_OPS if name.removeprefix("gate_up ").removeprefix("linear ") in GATES]
)
def test_activations_know_no_place(name: str) -> None:
    """One number at every place of a vector, at every length of its tail: the same bits. Exp, tanh and erf may come
    as vector code with another code for the rest."""
    for width in (1, 3, 8, 16, 21, 33):
        ones = torch.full((1, 1), 0.37)
        weights = [torch.full((2 * width, 1), 0.81), torch.full((2 * width,), 0.11)]
        op = ROW_OPS[name]
        out = run(op, make_ops("ref"), ones, weights[: len(op.weights(SHAPES["odd"]))])
        assert (out == out[0, 0]).all(), width


@pytest.mark.parametrize("backend", EXACT)
def test_sum_tree_is_that_of_the_parallel_ranks(backend: str, shape: Shape) -> None:
    """Two ranks that each sum half of the segments, added in fp32, are the one-rank sum bit for bit; so are
    two ranks that each hold half of the outputs."""
    ops, segments = make_ops(backend), sum_segments(shape.ffn)
    x_TK, w_NK = torch.randn(3, shape.ffn), torch.randn(shape.hidden, shape.ffn)
    (packed_NK,) = packed(ops, w_NK)
    whole = ops.linear(x_TK, packed_NK, None, segments)
    if segments > 1:
        halves = [
            ops.linear(x.contiguous(), *packed(ops, w), None, segments // 2)
            for x, w in zip(x_TK.chunk(2, 1), w_NK.chunk(2, 1), strict=True)
        ]
        assert torch.equal(whole, halves[0] + halves[1])
    outputs = torch.cat([ops.linear(x_TK, *packed(ops, w), None, segments) for w in w_NK.chunk(2)], 1)
    assert torch.equal(whole, outputs)


def test_add_norm_reads_the_sum_as_stored(place: Place) -> None:
    """1 + 2^-9 rounds to 1 in bfloat16: the norm must see 1, and so must the next layer."""
    ops, device = place
    one = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    normed, residual = ops.add_norm(one * 2**-9, one.clone(), one[0], 0.0)
    assert torch.equal(residual, one) and torch.equal(normed, one)


def test_add_norm_adds_the_product_as_stored(place: Place) -> None:
    """(1 + 2^-7) * (1 + 2^-8) is 1 + 2^-6 in bfloat16; with all of its bits the sum would be one unit smaller."""
    ops, device = place
    one = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    _, total = ops.add_norm(one * (1 + 2**-7), one * (3 * 2**-9), None, 0.0, 1 + 2**-8)
    product = ((1 + 2**-7) * (1 + 2**-8) * one.float()).bfloat16()
    assert torch.equal(total, (product.float() + 3 * 2**-9).bfloat16())
    assert not torch.equal(total, (one.float() * ((1 + 2**-7) * (1 + 2**-8) + 3 * 2**-9)).bfloat16())


def test_embed(place: Place) -> None:
    ops, device = place
    for dtype in DTYPES:
        table_VD = torch.randn(21, 7, device=device).to(dtype)
        ids_T = torch.tensor([3, 20, 3], device=device)
        for scale in (1.0, 7.3):
            rows_TD = ops.embed(ids_T, *packed(ops, table_VD), table_VD.dtype, scale)
            assert torch.equal(rows_TD, table_VD[ids_T] * scale)


@pytest.mark.parametrize(("units", "segments"), [(1, 1), (14, 2), (8, 8), (12, 4), (96, 8), (7, 1), (40, 8)])
def test_sum_segments(units: int, segments: int) -> None:
    assert sum_segments(units) == segments


def test_backends_have_names_and_numerics() -> None:
    assert {make_ops(name).name for name in BACKENDS} == set(BACKENDS) <= set(backends) == {"ref", "torch", "cpu"}
    assert len({make_ops(name).numerics for name in BACKENDS}) == len(BACKENDS)
    assert [name for name in BACKENDS if name != "torch"] == EXACT
    with pytest.raises(ConfigError) as error:
        make_ops("abacus")
    assert error.value.code == "unknown_variant"
