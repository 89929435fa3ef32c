"""The two ends of a model: token ids to vectors, vectors to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import Ops, Weight


@dataclass(slots=True)
class Embedding:
    """Attributes:
    dtype: of the vectors, as stored.
    scale: factor of every vector.
    """

    ops: Ops
    table_VD: Weight
    dtype: torch.dtype
    scale: float = 1.0

    def __call__(self, ids_T: Tensor) -> Tensor:
        return self.ops.embed(ids_T, self.table_VD, self.dtype, self.scale)


@dataclass(slots=True)
class Head:
    """Attributes:
    scale: factor of the logits.
    softcap: then a logit x becomes softcap * tanh(x / softcap) (Gemma 2).
    """

    ops: Ops
    weight_VD: Weight
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """fp32 logits [R, V]."""
        logits_RV = self.ops.logits(hidden_RD, self.weight_VD)
        if self.scale != 1.0:
            logits_RV = logits_RV.mul_(self.scale)
        return logits_RV if self.softcap is None else torch.tanh(logits_RV.div_(self.softcap)).mul_(self.softcap)
