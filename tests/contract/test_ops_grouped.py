"""Grouped weights: the textbook in float64, ref, and the native kernels of every instruction set, which agree bit for
bit where the processor has a fused multiply-add."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsuite import SETS, agree
from penstock.base import ModelFormatError
from penstock.kernels import GroupedWeight, Ops, Weight, make_ops
from penstock.quant import check_scales, quantize, widen

FORMATS = [(8, 32), (4, 32), (8, 64), (4, 64), (8, 128), (4, 128)]


@pytest.fixture(params=FORMATS, ids=lambda f: f"{f[0]} bits by {f[1]}")
def form(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param  # type: ignore[no-any-return]


def rows_and_weight(
    form: tuple[int, int], rows: int, outputs: int = 100, inputs: int = 512
) -> tuple[Tensor, GroupedWeight]:
    return torch.randn(rows, inputs).bfloat16(), quantize(torch.randn(outputs, inputs), *form)


def exact(ops: Ops) -> bool:
    """Where a fused multiply-add is one instruction, the native sums are ref's."""
    return "portable" not in ops.numerics


def same(ours: Tensor, ref: Tensor, ops: Ops) -> None:
    if exact(ops):
        assert torch.equal(ours.isnan(), ref.isnan()) and torch.equal(ours.nan_to_num(), ref.nan_to_num())
    else:
        finite = ref.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        agree(ours.where(finite, 0), ref.where(finite, 0), ours.dtype)


def test_ref_is_the_textbook(form: tuple[int, int]) -> None:
    """Codes of both sides times both scales, in float64; what rounding the input costs is bounded too."""
    bits, group = form
    x_TK, weight = rows_and_weight(form, 7)
    x_TGg = x_TK.double().view(7, -1, group)
    scale_TG1 = x_TGg.abs().amax(-1, keepdim=True) / 127
    near_TK = ((x_TGg / scale_TG1).round() * scale_TG1).flatten(1)
    wide_NK = weight.widened().double()
    ours = make_ops("ref").logits(x_TK, weight).double()
    assert float((ours - near_TK @ wide_NK.T).abs().max()) < 0.2  # a tie may fall to the other side
    assert float((ours - near_TK @ wide_NK.T).abs().median()) < 1e-5
    assert float((ours - x_TK.double() @ wide_NK.T).abs().max()) < (1.0 if bits == 8 else 1.2)


@pytest.mark.parametrize("segments", [1, 4])
def test_linear(form: tuple[int, int], segments: int, ops: Ops) -> None:
    x_TK, weight = rows_and_weight(form, 45)
    x_TK[3, 7], x_TK[4, 100], x_TK[5], x_TK[6] = float("nan"), float("inf"), 0, 1e-38
    x_TK[7, 9] = 3e30
    bias_N, ref = torch.randn(100).bfloat16(), make_ops("ref")
    same(ops.linear(x_TK, ops.pack(weight), bias_N, segments), ref.linear(x_TK, weight, bias_N, segments), ops)
    same(ops.logits(x_TK, ops.pack(weight)), ref.logits(x_TK, weight), ops)


def test_gate_up_with_halves_that_share_a_panel(form: tuple[int, int], ops: Ops) -> None:
    x_TK, weight = rows_and_weight(form, 9, 2 * 37)
    agree(
        ops.gate_up(x_TK, ops.pack(weight), None, "silu"),
        make_ops("ref").gate_up(x_TK, weight, None, "silu"),
        torch.bfloat16,
    )


def test_embedding_rows(form: tuple[int, int], ops: Ops) -> None:
    _, table = rows_and_weight(form, 1)
    ids_T = torch.tensor([0, 15, 16, 99, 99, 3])
    for dtype in (torch.float32, torch.bfloat16):
        rows_TD = table.widened()[ids_T].to(dtype)
        for scale in (1.0, 7.3):
            ours = ops.embed(ids_T, ops.pack(table), dtype, scale)
            assert torch.equal(ours, make_ops("ref").embed(ids_T, table, dtype, scale))
            assert torch.equal(ours, rows_TD * scale)


