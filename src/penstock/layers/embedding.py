"""The two ends of a model: token ids to vectors, vectors to logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import Ops


@dataclass(slots=True)
class Embedding:
    ops: Ops
    table_VD: Tensor

    def __call__(self, ids_T: Tensor) -> Tensor:
        return self.ops.embed(ids_T, self.table_VD)


@dataclass(slots=True)
class Head:
    ops: Ops
    weight_VD: Tensor

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """fp32 logits [R, V]."""
        return self.ops.logits(hidden_RD, self.weight_VD)
