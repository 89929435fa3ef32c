"""Mixture of experts: routing, experts and the layer around them, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsuite import DTYPES, EXACT, Place, agree, on, packed
from penstock.kernels import Ops, make_ops
from penstock.layers import (
    Experts,
    FeedForward,
    GateUp,
    Linear,
    Router,
    RowLinear,
    SharedExpert,
    SparseFeedForward,
)

D, F_, E, A = 48, 40, 6, 3
"""Widths of stream and expert; experts, and how many of them are active."""

Weights = dict[str, Tensor | None]


def expert_weights(dtype: torch.dtype, *, bias: bool) -> Weights:
    return {
        "gate_up_E2FD": (torch.randn(E, 2 * F_, D) / D**0.5).to(dtype),
        "gate_up_bias_E2F": torch.randn(E, 2 * F_).to(dtype) if bias else None,
        "down_EDF": (torch.randn(E, D, F_) / F_**0.5).to(dtype),
        "down_bias_ED": torch.randn(E, D).to(dtype) if bias else None,
    }


def choices(rows: int, rng: random.Random) -> Tensor:
    """Every row has experts of its own; one expert is nobody's."""
    return torch.tensor([rng.sample(range(E - 1), A) for _ in range(rows)]).view(rows, A)


def run_experts(ops: Ops, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, weights: Weights, act: str) -> Tensor:
    device = x_TD.device
    gate_up, gate_up_bias, down, down_bias = on(device, *weights.values())
    (gate_up, down) = packed(ops, gate_up, down)
    return ops.experts(x_TD, chosen_TA, weights_TA, gate_up, gate_up_bias, down, down_bias, act)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [False, True])
def test_route(normalize: bool, place: Place) -> None:
    (ops, device) = place
    x_TD, weight_ED, bias_E = torch.randn(9, D).bfloat16(), torch.randn(E, D).bfloat16(), torch.randn(E).bfloat16()
    for bias in (None, bias_E):
        logits = x_TD.double() @ weight_ED.double().T + (0 if bias is None else bias.double())
        odds, expected = logits.softmax(-1).topk(A)
        if normalize:
            odds = odds / odds.sum(-1, keepdim=True)
        chosen_TA, weights_TA = ops.route(*on(device, x_TD, *packed(ops, weight_ED, bias)), A, normalize)
        assert torch.equal(chosen_TA.cpu(), expected) and chosen_TA.dtype == torch.int64
        agree(weights_TA, odds.float(), torch.float32)


@pytest.mark.parametrize("experts", [3, 8, 60, 128])
def test_ties_go_to_the_lower_expert(experts: int, place: Place) -> None:
    ops, device = place
    logits_TE = torch.randint(0, 3, (20, experts)).float()
    chosen_TA, _ = ops.route(*on(device, torch.eye(20), *packed(ops, logits_TE.T), None), 3, True)
    for row, chosen in zip(logits_TE.tolist(), chosen_TA.tolist(), strict=True):
        assert chosen == sorted(range(experts), key=lambda e: (-row[e], e))[:3]


