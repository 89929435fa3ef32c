"""CpuOps: the native kernels. ``one_answer``: lanes run over outputs, sums over K and over keys are sequential within
fixed segments, and rows never see each other. The bits are those of an instruction set, which ``numerics`` names."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.kernels import _native
from penstock.kernels.cpu import calls
from penstock.kernels.cpu.calls import address, counted, dtype_code, pools, same, share_threads, stored
from penstock.kernels.cpu.capture import Captured
from penstock.kernels.ops import Activation, Draw, Forward
from penstock.kernels.paged import allocate_layers, copy_layer_blocks
from penstock.kernels.types import Batch, GroupBatch, GroupedWeight, KVLayer, PackedWeight, Quantize, Weight

PANEL, GROUPS = 16, (32, 64, 128)
"""Of ``csrc/cpu``."""

ORDERS = ("PHdB", "PHBd", "PHB")
"""A head's block lies in one piece, K with its keys side by side (``csrc/cpu/walk.h``)."""

VERSION = 4
"""Raised by every change of this backend's bits."""

BLOCK_WHOLE = 16
"""Positions in a block of the cache that an encoder's sequences pass through."""


class CpuOps:
    name = "cpu"
    one_answer = True
    grouped = True

    def __init__(self) -> None:
        machine, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()  # torch makes rope's tables
        self.numerics = f"cpu/{VERSION} {_native.chosen()} {machine} torch/{torch.__version__} {capability}"
        self.quantize: Quantize | None = _quantize
        self.draw: Draw | None = _draw
        self.captured: Callable[[Forward], Forward] | None = Captured
        self.layout = f"panels of {PANEL} by {_binary()}"

    def pack(self, weight: Tensor | GroupedWeight) -> Weight:
        """Panels of 16 outputs, inputs in pairs, in place; grouped weights in quads (``csrc/cpu/kernels.h``)."""
        share_threads()
        if isinstance(weight, GroupedWeight):
            return _pack_grouped(weight)
        same(weight, weight.dtype, weight)
        (outputs, inputs), code = weight.shape[-2:], dtype_code(weight.dtype)
        for weight_NK in weight.view(-1, outputs, inputs):
            _native.pack(weight_NK.data_ptr(), outputs, inputs, code)
        return weight

    def embed(self, ids_T: Tensor, table_VD: Weight, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        share_threads()
        ids_T, (rows, width) = ids_T.contiguous(), table_VD.shape
        out_TD = torch.empty(len(ids_T), width, dtype=dtype)
        data, bits, group = stored(table_VD)
        same(ids_T, torch.int64, ids_T)
        same(ids_T, dtype, None if bits else data)
        sizes = (len(ids_T), rows, width, bits, group)
        _native.embed(data.data_ptr(), ids_T.data_ptr(), out_TD.data_ptr(), *sizes, scale, dtype_code(dtype))
        return out_TD

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return calls.norm(x_TD, None, weight_D, None, eps, centred=False)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        return calls.norm(x_TD, None, weight_D, bias_D, eps, centred=True)

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
        residual_TD = residual_TD.contiguous()
        return calls.norm(delta_TD, residual_TD, weight_D, bias_D, eps, scale, centred=centred), residual_TD

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None,
        segments: int = 1,
        activation: Activation | None = None,
    ) -> Tensor:
        return calls.linear(x_TK, weight_NK, bias_N, segments, activation)

    def gate_up(self, x_TD: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        return calls.linear(x_TD, weight_2FD, bias_2F, activation=activation, gated=True)

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
        share_threads()
        kv_heads, head_dim = kv.k_PBHd.shape[2:]
        heads = qkv_TC.shape[1] // head_dim - 2 * kv_heads
        qkv_TC = qkv_TC.contiguous()
        q_weight, k_weight = norms or (None, None)
        wide = q_weight is not None and q_weight.dtype == torch.float32
        whole_row = q_weight is not None and q_weight.numel() != head_dim
        slots_T = batch.groups[group].slots_T
        same(qkv_TC, torch.float32 if wide else qkv_TC.dtype, q_weight, k_weight)
        same(qkv_TC, torch.float32, rope_Pd)
        same(qkv_TC, torch.int64, batch.positions_T, slots_T)
        counted(heads * head_dim if whole_row else head_dim, q_weight)
        counted(kv_heads * head_dim if whole_row else head_dim, k_weight)
        counted(len(qkv_TC), batch.positions_T, slots_T)
        counted(len(qkv_TC) * (heads + 2 * kv_heads) * head_dim, qkv_TC)
        if rope_Pd is not None and (rope_Pd.shape[1] > head_dim or len(rope_Pd) < max(batch.contexts, default=0)):
            raise ValueError(f"rope table {list(rope_Pd.shape)} for heads of {head_dim}, contexts {batch.contexts}")
        places = pools(kv, qkv_TC, batch, heads, head_dim)
        q_TNd = qkv_TC.new_empty(len(qkv_TC), heads, head_dim)
        _native.heads(
            qkv_TC.data_ptr(),
            address(q_weight),
            address(k_weight),
            wide,
            whole_row,
            address(rope_Pd),
            0 if rope_Pd is None else rope_Pd.shape[1] // 2,
            batch.positions_T.data_ptr(),
            slots_T.data_ptr(),
            q_TNd.data_ptr(),
            *places,
            len(qkv_TC),
            heads,
            kv_heads,
            head_dim,
            kv.k_PBHd.shape[1],
            eps,
            dtype_code(qkv_TC.dtype),
        )
        return q_TNd

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
        return calls.attention(q_TNd, kv, batch, group, scale, window or 0, softcap or 0.0, sinks_N, slopes_N)

    def attend_whole(self, qkv_TC: Tensor, heads: int, row_starts: Sequence[int], scale: float) -> Tensor:
        """Through a cache of its own, where each sequence starts a block."""
        starts_R1, head_dim = torch.tensor(row_starts), qkv_TC.shape[1] // (3 * heads)
        contexts_R = starts_R1.diff()
        blocks_R = (contexts_R + BLOCK_WHOLE - 1) // BLOCK_WHOLE
        first_R, most = blocks_R.cumsum(0) - blocks_R, max(blocks_R.tolist(), default=0)
        shift_R = first_R * BLOCK_WHOLE - starts_R1[:-1]
        slots_T = torch.arange(len(qkv_TC)) + shift_R.repeat_interleave(contexts_R)
        group = GroupBatch(slots_T, (first_R[:, None] + torch.arange(most)).int())
        batch = Batch(slots_T, list(row_starts), starts_R1, contexts_R.tolist(), contexts_R, BLOCK_WHOLE, [group])
        total = int(blocks_R.sum())
        sizes = (1, total, BLOCK_WHOLE, heads, head_dim)
        (kv,) = allocate_layers(*sizes, qkv_TC.dtype, qkv_TC.device, ORDERS, brief=True)
        return calls.attention(
            self.qk_norm_rope_write(qkv_TC, None, 0.0, None, kv, batch, 0), kv, batch, 0, scale, whole=True
        )

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, active: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        return calls.route(calls.linear(x_TD, weight_ED, bias_E, wide=True), active, normalize)

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
        gate_up, down = (gate_up_E2FD, gate_up_bias_E2F), (down_EDF, down_bias_ED)
        return calls.experts(x_TD, chosen_TA, weights_TA, *gate_up, *down, activation, shared)

    def logits(self, x_RD: Tensor, weight_VD: Weight) -> Tensor:
        return calls.linear(x_RD, weight_VD, None, wide=True)

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
        return allocate_layers(layers, blocks, block_size, kv_heads, head_dim, dtype, device, ORDERS)

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
        copy_layer_blocks(layers, pairs)


@cache
def _binary() -> str:
    """The native kernels that are installed, by their content."""
    return hashlib.blake2b(Path(_native.__file__).read_bytes(), digest_size=16).hexdigest()


def _draw(logits_RV: Tensor, limits_R5: Tensor, sites_R5: Tensor) -> Tensor:
    share_threads()
    same(logits_RV, torch.float32, logits_RV)
    same(logits_RV, torch.float64, limits_R5)
    same(logits_RV, torch.int64, sites_R5)
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
    places = (logits_RV.data_ptr(), limits_R5.data_ptr(), sites_R5.data_ptr(), tokens_R.data_ptr())
    _native.draw(*places, *logits_RV.shape)
    return tokens_R


def check_groups(group: int, inputs: int) -> None:
    """Raises ValueError."""
    if group not in GROUPS or inputs % group:
        raise ValueError(f"{inputs} inputs in groups of {group}; the kernels know whole ones of {GROUPS}")


def _quantize(weight: Tensor, bits: int, group: int) -> GroupedWeight:
    """Raises ValueError if no kernel has such groups."""
    share_threads()
    weight, (*rows, inputs) = weight.contiguous(), weight.shape
    check_groups(group, inputs)
    codes_NK = torch.empty(weight.shape, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales_NG = torch.empty(*rows, inputs // group, dtype=torch.float16)
    zeros_NG = None if bits == 8 else torch.empty(scales_NG.shape, dtype=torch.uint8)
    same(weight, weight.dtype, weight)
    places = (weight.data_ptr(), codes_NK.data_ptr(), scales_NG.data_ptr(), address(zeros_NG))
    _native.quantize(*places, scales_NG.numel(), bits, group, dtype_code(weight.dtype))
    return GroupedWeight(codes_NK, scales_NG, zeros_NG)


def _pack_grouped(weight: GroupedWeight) -> PackedWeight:
    *stack, outputs, inputs = weight.shape
    check_groups(weight.group, inputs)
    codes, scales, zeros = weight.codes_NK.contiguous(), weight.scales_NG.contiguous(), weight.zeros_NG
    zeros = None if zeros is None else zeros.contiguous()
    same(codes, torch.int8 if zeros is None else torch.uint8, codes)
    same(codes, torch.float16, scales)
    same(codes, torch.uint8, zeros)
    counted(codes.numel() // weight.group, scales, zeros)
    size = -(-outputs // PANEL) * _native.panel_bytes(inputs, weight.bits, weight.group)
    data = torch.empty(*stack, size, dtype=torch.uint8)
    for index, target in enumerate(data.view(-1, size)):
        first, at = index * outputs * inputs, index * outputs * inputs // weight.group
        places = (
            codes.data_ptr() + first,
            scales.data_ptr() + 2 * at,
            zeros.data_ptr() + at if zeros is not None else 0,
        )
        _native.pack_grouped(*places, target.data_ptr(), outputs, inputs, weight.bits, weight.group)
    return PackedWeight(data, weight.shape, weight.bits, weight.group)