def test_experts(form: tuple[int, int], ops: Ops) -> None:
    x_TD, chosen_TA = torch.randn(11, 128).bfloat16(), torch.stack([torch.randperm(4)[:2] for _ in range(11)])
    up, down = quantize(torch.randn(4, 2 * 128, 128) / 8, *form), quantize(torch.randn(4, 128, 128) / 8, *form)
    rest = (torch.rand(11, 2),)

    def run(by: Ops, up: Weight, down: Weight) -> Tensor:
        return by.experts(x_TD, chosen_TA, *rest, up, None, down, None, "silu")

    agree(run(ops, ops.pack(up), ops.pack(down)), run(make_ops("ref"), up, down), torch.bfloat16)


def test_bits_of_experts_of_many_rows(form: tuple[int, int], ops: Ops) -> None:
    """More rows than are routed together, and more of one expert than fit a block of its product."""
    rows, shape = 1100, (4, 2 * 128, 128)
    x_TD, chosen_TA = torch.randn(rows, 128).bfloat16(), torch.stack([torch.randperm(4)[:2] for _ in range(rows)])
    up, down = (ops.pack(quantize(torch.randn(s) / 8, *form)) for s in (shape, (4, 128, 128)))
    weights_TA = torch.rand(rows, 2)

    def run(at: slice) -> Tensor:
        return ops.experts(x_TD[at], chosen_TA[at], weights_TA[at], up, None, down, None, "silu")

    whole = run(slice(None))
    for row in (0, 31, 32, 700, 1023, 1024, rows - 1):
        assert torch.equal(run(slice(row, row + 1))[0], whole[row]), row


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_row_bits(form: tuple[int, int], threads: int, ops: Ops) -> None:
    """A row's bytes do not depend on how many others there are, on its place, or on the threads."""
    x_TK, weight = rows_and_weight(form, 70, 330, 768)
    packed = ops.pack(weight)
    torch.set_num_threads(threads)
    try:
        whole = ops.linear(x_TK, packed, None, 2)
    finally:
        torch.set_num_threads(1)
    for count in (1, 2, 3, 5, 33):
        for first in (0, 31, 70 - count):
            assert torch.equal(ops.linear(x_TK[first : first + count], packed, None, 2), whole[first : first + count])


