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
from penstock.kernels.cpu.capture import Captured, share_threads
from penstock.kernels.ops import Activation, Draw, Forward
from penstock.kernels.paged import allocate_layers, copy_layer_blocks
from penstock.kernels.types import Batch, GroupBatch, GroupedWeight, KVLayer, PackedWeight, Quantize, Weight, plain

PANEL, GROUPS = 16, (32, 64, 128)
"""Of ``csrc/cpu``."""

ORDERS = ("PHdB", "PHBd", "PHB")
"""A head's block lies in one piece, K with its keys side by side (``csrc/cpu/walk.h``)."""

VERSION = 3
"""Raised by every change of this backend's bits."""

BLOCK_WHOLE = 16
"""Positions in a block of the cache that an encoder's sequences pass through."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "swiglu_clamped": 4}


class CpuOps:
    name = "cpu"
    one_answer = True
    grouped = True

    def __init__(self) -> None:
        machine, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()  # torch weighs the experts
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
        outputs, inputs = weight.shape[-2:]
        for weight_NK in weight.view(-1, outputs, inputs):
            _native.pack(weight_NK.data_ptr(), outputs, inputs, DTYPES[weight.dtype])
        return weight

    def embed(self, ids_T: Tensor, table_VD: Weight, dtype: torch.dtype) -> Tensor:
        share_threads()
        ids_T, (rows, width) = ids_T.contiguous(), table_VD.shape
        out_TD = torch.empty(len(ids_T), width, dtype=dtype)
        data, bits, group = _stored(table_VD)
        sizes = (len(ids_T), rows, width, bits, group)
        _native.embed(data.data_ptr(), ids_T.data_ptr(), out_TD.data_ptr(), *sizes, DTYPES[dtype])
        return out_TD

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return _norm(x_TD, None, weight_D, None, eps, centred=False)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        return _norm(x_TD, None, weight_D, bias_D, eps, centred=True)

    def add_norm(
        self,
        delta_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        bias_D: Tensor | None = None,
        *,
        centred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        residual_TD = residual_TD.contiguous()
        return _norm(delta_TD, residual_TD, weight_D, bias_D, eps, centred=centred), residual_TD

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None,
        segments: int = 1,
        activation: Activation | None = None,
    ) -> Tensor:
        return _linear(x_TK, weight_NK, bias_N, segments, activation)

    def gate_up(self, x_TD: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        return _linear(x_TD, weight_2FD, bias_2F, activation=activation, gated=True)

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
        q_TNd = qkv_TC.new_empty(len(qkv_TC), heads, head_dim)
        q_weight, k_weight = norms or (None, None)
        wide = q_weight is not None and q_weight.dtype == torch.float32
        _same(qkv_TC, torch.float32 if wide else qkv_TC.dtype, q_weight, k_weight)
        _native.heads(
            qkv_TC.data_ptr(),
            _address(q_weight),
            _address(k_weight),
            wide,
            q_weight is not None and len(q_weight) != head_dim,
            _address(rope_Pd),
            0 if rope_Pd is None else rope_Pd.shape[1] // 2,
            batch.positions_T.data_ptr(),
            batch.groups[group].slots_T.data_ptr(),
            q_TNd.data_ptr(),
            *_pools(kv, qkv_TC),
            len(qkv_TC),
            heads,
            kv_heads,
            head_dim,
            kv.k_PBHd.shape[1],
            eps,
            DTYPES[qkv_TC.dtype],
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
        sinks_N = None if sinks_N is None else sinks_N.float()
        return _attention(q_TNd, kv, batch, group, scale, window or 0, softcap or 0.0, sinks_N, slopes_N)

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
        return _attention(
            self.qk_norm_rope_write(qkv_TC, None, 0.0, None, kv, batch, 0), kv, batch, 0, scale, whole=True
        )

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, active: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Sorting, exp and the sum over a row of experts are torch's, whose bits know no other row."""
        top_TE, order_TE = _linear(x_TD, weight_ED, bias_E, wide=True).sort(descending=True, stable=True)
        odds_TE = torch.exp(top_TE - top_TE[:, :1])
        odds_TA = odds_TE[:, :active]
        total_T1 = (odds_TA.contiguous() if normalize else odds_TE).sum(-1, keepdim=True)
        return order_TE[:, :active], odds_TA / total_T1

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
    ) -> Tensor:
        active = chosen_TA.shape[1]
        out_SD = torch.empty(chosen_TA.numel(), x_TD.shape[1])  # S = T A slots
        order_S = chosen_TA.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_TA.flatten(), minlength=down_EDF.shape[0]).tolist()
        for expert, slots_n in enumerate(torch.split(order_S, counts)):
            if len(slots_n):
                up_2F, down_D = (None if bias is None else bias[expert] for bias in (gate_up_bias_E2F, down_bias_ED))
                inner_nF = self.gate_up(x_TD[slots_n // active], gate_up_E2FD[expert], up_2F, activation)
                out_SD[slots_n] = _linear(inner_nF, down_EDF[expert], down_D, wide=True)
        first_TD, *others = (out_SD.view(-1, active, x_TD.shape[1]) * weights_TA.unsqueeze(-1)).unbind(1)
        for slot_TD in others:  # in order, as rule 7 has it
            first_TD += slot_TD
        return first_TD.to(x_TD.dtype)

    def logits(self, x_RD: Tensor, weight_VD: Weight) -> Tensor:
        return _linear(x_RD, weight_VD, None, wide=True)

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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _draw(logits_RV: Tensor, limits_R5: Tensor, sites_R5: Tensor) -> Tensor:
    share_threads()
    _same(logits_RV, torch.float32, logits_RV)
    _same(logits_RV, torch.float64, limits_R5)
    _same(logits_RV, torch.int64, sites_R5)
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
    places = (logits_RV.data_ptr(), limits_R5.data_ptr(), sites_R5.data_ptr(), tokens_R.data_ptr())
    _native.draw(*places, *logits_RV.shape)
    return tokens_R


def _quantize(weight: Tensor, bits: int, group: int) -> GroupedWeight:
    """Raises ValueError if no kernel has such groups."""
    share_threads()
    if group not in GROUPS:
        raise ValueError(f"groups of {group} inputs; the kernels know {GROUPS}")
    weight, (*rows, inputs) = weight.contiguous(), weight.shape
    codes_NK = torch.empty(weight.shape, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales_NG = torch.empty(*rows, inputs // group, dtype=torch.float16)
    zeros_NG = None if bits == 8 else torch.empty(scales_NG.shape, dtype=torch.uint8)
    _same(weight, weight.dtype, weight)
    places = (weight.data_ptr(), codes_NK.data_ptr(), scales_NG.data_ptr(), _address(zeros_NG))
    _native.quantize(*places, scales_NG.numel(), bits, group, DTYPES[weight.dtype])
    return GroupedWeight(codes_NK, scales_NG, zeros_NG)


def _pack_grouped(weight: GroupedWeight) -> PackedWeight:
    *stack, outputs, inputs = weight.shape
    if weight.group not in GROUPS:
        raise ValueError(f"groups of {weight.group} inputs; the kernels know {GROUPS}")
    codes, scales, zeros = weight.codes_NK.contiguous(), weight.scales_NG.contiguous(), weight.zeros_NG
    zeros = None if zeros is None else zeros.contiguous()
    _same(codes, torch.float16, scales)
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


def _stored(weight: Weight) -> tuple[Tensor, int, int]:
    """A packed weight's memory, bits and group; no bits are plain numbers."""
    if isinstance(weight, PackedWeight):
        return weight.data, weight.bits, weight.group
    return plain(weight), 0, 0


def _same(x: Tensor, dtype: torch.dtype, *others: Tensor | None) -> None:
    """The native side sees addresses alone: another dtype, device or a gap between rows would be read as it lies."""
    for other in others:
        if other is not None and (other.dtype != dtype or other.is_cuda or not other.is_contiguous()):
            raise TypeError(f"{dtype} on a CPU beside {other.dtype} on {other.device}, strides {other.stride()}")
    if x.is_cuda:
        raise TypeError(f"native kernels cannot reach {x.device}")


def _pools(kv: KVLayer, x: Tensor) -> tuple[int, int, int, int]:
    """Addresses of K, V and their scales, which are of ``allocate_kv`` and go with rows like x."""
    k_PHdB, v_PHBd = kv.k_PBHd.permute(0, 2, 3, 1), kv.v_PBHd.transpose(1, 2)
    _same(x, x.dtype if kv.k_scales_PBH is None else torch.int8, k_PHdB, v_PHBd)
    scales = [None if s is None else s.transpose(1, 2) for s in (kv.k_scales_PBH, kv.v_scales_PBH)]
    _same(x, torch.bfloat16, *scales)
    return k_PHdB.data_ptr(), v_PHBd.data_ptr(), _address(scales[0]), _address(scales[1])


def _norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, centred: bool
) -> Tensor:
    share_threads()
    x_TD, (rows, width) = x_TD.contiguous(), x_TD.shape
    _same(x_TD, x_TD.dtype, residual_TD)
    wide = weight_D.dtype == torch.float32
    _same(x_TD, torch.float32 if wide else x_TD.dtype, weight_D, bias_D)
    out_TD = torch.empty_like(x_TD)
    places = (x_TD.data_ptr(), _address(residual_TD), weight_D.data_ptr(), _address(bias_D))
    _native.norm(*places, wide, centred, out_TD.data_ptr(), rows, width, eps, DTYPES[x_TD.dtype])
    return out_TD


def _linear(
    x_TK: Tensor,
    weight_NK: Weight,
    bias_N: Tensor | None,
    segments: int = 1,
    activation: Activation | None = None,
    *,
    gated: bool = False,
    wide: bool = False,
) -> Tensor:
    share_threads()
    x_TK = x_TK.contiguous()
    outputs, inputs = weight_NK.shape
    data, bits, group = _stored(weight_NK)
    _same(x_TK, x_TK.dtype, None if bits else data, bias_N)
    if x_TK.shape[1] != inputs or inputs % (segments * (group or 1)):
        raise ValueError(f"{list(x_TK.shape)} times {list(weight_NK.shape)} in {segments} segments")
    dtype = torch.float32 if wide else x_TK.dtype
    out_TN = torch.empty(len(x_TK), outputs // 2 if gated else outputs, dtype=dtype)
    _native.linear(
        x_TK.data_ptr(),
        data.data_ptr(),
        _address(bias_N),
        out_TN.data_ptr(),
        len(x_TK),
        outputs,
        inputs,
        segments,
        ACTIVATIONS[activation],
        gated,
        wide,
        bits,
        group,
        DTYPES[x_TK.dtype],
    )
    return out_TN


def _attention(
    q_TNd: Tensor,
    kv: KVLayer,
    batch: Batch,
    group: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_N: Tensor | None = None,
    slopes_N: Tensor | None = None,
    *,
    whole: bool = False,
) -> Tensor:
    share_threads()
    q_TNd, (rows, heads, head_dim), tables_RM = q_TNd.contiguous(), q_TNd.shape, batch.groups[group].tables_RM
    _same(q_TNd, torch.int32, tables_RM)
    _same(q_TNd, torch.float32, sinks_N, slopes_N)
    out_TC = q_TNd.new_empty(rows, heads * head_dim)
    places = (q_TNd.data_ptr(), *_pools(kv, q_TNd), out_TC.data_ptr(), tables_RM.data_ptr())
    _native.attention(
        *places,
        tables_RM.shape[1],
        batch.block_size,
        batch.row_starts_R1.data_ptr(),
        batch.contexts_R.data_ptr(),
        len(batch.contexts_R),
        heads,
        kv.k_PBHd.shape[2],
        head_dim,
        window,
        whole,
        scale,
        softcap,
        _address(sinks_N),
        _address(slopes_N),
        DTYPES[q_TNd.dtype],
    )
    return out_TC
