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
    norms: RMSNorm weights of q and k, over each head or all heads together, for models that have them.
    rope_Pd: table of ``rope_table``, shared by layers of equal rope; None for a layer without rotated positions.
    group: index of the KV group this layer belongs to.
    window: positions a query sees, its own included; None for all.
    scale, softcap: factor of the scores before softmax, and their cap after it.
    sinks_N: an fp32 logit of each head that takes part in the softmax and has no value (gpt-oss).
    slopes_N: how much a score falls with the distance of its key, fp32 (ALiBi).
    """

    ops: Ops
    qkv: Linear
    out: RowLinear
    norms: tuple[Tensor, Tensor] | None
    eps: float
    rope_Pd: Tensor | None
    group: int
    window: int | None
    scale: float
    softcap: float | None = None
    sinks_N: Tensor | None = None
    slopes_N: Tensor | None = None

    def __call__(self, x_TD: Tensor, batch: Batch, kv: KVLayer) -> Tensor:
        q_TNd = self.ops.qk_norm_rope_write(self.qkv(x_TD), self.norms, self.eps, self.rope_Pd, kv, batch, self.group)
        scoring = (self.window, self.scale, self.softcap, self.sinks_N, self.slopes_N)
        return self.out(self.ops.attention(q_TNd, kv, batch, self.group, *scoring))
