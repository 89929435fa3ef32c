"""Grouped-query attention over a paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import Batch, KVLayer, Ops
from penstock.layers.linear import Linear, RowLinear


@dataclass(slots=True)
class Attention:
    """Attributes:
    qkv, out: fused input projection and row-parallel output projection.
    norms: RMSNorm weights over head_dim of q and k, for models that have them.
    rope_Pd: table of ``rope_table``, shared by all layers.
    group: index of the KV group this layer belongs to.
    window: positions a query sees, its own included; None for all.
    scale: factor of the scores before softmax.
    """

    ops: Ops
    qkv: Linear
    out: RowLinear
    norms: tuple[Tensor, Tensor] | None
    eps: float
    rope_Pd: Tensor
    group: int
    window: int | None
    scale: float

    def __call__(self, x_TD: Tensor, batch: Batch, kv: KVLayer) -> Tensor:
        q_TNd = self.ops.qk_norm_rope_write(self.qkv(x_TD), self.norms, self.eps, self.rope_Pd, kv, batch, self.group)
        return self.out(self.ops.attention(q_TNd, kv, batch, self.group, self.window, self.scale))
