"""Sparse feed-forward: a router sends each token to a few experts (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import Activation, Ops, Weight
from penstock.layers.linear import FeedForward, Linear


@dataclass(slots=True)
class Router:
    """Attributes:
    active: experts of a token.
    normalize: their weights are divided by their sum.
    """

    ops: Ops
    weight_ED: Tensor
    bias_E: Tensor | None
    active: int
    normalize: bool

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(experts, weights) of each row, [T, active]."""
        return self.ops.route(x_TD, self.weight_ED, self.bias_E, self.active, self.normalize)


@dataclass(slots=True)
class Experts:
    """Gated feed-forwards of equal shape, one below the other; the gate's F rows come first in each."""

    ops: Ops
    gate_up_E2FD: Weight
    gate_up_bias_E2F: Tensor | None
    down_EDF: Weight
    down_bias_ED: Tensor | None
    activation: Activation

    def __call__(
        self, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, shared: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        gate_up, down = (self.gate_up_E2FD, self.gate_up_bias_E2F), (self.down_EDF, self.down_bias_ED)
        return self.ops.experts(x_TD, chosen_TA, weights_TA, *gate_up, *down, self.activation, shared)


@dataclass(slots=True)
class SharedExpert:
    """An expert that every token uses, as far as the sigmoid of a gate of its own lets it (Qwen2-MoE).

    Attributes:
        gate: one output, rounded as any linear's.
    """

    ffn: FeedForward
    gate: Linear

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(output, gate), [T, D] and [T, 1]."""
        return self.ffn(x_TD), self.gate(x_TD)


@dataclass(slots=True)
class SparseFeedForward:
    """Stands where a FeedForward does."""

    router: Router
    experts: Experts
    shared: SharedExpert | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        shared = None if self.shared is None else self.shared(x_TD)
        return self.experts(x_TD, *self.router(x_TD), shared)
