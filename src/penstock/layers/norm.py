"""RMSNorm, fused with the residual addition before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import Ops


@dataclass(slots=True)
class Norm:
    ops: Ops
    weight_D: Tensor
    eps: float

    def __call__(self, residual_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normed, residual) after ``delta_TD``, if any, was added to the residual."""
        if delta_TD is None:
            return self.ops.norm(residual_TD, self.weight_D, self.eps), residual_TD
        return self.ops.add_norm(delta_TD, residual_TD, self.weight_D, self.eps)