@pytest.mark.parametrize("act", ["silu", "swiglu_clamped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(dtype: torch.dtype, bias: bool, act: str, place: Place) -> None:
    (ops, device), weights = place, expert_weights(dtype, bias=bias)
    x_TD, chosen_TA, weights_TA = torch.randn(11, D).to(dtype), choices(11, random.Random(3)), torch.rand(11, A)
    ref = run_experts(make_ops("ref"), x_TD, chosen_TA, weights_TA, weights, act)
    agree(run_experts(ops, *on(device, x_TD, chosen_TA, weights_TA), weights, act), ref, dtype)  # type: ignore[arg-type]
    assert ref.dtype == dtype
    none = run_experts(ops, x_TD[:0].to(device), chosen_TA[:0].to(device), weights_TA[:0].to(device), weights, act)
    assert none.shape == (0, D) and none.dtype == dtype


def test_ref_experts_are_the_textbook() -> None:
    weights = expert_weights(torch.float32, bias=True)
    x_TD, chosen_TA, weights_TA = torch.randn(11, D), choices(11, random.Random(3)), torch.rand(11, A)
    ours = run_experts(make_ops("ref"), x_TD, chosen_TA, weights_TA, weights, "silu")
    gate_up, gate_up_bias, down, down_bias = (w.double() for w in weights.values() if w is not None)
    textbook = torch.zeros(11, D, dtype=torch.float64)
    for row in range(11):
        for slot, e in enumerate(chosen_TA[row].tolist()):
            gate, up = (gate_up[e] @ x_TD[row].double() + gate_up_bias[e]).chunk(2)
            textbook[row] += weights_TA[row, slot].double() * (down[e] @ (F.silu(gate) * up) + down_bias[e])
    agree(ours, textbook.float(), torch.float32)


@pytest.mark.parametrize("backend", EXACT)
def test_expert_bits(backend: str) -> None:
    """A row among any others, at any number of threads: the same bytes, of its experts and of their sum."""
    ops, rng, weights = make_ops(backend), random.Random(5), expert_weights(torch.bfloat16, bias=True)
    x_TD, router_ED = torch.randn(12, D).bfloat16(), torch.randn(E, D).bfloat16()

    def run(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen_TA, weights_TA = ops.route(x_TD[rows], *packed(ops, router_ED), None, A, True)
        return chosen_TA, weights_TA, run_experts(ops, x_TD[rows], chosen_TA, weights_TA, weights, "silu")

    expected = run(list(range(12)))
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for count in (1, 3, 8):
            rows = rng.sample(range(12), count)
            assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_many_rows(dtype: torch.dtype) -> None:
    """More rows than are routed together, and more of one expert than fit a block of its product."""
    if "cpu" not in EXACT:
        pytest.skip("installed without a compiler")
    ops, rows, weights = make_ops("cpu"), 1100, expert_weights(dtype, bias=True)
    gate_up, down = packed(ops, weights["gate_up_E2FD"], weights["down_EDF"])
    args = (gate_up, weights["gate_up_bias_E2F"], down, weights["down_bias_ED"], "silu")
    x_TD, chosen_TA, weights_TA = torch.randn(rows, D).to(dtype), choices(rows, random.Random(2)), torch.rand(rows, A)
    shared = (torch.randn(rows, D).to(dtype), torch.randn(rows, 1).to(dtype))
    whole = ops.experts(x_TD, chosen_TA, weights_TA, *args, shared)  # type: ignore[arg-type]
    for row in (0, 31, 32, 700, 1023, 1024, rows - 1):
        own, y, gate = (part[row : row + 1] for part in (weights_TA, *shared))
        alone = ops.experts(x_TD[row : row + 1], chosen_TA[row : row + 1], own, *args, (y, gate))  # type: ignore[arg-type]
        assert torch.equal(alone[0], whole[row]), row


def test_experts_that_are_not_there() -> None:
    if "cpu" not in EXACT:
        pytest.skip("installed without a compiler")
    ops, weights = make_ops("cpu"), expert_weights(torch.float32, bias=False)
    x_TD, weights_TA = torch.randn(2, D), torch.rand(2, A)
    for wrong in (-1, E, 2**62):
        with pytest.raises(IndexError):
            run_experts(ops, x_TD, torch.tensor([[0, 1, 2], [0, wrong, 2]]), weights_TA, weights, "silu")
    with pytest.raises(ValueError, match="rows"):
        run_experts(ops, x_TD, choices(3, random.Random(0)), torch.rand(3, A), weights, "silu")
    with pytest.raises(ValueError, match="of 6 experts"):
        ops.route(x_TD, *packed(ops, torch.randn(E, D)), None, E + 1, True)


def test_logits_that_are_no_numbers(place: Place) -> None:
    """They are chosen first, in the order of ids, and spoil the weights."""
    ops, device = place
    x_TD, weight_ED = torch.randn(9, D), torch.randn(E, D)
    weight_ED[2], weight_ED[4] = float("nan"), float("nan")
    expected_TA, _ = make_ops("ref").route(x_TD, weight_ED, None, A, True)
    chosen_TA, weights_TA = ops.route(*on(device, x_TD, *packed(ops, weight_ED), None), A, True)
    assert torch.equal(chosen_TA.cpu(), expected_TA) and (expected_TA[:, :2] == torch.tensor([2, 4])).all()
    assert weights_TA.isnan().all()


def test_slots_add_in_order(place: Place) -> None:
    """2^30 + 1 - 2^30 is 0 in fp32 in this order and 1 in another: the slots' order is the sum's."""
    ops, device = place
    ones_D = torch.ones(1, 1, device=device)
    big = [2.0**30, 1.0, -(2.0**30)]
    gate_up_E2FD = torch.tensor([[[30.0], [1.0]]] * 3, device=device)  # silu(30) * 1 is 30 to the last bit of fp32
    down_EDF = torch.tensor(big, device=device).view(3, 1, 1) / 30
    for order, total in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        out = ops.experts(
            ones_D,
            torch.tensor([order], device=device),
            torch.ones(1, 3, device=device),
            gate_up_E2FD,
            None,
            down_EDF,
            None,
            "silu",
        )
        assert abs(float(out) - total) < 1e-6


def layer(ops: Ops, weights: dict[str, Tensor], device: torch.device, *, shared: bool) -> SparseFeedForward:
    w = {name: ops.pack(tensor.to(device, copy=True)) for name, tensor in weights.items()}
    experts = Experts(ops, w["gate_up_E2FD"], None, w["down_EDF"], None, "silu")
    beside = SharedExpert(
        FeedForward(GateUp(ops, w["shared_2FD"], None, "silu"), RowLinear(ops, w["shared_down"], None, 2)),
        Linear(ops, w["gate_1D"]),
    )
    return SparseFeedForward(Router(ops, w["router_ED"], None, A, True), experts, beside if shared else None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_feed_forward(dtype: torch.dtype, shared: bool, place: Place) -> None:
    """The layer, against Qwen2-MoE's formula in float64 in float32, and between backends in both."""
    (ops, device), x_TD = place, torch.randn(7, D).to(dtype)
    weights = {name: w for name, w in expert_weights(dtype, bias=False).items() if w is not None}
    shapes = {"router_ED": (E, D), "shared_2FD": (2 * F_, D), "shared_down": (D, F_), "gate_1D": (1, D)}
    weights |= {name: (torch.randn(size) / size[-1] ** 0.5).to(dtype) for name, size in shapes.items()}
    ref = layer(make_ops("ref"), weights, torch.device("cpu"), shared=shared)(x_TD)
    agree(layer(ops, weights, device, shared=shared)(x_TD.to(device)), ref, dtype)
    if dtype == torch.float32:
        w, x = {name: tensor.double() for name, tensor in weights.items()}, x_TD.double()
        odds, chosen = (x @ w["router_ED"].T).softmax(-1).topk(A)
        out = torch.zeros_like(x)
        for row in range(7):
            for p, e in zip(odds[row] / odds[row].sum(), chosen[row], strict=True):
                gate, up = (w["gate_up_E2FD"][e] @ x[row]).chunk(2)
                out[row] += p * (w["down_EDF"][e] @ (F.silu(gate) * up))
        gate, up = (x @ w["shared_2FD"].T).chunk(2, -1)
        beside = (x @ w["gate_1D"].T).sigmoid() * ((F.silu(gate) * up) @ w["shared_down"].T)
        agree(ref, (out + beside if shared else out).float(), dtype)
