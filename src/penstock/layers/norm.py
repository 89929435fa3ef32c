"""Norms: before a block, fused with the residual addition that comes before it, and after a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from penstock.kernels import Ops


class BlockInput(Protocol):
    """What a block reads."""

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(input, residual) after ``delta_TD``, if any, was added to the residual."""
        ...


class BlockOutput(Protocol):
    """What becomes of a block's output before it is added to the residual."""

    def __call__(self, delta_TD: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Norm:
    """RMSNorm."""

    ops: Ops
    weight_D: Tensor
    eps: float

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if delta_TD is None:
            return self.ops.norm(residual_TD, self.weight_D, self.eps), residual_TD
        return self.ops.add_norm(delta_TD, residual_TD, self.weight_D, self.eps)


@dataclass(slots=True)
class LayerNorm:
    ops: Ops
    weight_D: Tensor
    bias_D: Tensor | None
    eps: float

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if delta_TD is None:
            return self.ops.layer_norm(residual_TD, self.weight_D, self.bias_D, self.eps), residual_TD
        return self.ops.add_norm(delta_TD, residual_TD, self.weight_D, self.eps, self.bias_D, centred=True)


@dataclass(slots=True)
class NormAfter:
    """RMSNorm of what a block adds (OLMo 2, Gemma 2)."""

    ops: Ops
    weight_D: Tensor
    eps: float

    def __call__(self, delta_TD: Tensor) -> Tensor:
        return self.ops.norm(delta_TD, self.weight_D, self.eps)


@dataclass(slots=True)
class Scaled:
    """A factor on what a block adds (Granite), rounded as it is stored."""

    factor: float

    def __call__(self, delta_TD: Tensor) -> Tensor:
        return delta_TD * self.factor


def not_normed(residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual itself is the block's input (OLMo 2)."""
    if delta_TD is not None:
        residual_TD = residual_TD + delta_TD  # rounded as it is stored
    return residual_TD, residual_TD


def as_it_is(delta_TD: Tensor) -> Tensor:
    return delta_TD
