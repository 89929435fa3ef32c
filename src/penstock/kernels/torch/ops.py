"""TorchOps: library products and attention over whole batches. Fast, and not ``one_answer``: libraries choose
the order of sums by shape. Rounding points are those of ``kernels.ops``; where a library rounds more often
(low-precision logits on a CPU) the op says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.ops import Activation, Draw, Forward
from penstock.kernels.paged import allocate_layers, copy_layer_blocks, flat
from penstock.kernels.torch.attention import attend, attend_whole
from penstock.kernels.torch.linear import few_rows, left_product, linear, product, rms_norm_, tiles
from penstock.kernels.torch.plan import GroupPlan, make_plan
from penstock.kernels.torch.scored import Scoring
from penstock.kernels.types import Batch, GroupedWeight, KVLayer, Quantize, Weight, plain

VERSION = 2
"""Raised by every change of this backend's arithmetic."""


class TorchOps:
    name = "torch"
    one_answer = False
    grouped = False
    quantize: Quantize | None = None
    draw: Draw | None = None
    captured: Callable[[Forward], Forward] | None = None
    layout = ""

    def __init__(self) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        self.numerics = f"torch/{VERSION} torch/{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {gpu}"

    def pack(self, weight: Tensor | GroupedWeight) -> Weight:
        return weight

    def embed(self, ids_T: Tensor, table_VD: Weight, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        rows_TD = F.embedding(ids_T, plain(table_VD))
        return rows_TD if scale == 1.0 else rows_TD.mul_(scale)

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        for rows in tiles(x_TD):
            out_TD[rows] = rms_norm_(x_TD[rows].to(torch.float32, copy=True), weight_D, eps)
        return out_TD

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)

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
        if scale != 1.0:
            delta_TD = delta_TD * scale
        if weight_D is None:
            return residual_TD.add_(delta_TD), residual_TD
        if centred:
            return self.layer_norm(residual_TD.add_(delta_TD), weight_D, bias_D, eps), residual_TD
        out_TD = torch.empty_like(residual_TD)
        for rows in tiles(out_TD):
            sum_tD = residual_TD[rows].add_(delta_TD[rows])
            out_TD[rows] = rms_norm_(sum_tD.to(torch.float32, copy=True), weight_D, eps)
        return out_TD, residual_TD

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None,
        segments: int = 1,
        activation: Activation | None = None,
    ) -> Tensor:
        """Sums K in the library's own order; rounds before an activation too, as ``gate_up`` does."""
        out_TN = linear(x_TK, plain(weight_NK), bias_N)
        return activated(out_TN, activation) if activation else out_TN

    def gate_up(self, x_TD: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        """Rounds the linear's output and the activation too, as the library's products do."""
        return gate_up(x_TD, plain(weight_2FD), bias_2F, activation)

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
        heads_TYd = qkv_TC.view(len(qkv_TC), -1, head_dim)
        heads = heads_TYd.shape[1] - 2 * kv_heads
        qk_TXd, v_THd = torch.split(heads_TYd, [heads + kv_heads, kv_heads], 1)
        out_TXd = torch.empty_like(qk_TXd, memory_format=torch.contiguous_format)
        for rows in tiles(qk_TXd):
            qk_tXd = qk_TXd[rows].to(torch.float32, copy=True)
            if norms is not None:
                norm_heads_(qk_tXd, heads, *norms, eps)
            if rope_Pd is None:
                out_TXd[rows] = qk_tXd
            else:
                rotate(qk_tXd, rope_Pd[batch.positions_T[rows]].unsqueeze(1), out_TXd[rows])
        # Slot -1 is the last slot of the pool, in the spare block that allocate_kv appends.
        slots = (batch.groups[group].slots_T,)
        flat(kv.k_PBHd).index_put_(slots, out_TXd[:, heads:])
        flat(kv.v_PBHd).index_put_(slots, v_THd)
        return out_TXd[:, :heads]

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
        notes = batch.groups[group]
        if notes.plan is None:
            notes.plan = make_plan(batch, notes.tables_RM, window, kv)
        assert isinstance(notes.plan, GroupPlan)
        return attend(q_TNd, kv, notes.plan, Scoring(scale, softcap, sinks_N, slopes_N))

    def attend_whole(self, qkv_TC: Tensor, heads: int, row_starts: Sequence[int], scale: float) -> Tensor:
        return attend_whole(qkv_TC, heads, row_starts, scale)

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, active: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(x_TD.float(), weight_ED.float(), None if bias_E is None else bias_E.float())
        top_TE, order_TE = logits_TE.sort(descending=True, stable=True)
        weights_TA = (top_TE[:, :active] if normalize else top_TE).softmax(-1)[:, :active]
        return order_TE[:, :active], weights_TA

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
        """On a CPU a low-precision expert's output is rounded before it is weighted: see ``product``."""
        active, gate_up_weight, down = chosen_TA.shape[1], plain(gate_up_E2FD), plain(down_EDF)
        out_SD = torch.empty(chosen_TA.numel(), x_TD.shape[1], device=x_TD.device)  # S = T A slots
        for expert, slots_n in by_expert(chosen_TA, len(down)):
            bias_2F = None if gate_up_bias_E2F is None else gate_up_bias_E2F[expert]
            inner_nF = gate_up(x_TD[slots_n // active], gate_up_weight[expert], bias_2F, activation)
            out_nD = product(inner_nF, down[expert])
            out_SD[slots_n] = out_nD if down_bias_ED is None else out_nD + down_bias_ED[expert]
        first_TD, *others = (out_SD.view(-1, active, x_TD.shape[1]) * weights_TA.unsqueeze(-1)).unbind(1)
        for slot_TD in others:  # in order, as rule 7 has it
            first_TD += slot_TD
        out_TD = first_TD.to(x_TD.dtype)
        if shared is None:
            return out_TD
        y_TD, gate_T1 = shared
        return (out_TD.float() + y_TD.float() / (1 + torch.exp(-gate_T1.float()))).to(x_TD.dtype)

    def logits(self, x_RD: Tensor, weight_VD: Weight) -> Tensor:
        """On a CPU low-precision logits are rounded once: see ``product``."""
        return product(x_RD, plain(weight_VD))

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


def norm_heads_(qk_TXd: Tensor, heads: int, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """Each head, if the weights are as wide as one; else all of q's together, and all of k's."""
    for x_TXd, weight in ((qk_TXd[:, :heads], q_weight), (qk_TXd[:, heads:], k_weight)):
        rms_norm_(x_TXd if len(weight) == x_TXd.shape[2] else x_TXd.view(len(x_TXd), -1), weight, eps)


def rotate(x_TXd: Tensor, table_T1d: Tensor, out_TXd: Tensor) -> None:
    """Rounds into ``out_TXd``. Cosines and sines may be fewer than a head's elements: the rest stays as it is."""
    cos, sin = table_T1d.chunk(2, -1)
    half = cos.shape[-1]
    a, b, rest = torch.split(x_TXd, [half, half, x_TXd.shape[-1] - 2 * half], -1)
    out_a, out_b, out_rest = torch.split(out_TXd, [half, half, rest.shape[-1]], -1)
    out_a.copy_((a * cos).addcmul_(b, sin, value=-1))
    out_b.copy_((b * cos).addcmul_(a, sin))
    if rest.shape[-1]:
        out_rest.copy_(rest)


def gate_up(x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None, activation: Activation) -> Tensor:
    if not few_rows(x_TD):
        gate_TF, up_TF = F.linear(x_TD, weight_2FD, bias_2F).chunk(2, -1)
        return gated(gate_TF, up_TF, activation)
    gate_FT, up_FT = left_product(x_TD, weight_2FD, bias_2F).chunk(2)
    return gated(gate_FT, up_FT, activation).t()  # which is how the next ``left_product`` wants to read it


def activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if activation == "swiglu_clamped":
        clamped, linear_half = gate.float().clamp(max=7.0), up.float().clamp(-7.0, 7.0)
        return (clamped * torch.sigmoid(1.702 * clamped) * (linear_half + 1)).to(gate.dtype)
    return activated(gate, activation).mul_(up)


def by_expert(chosen_TA: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is chosen at all, with the places in the flat ``chosen_TA`` where it is."""
    order = chosen_TA.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_TA.flatten(), minlength=experts).tolist()
    for expert, places_n in enumerate(torch.split(order, counts)):
        if len(places_n):
            yield expert, places_n
