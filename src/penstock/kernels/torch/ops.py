"""TorchOps: library products and attention over whole batches. Fast, and not ``one_answer``: libraries choose
the order of sums by shape. Rounding points are those of ``kernels.ops``; where a library rounds more often
(low-precision logits on a CPU) the op says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.ops import Activation
from penstock.kernels.paged import allocate_layers, copy_layer_blocks, flat
from penstock.kernels.torch.attention import GroupPlan, attend, make_plan
from penstock.kernels.types import Batch, KVLayer

VERSION = 1
"""Raised by every change of this backend's arithmetic."""


class TorchOps:
    name = "torch"
    one_answer = False

    @property
    def numerics(self) -> str:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        return f"torch/{VERSION} torch/{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {gpu}"

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        return F.embedding(ids_T, table_VD)

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_TD.float(), weight_D, eps).to(x_TD.dtype)

    def add_norm(self, delta_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual_TD = residual_TD.add_(delta_TD)
        return self.norm(residual_TD, weight_D, eps), residual_TD

    def linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        return F.linear(x_TK, weight_NK, bias_N)

    def row_linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, segments: int) -> Tensor:
        return F.linear(x_TK, weight_NK, bias_N)  # the library's own order of sums

    def gate_up(self, x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        """Rounds the linear's output and the activation too, as the library's products do."""
        gate_TF, up_TF = F.linear(x_TD, weight_2FD, bias_2F).chunk(2, -1)
        act_TF = F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")
        return act_TF.mul_(up_TF)

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        rope_Pd: Tensor,
        kv: KVLayer,
        batch: Batch,
        group: int,
    ) -> Tensor:
        kv_heads, head_dim = kv.k_PBHd.shape[2:]
        heads_TXd = qkv_TC.view(len(qkv_TC), -1, head_dim)
        heads = heads_TXd.shape[1] - 2 * kv_heads
        qk_TXd = heads_TXd[:, : heads + kv_heads].float()
        if norms is not None:
            q_norm, k_norm = norms
            weights_Xd = torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)))
            qk_TXd = rms_norm(qk_TXd, weights_Xd, eps)
        cos, sin = rope_Pd[batch.positions_T].unsqueeze(1).chunk(2, -1)
        a, b = qk_TXd.chunk(2, -1)
        qk_TXd = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(qkv_TC.dtype)
        # Slot -1 is the last slot of the pool, in the spare block that allocate_kv appends.
        slots = (batch.groups[group].slots_T,)
        flat(kv.k_PBHd).index_put_(slots, qk_TXd[:, heads:])
        flat(kv.v_PBHd).index_put_(slots, heads_TXd[:, heads + kv_heads :])
        return qk_TXd[:, :heads]

    def attention(
        self, q_TNd: Tensor, kv: KVLayer, batch: Batch, group: int, window: int | None, scale: float
    ) -> Tensor:
        notes = batch.groups[group]
        if notes.plan is None:
            notes.plan = make_plan(batch, notes.tables_RM, window)
        assert isinstance(notes.plan, GroupPlan)
        return attend(q_TNd, kv, notes.plan, scale)

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        """On a CPU the library has no bf16 x bf16 -> fp32 product: there low-precision logits are rounded once."""
        if x_RD.is_cuda and x_RD.dtype != torch.float32:
            return torch.mm(x_RD, weight_VD.t(), out_dtype=torch.float32)
        return F.linear(x_RD, weight_VD).float()

    def allocate_kv(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[KVLayer]:
        """One block more than asked for: slot -1 falls into it."""
        return allocate_layers(layers, blocks + 1, block_size, kv_heads, head_dim, dtype, device)

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
        copy_layer_blocks(layers, pairs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis; fp32 in and out."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
