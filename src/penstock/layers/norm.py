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
    """RMSNorm, or none: then the residual itself is the block's input (OLMo 2).

    Attributes:
        scale: factor of what a block adds (Granite).
    """

    ops: Ops
    weight_D: Tensor | None
    eps: float
    scale: float = 1.0

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if delta_TD is not None:
            return self.ops.add_norm(delta_TD, residual_TD, self.weight_D, self.eps, self.scale)
        if self.weight_D is None:
            return residual_TD, residual_TD
        return self.ops.norm(residual_TD, self.weight_D, self.eps), residual_TD


@dataclass(slots=True)
class LayerNorm:
    ops: Ops
    weight_D: Tensor
    bias_D: Tensor | None
    eps: float
    scale: float = 1.0

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if delta_TD is None:
            return self.ops.layer_norm(residual_TD, self.weight_D, self.bias_D, self.eps), residual_TD
        of_sum = (self.weight_D, self.eps, self.scale, self.bias_D)
        return self.ops.add_norm(delta_TD, residual_TD, *of_sum, centred=True)


@dataclass(slots=True)
class NormAfter:
    """RMSNorm of what a block adds (OLMo 2, Gemma 2)."""

    ops: Ops
    weight_D: Tensor
    eps: float

    def __call__(self, delta_TD: Tensor) -> Tensor:
        return self.ops.norm(delta_TD, self.weight_D, self.eps)


def as_it_is(delta_TD: Tensor) -> Tensor:
    return delta_TD
