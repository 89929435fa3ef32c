"""RefOps: what every other backend is compared with.

Every sum is ``total``: a sum over the last, contiguous axis, whose order torch fixes by the length of that
axis alone. A library matrix product is not used: its bits change with the number of threads and with the
place of an output. All the rest is elementwise and either exactly rounded (add, multiply, divide, square root)
or one of exp and tanh, which torch evaluates by the same code at every place of a vector; its sigmoid and silu are
not among them. Each row is computed by its own call all the same, so that the argument rests on no more
than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penstock.kernels.ops import Activation
from penstock.kernels.paged import allocate_layers, copy_layer_blocks, flat
from penstock.kernels.ref.attention import Row, attend
from penstock.kernels.types import Batch, KVLayer

VERSION = 1
"""Raised by every change of this backend's bits."""


class RefOps:
    name = "ref"
    one_answer = True

    @property
    def numerics(self) -> str:
        return f"ref/{VERSION} torch/{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        return table_VD.index_select(0, ids_T)

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return each_row(lambda x_D: rms_norm(x_D.float(), weight_D, eps).to(x_TD.dtype), x_TD)

    def add_norm(self, delta_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = (residual_TD.float() + delta_TD.float()).to(residual_TD.dtype)
        return self.norm(sum_TD, weight_D, eps), sum_TD

    def linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        return self.row_linear(x_TK, weight_NK, bias_N, segments=1)

    def row_linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, segments: int) -> Tensor:
        return each_row(lambda x_K: matvec(x_K, weight_NK, bias_N, segments).to(x_TK.dtype), x_TK)

    def gate_up(self, x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        act = ACTIVATIONS[activation]

        def one(x_D: Tensor) -> Tensor:
            gate_F, up_F = matvec(x_D, weight_2FD, bias_2F).chunk(2)
            return (act(gate_F) * up_F).to(x_TD.dtype)

        return each_row(one, x_TD)

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
        k_slots, v_slots = flat(kv.k_PBHd), flat(kv.v_PBHd)
        slots = batch.groups[group].slots_T.tolist()
        q_rows = []
        for qkv_C, slot, position in zip(qkv_TC, slots, batch.positions_T.tolist(), strict=True):
            heads_Xd = qkv_C.view(-1, head_dim).float()
            q_Nd, k_Hd, v_Hd = torch.split(heads_Xd, [len(heads_Xd) - 2 * kv_heads, kv_heads, kv_heads])
            if norms is not None:
                q_Nd, k_Hd = rms_norm(q_Nd, norms[0], eps), rms_norm(k_Hd, norms[1], eps)
            cos, sin = rope_Pd[position].chunk(2)
            q_rows.append(rotate(q_Nd, cos, sin).to(qkv_C.dtype))
            if slot >= 0:
                k_slots[slot] = rotate(k_Hd, cos, sin)
                v_slots[slot] = v_Hd
        return torch.stack(q_rows)

    def attention(
        self, q_TNd: Tensor, kv: KVLayer, batch: Batch, group: int, window: int | None, scale: float
    ) -> Tensor:
        tables_RM = batch.groups[group].tables_RM
        out = []
        for request, (start, end) in enumerate(zip(batch.row_starts, batch.row_starts[1:], strict=False)):
            for row in range(start, end):
                position = batch.contexts[request] - (end - row)
                first = 0 if window is None else max(0, position - window + 1)
                out.append(attend(q_TNd[row], kv, Row(tables_RM[request], first, position), scale))
        return torch.stack(out).to(q_TNd.dtype)

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        return each_row(lambda x_D: matvec(x_D, weight_VD, None), x_RD)

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
        return allocate_layers(layers, blocks, block_size, kv_heads, head_dim, dtype, device)

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
        copy_layer_blocks(layers, pairs)


def each_row(one: Callable[[Tensor], Tensor], x_TX: Tensor) -> Tensor:
    """Applies ``one`` to each row by a call of its own; no rows are no calls but keep their width."""
    if len(x_TX) == 0:
        return one(x_TX.new_zeros(x_TX.shape[1:])).unsqueeze(0)[:0]
    return torch.stack([one(row) for row in x_TX])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis; fp32 in and out."""
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean + eps) * weight.float()


def matvec(x_K: Tensor, weight_NK: Tensor, bias_N: Tensor | None, segments: int = 1) -> Tensor:
    """fp32 [N]. ``segments`` partial sums of K add along a binary tree, neighbours first."""
    products_NK = weight_NK * x_K.float()
    parts_NS = products_NK.view(len(weight_NK), segments, -1).sum(-1)
    while parts_NS.shape[1] > 1:
        parts_NS = parts_NS[:, 0::2] + parts_NS[:, 1::2]
    out_N = parts_NS[:, 0]
    return out_N if bias_N is None else out_N + bias_N.float()


def rotate(x_Xd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of each head: element i turns with element i + d/2."""
    a, b = x_Xd.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel 2016, the tanh form; sqrt(2 / pi) = 0.79788..."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": gelu_tanh}