def test_what_does_not_fit_is_refused(ops: Ops) -> None:
    x_TK, weight = rows_and_weight((8, 32), 3)
    with pytest.raises(ValueError):
        ops.linear(x_TK, ops.pack(weight), None, 32)  # a segment of half a group
    with pytest.raises(ValueError):
        ops.pack(quantize(torch.randn(4, 96), 8, 48))
    with pytest.raises(TypeError):
        make_ops("torch").linear(x_TK, weight, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(bits: int) -> None:
    """Half a step of error at most with 8 bits, and less than the plain scale makes; with 4 never worse than the plain
    spread of 16 levels around a whole zero; edges."""
    w_NK = torch.randn(64, 256)
    w_NK[0], w_NK[1], w_NK[2, :32], w_NK[3] = 0, 0.25, torch.arange(32.0), -torch.rand(256)
    weight = quantize(w_NK, bits, 32)
    error_NG = (weight.widened() - w_NK).view(64, -1, 32)
    groups = w_NK.view(64, -1, 32)
    if bits == 8:
        step_NG = groups.abs().amax(-1, keepdim=True) / 127
        assert (error_NG.abs() <= 0.51 * step_NG * 127 / 120 + 1e-3 * step_NG * 127).all()
        plain = (groups / step_NG.clamp_min(1e-9)).round() * step_NG - groups
        assert error_NG.square().sum() < 0.9 * plain.square().sum()
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / 15).clamp_min(1e-9)
        zero = (-low / step).round()
        plain = (((groups / step + zero).round().clamp(0, 15) - zero) * step - groups).square().mean(-1)
        assert not (weight.zeros_NG % 16).any()  # type: ignore[operator]
        rounded_scale = (groups.abs().amax(-1) * 1e-3).square()
        assert (error_NG.square().mean(-1) <= 1.05 * plain + rounded_scale).all()
    assert not weight.widened()[0].any()
    assert torch.allclose(weight.widened()[1], torch.tensor(0.25), rtol=1e-3)
    again = quantize(weight.widened(), bits, 32)
    assert (
        float((again.widened() - weight.widened()).abs().max()) <= float(weight.widened().abs().max()) * 2e-3
        or bits == 4
    )


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(37, 512),
    "a stack": lambda: torch.randn(3, 5, 128),
    "one group": lambda: torch.randn(1, 128),
    "of one sign": lambda: torch.rand(20, 256) + 1,
    "mostly zeros": lambda: torch.randn(20, 256) * (torch.rand(20, 256) < 0.1),
    "ties": lambda: torch.randint(-3, 4, (20, 256)).float(),
    "equal": lambda: torch.full((3, 256), -0.25),
    "zeros": lambda: torch.zeros(3, 256),
    "outliers": lambda: torch.randn(20, 256).pow(7),
    "down to nothing": lambda: torch.randn(60, 256) * 10 ** (torch.rand(60, 1) * -45),
    "up to the scales' end": lambda: torch.randn(60, 256).clamp(-4, 4) * 10 ** (torch.rand(60, 1) * 4.2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_native_integers_are_those_of_the_reference(
    kind: str, dtype: torch.dtype, form: tuple[int, int], ops: Ops
) -> None:
    w_NK = WEIGHTS[kind]().to(dtype)
    if w_NK.isfinite().all():
        assert ops.quantize is not None
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = ops.quantize(w_NK, *form)
        ref = quantize(w_NK, *form)
        assert torch.equal(ours.codes_NK, ref.codes_NK) and ours.codes_NK.dtype == ref.codes_NK.dtype
        assert torch.equal(ours.scales_NG.view(torch.int16), ref.scales_NG.view(torch.int16))
        assert ours.bits == 8 or torch.equal(ours.zeros_NG, ref.zeros_NG)  # type: ignore[arg-type]
        assert torch.equal(widen(ours, torch.empty(w_NK.shape)), widen(ref, torch.empty(w_NK.shape)))


def test_ref_rounds_a_sum_once() -> None:
    """An fp64 sum in between would fall on a tie of fp32 and then to the even side."""
    own = (2**22 - 2**11 + 1) * 2.0**-57
    x_TK, codes_NK = torch.zeros(1, 64), torch.zeros(1, 64, dtype=torch.int8)
    for k, x, code in ((0, 127.0, 0), (1, 1.0, 1), (32, 127 * own, 16), (33, 17 * own, 1)):
        x_TK[0, k], codes_NK[0, k] = x, code
    weight = GroupedWeight(codes_NK, torch.ones(1, 2, dtype=torch.float16))
    assert float(make_ops("ref").logits(x_TK, weight)) == 1 + 2.0**-23
    if SETS and SETS[0] != "portable":
        assert torch.equal(
            make_ops("cpu").logits(x_TK, make_ops("cpu").pack(weight)), make_ops("ref").logits(x_TK, weight)
        )


def test_the_lowest_code(ops: Ops) -> None:
    """No quantizer of ours makes it, and files of others have it; beside the greatest inputs sums stay exact."""
    codes_NK = torch.randint(-128, 128, (32, 128), dtype=torch.int8)
    codes_NK[0], codes_NK[1, ::2] = -128, -128
    weight = GroupedWeight(codes_NK, torch.ones(32, 4, dtype=torch.float16))
    for x_TK in (torch.full((51, 128), 1.0), torch.full((3, 128), -1.0), torch.randn(51, 128)):
        same(ops.logits(x_TK, ops.pack(weight)), make_ops("ref").logits(x_TK, weight), ops)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_beyond_the_scales_are_refused(bits: int) -> None:
    w_NK = torch.full((2, 32), 1e8)
    with pytest.raises(ModelFormatError, match="65504"):
        quantize(w_NK, bits, 32)
    for ops in (make_ops("cpu") for _ in SETS[:1]):
        assert ops.quantize is not None
        with pytest.raises(ModelFormatError, match="65504"):
            check_scales(w_NK, ops.quantize(w_NK, bits, 32))
