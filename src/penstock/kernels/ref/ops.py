"""RefOps: what every other backend is compared with.

The arithmetic of a row is in ``arithmetic``; each row is computed by a call of its own, so that the argument for
``one_answer`` rests on no more than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from penstock.kernels.ops import Activation, Draw, Forward
from penstock.kernels.paged import allocate_layers, copy_layer_blocks, flat
from penstock.kernels.ref.arithmetic import ACTIVATIONS, gate_up, layer_norm, matvec, quantize, rms_norm, rotate
from penstock.kernels.ref.attention import Row, Scoring, attend, attend_whole
from penstock.kernels.ref.moe import experts_row, route_row
from penstock.kernels.types import Batch, GroupedWeight, KVLayer, Quantize, Weight, plain

VERSION = 2
"""Raised by every change of this backend's bits."""


class RefOps:
    name = "ref"
    one_answer = True
    grouped = True
    quantize: Quantize | None = None
    draw: Draw | None = None
    captured: Callable[[Forward], Forward] | None = None
    layout = ""

    def __init__(self) -> None:
        self.numerics = f"ref/{VERSION} torch/{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"

    def pack(self, weight: Tensor | GroupedWeight) -> Weight:
        return weight

    def embed(self, ids_T: Tensor, table_VD: Weight, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if isinstance(table_VD, GroupedWeight):
            return table_VD[ids_T].widened().to(dtype) * scale
        return plain(table_VD).index_select(0, ids_T) * scale

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return each_row(lambda x_D: rms_norm(x_D.float(), weight_D, eps).to(x_TD.dtype), x_TD)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        return each_row(lambda x_D: layer_norm(x_D.float(), weight_D, bias_D, eps).to(x_TD.dtype), x_TD)

    def add_norm(
        self,
        delta_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor | None,
        eps: float,
        scale: float = 1.0,
        bias_D: Tensor | None = None,
        *,
        centred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        scaled_TD = (scale * delta_TD.float()).to(delta_TD.dtype)
        sum_TD = (residual_TD.float() + scaled_TD.float()).to(residual_TD.dtype)
        if weight_D is None:
            return sum_TD, sum_TD
        if centred:
            return self.layer_norm(sum_TD, weight_D, bias_D, eps), sum_TD
        return self.norm(sum_TD, weight_D, eps), sum_TD

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None,
        segments: int = 1,
        activation: Activation | None = None,
    ) -> Tensor:
        act = ACTIVATIONS[activation] if activation else torch.Tensor.float
        return each_row(lambda x_K: act(matvec(x_K, weight_NK, bias_N, segments)).to(x_TK.dtype), x_TK)

    def gate_up(self, x_TD: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        return each_row(lambda x_D: gate_up(x_D, weight_2FD, bias_2F, activation).to(x_TD.dtype), x_TD)

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        rope_Pd: Tensor | None,
        kv: KVLayer,
        batch: Batch,
        group: int,
    ) -> Tensor:
        kv_heads, head_dim = kv.k_PBHd.shape[2:]
        pools = [flat(pool) for pool in kv.pools()]
        slots = batch.groups[group].slots_T.tolist()
        q_rows = []
        for qkv_C, slot, position in zip(qkv_TC, slots, batch.positions_T.tolist(), strict=True):
            heads_Xd = qkv_C.view(-1, head_dim).float()
            q_Nd, k_Hd, v_Hd = torch.split(heads_Xd, [len(heads_Xd) - 2 * kv_heads, kv_heads, kv_heads])
            if norms is not None:
                q_Nd, k_Hd = norm_heads(q_Nd, norms[0], eps), norm_heads(k_Hd, norms[1], eps)
            if rope_Pd is not None:
                cos, sin = rope_Pd[position].chunk(2)
                q_Nd, k_Hd = rotate(q_Nd, cos, sin), rotate(k_Hd, cos, sin)
            q_rows.append(q_Nd.to(qkv_C.dtype))
            if slot >= 0:
                stored: list[Tensor] = [k_Hd, v_Hd]
                if kv.k_scales_PBH is not None:
                    (k_Hd, k_scales_H), (v_Hd, v_scales_H) = quantize(k_Hd), quantize(v_Hd)
                    stored = [k_Hd, v_Hd, k_scales_H, v_scales_H]
                for pool, part in zip(pools, stored, strict=True):
                    pool[slot] = part
        return torch.stack(q_rows)

    def attention(
        self,
        q_TNd: Tensor,
        kv: KVLayer,
        batch: Batch,
        group: int,
        window: int | None,
        scale: float,
        softcap: float | None = None,
        sinks_N: Tensor | None = None,
        slopes_N: Tensor | None = None,
    ) -> Tensor:
        tables_RM, scoring = batch.groups[group].tables_RM, Scoring(scale, softcap, sinks_N, slopes_N)
        out = []
        for request, (start, end) in enumerate(pairwise(batch.row_starts)):
            for row in range(start, end):
                position = batch.contexts[request] - (end - row)
                first = 0 if window is None else max(0, position - window + 1)
                out.append(attend(q_TNd[row], kv, Row(tables_RM[request], first, position), scoring))
        return torch.stack(out).to(q_TNd.dtype)

    def attend_whole(self, qkv_TC: Tensor, heads: int, row_starts: Sequence[int], scale: float) -> Tensor:
        spans = [span for span in pairwise(row_starts) if span[0] < span[1]]
        if not spans:
            return qkv_TC.new_empty(0, qkv_TC.shape[1] // 3)
        out = [attend_whole(qkv_TC[start:end], heads, Scoring(scale)) for start, end in spans]
        return torch.cat(out).to(qkv_TC.dtype)

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, active: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        chosen_TA = torch.empty(len(x_TD), active, dtype=torch.int64, device=x_TD.device)
        weights_TA = torch.empty(len(x_TD), active, device=x_TD.device)
        for row, x_D in enumerate(x_TD):
            chosen_TA[row], weights_TA[row] = route_row(matvec(x_D, weight_ED, bias_E), active, normalize)
        return chosen_TA, weights_TA

    def experts(
        self,
        x_TD: Tensor,
        chosen_TA: Tensor,
        weights_TA: Tensor,
        gate_up_E2FD: Weight,
        gate_up_bias_E2F: Tensor | None,
        down_EDF: Weight,
        down_bias_ED: Tensor | None,
        activation: Activation,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        weights = (gate_up_E2FD, gate_up_bias_E2F, down_EDF, down_bias_ED)
        out_TD = torch.empty_like(x_TD)
        for row, chosen in enumerate(chosen_TA.tolist()):
            out_TD[row] = experts_row(x_TD[row], chosen, weights_TA[row], *weights, activation)
            if shared is not None:
                y_D, gate_1 = (part[row].float() for part in shared)
                out_TD[row] = out_TD[row].float() + y_D / (1 + torch.exp(-gate_1))
        return out_TD

    def logits(self, x_RD: Tensor, weight_VD: Weight) -> Tensor:
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


def norm_heads(x_Xd: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each head, if the weight is as wide as one; else all of them together."""
    return rms_norm(x_Xd if len(weight) == x_Xd.shape[1] else x_Xd.flatten(), weight, eps).view_as(x_Xd)
