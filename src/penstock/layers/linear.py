"""Linear layers. Weights are [out, in]; those that read the same input are fused at load."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import Activation, Ops, Weight


@dataclass(slots=True)
class Linear:
    ops: Ops
    weight_NK: Weight
    bias_N: Tensor | None = None

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.ops.linear(x_TK, self.weight_NK, self.bias_N)


@dataclass(slots=True)
class RowLinear:
    """A linear whose input is what a parallel rank holds a part of; ``segments`` fixes its order of sums."""

    ops: Ops
    weight_NK: Weight
    bias_N: Tensor | None
    segments: int

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.ops.linear(x_TK, self.weight_NK, self.bias_N, self.segments)


@dataclass(slots=True)
class GateUp:
    """Gated linear unit (Shazeer 2020); the gate's F rows come first."""

    ops: Ops
    weight_2FD: Weight
    bias_2F: Tensor | None
    activation: Activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.ops.gate_up(x_TD, self.weight_2FD, self.bias_2F, self.activation)


@dataclass(slots=True)
class Up:
    """The same without a gate: a linear and its activation."""

    ops: Ops
    weight_FD: Weight
    bias_F: Tensor | None
    activation: Activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.ops.linear(x_TD, self.weight_FD, self.bias_F, 1, self.activation)


@dataclass(slots=True)
class FeedForward:
    gate_up: GateUp | Up
    down: RowLinear

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(self.gate_up(x_TD))
