"""The native calls over tensors: memory for what they write, and the checks that addresses alone do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import _native
from penstock.kernels.ops import Activation
from penstock.kernels.types import Batch, GroupBatch, KVLayer, PackedWeight, Weight, plain

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "swiglu_clamped": 4}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(dtype: torch.dtype) -> int:
    """What the native side calls it. Raises TypeError if no kernel computes with it."""
    if dtype not in DTYPES:
        raise TypeError(f"{dtype}: the native kernels compute with {', '.join(map(str, DTYPES))} alone")
    return DTYPES[dtype]


def stored(weight: Weight) -> tuple[Tensor, int, int]:
    """A packed weight's memory, bits and group; no bits are plain numbers."""
    if isinstance(weight, PackedWeight):
        return weight.data, weight.bits, weight.group
    return plain(weight), 0, 0


def same(x: Tensor, dtype: torch.dtype, *others: Tensor | None) -> None:
    """The native side sees addresses alone: another dtype, device or a gap between rows would be read as it lies."""
    for other in others:
        if other is not None and (other.dtype != dtype or other.is_cuda or not other.is_contiguous()):
            raise TypeError(f"{dtype} on a CPU beside {other.dtype} on {other.device}, strides {other.stride()}")
    if x.is_cuda:
        raise TypeError(f"native kernels cannot reach {x.device}")


def counted(count: int, *vectors: Tensor | None) -> None:
    """Nor does it see where a vector ends."""
    for vector in vectors:
        if vector is not None and vector.numel() != count:
            raise ValueError(f"{list(vector.shape)} where {count} numbers are read")


def laid_out(batch: Batch, rows: int, *groups: GroupBatch) -> None:
    """Nor whether vectors and block tables are those of so many rows, of the batch's requests and of their contexts.
    What blocks the tables name is for who makes them to check."""
    requests, longest = len(batch.contexts), max(batch.contexts, default=0)
    counted(rows, batch.positions_T, *(group.slots_T for group in groups))
    counted(requests, batch.contexts_R)
    counted(requests + 1, batch.row_starts_R1)
    if batch.row_starts[-1] != rows:
        raise ValueError(f"{rows} rows where requests end with row {batch.row_starts[-1]}")
    for group in groups:
        count, columns = group.tables_RM.shape
        if count != requests or columns * batch.block_size < longest:
            raise ValueError(
                f"block tables {[count, columns]} of {batch.block_size} positions a block for {requests} contexts,"
                f" the longest of {longest}"
            )


def pools(kv: KVLayer, x: Tensor, batch: Batch, heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Addresses of K, V and their scales, which are of ``allocate_kv`` and go with rows like x and query heads."""
    blocks, block_size, kv_heads, width = kv.k_PBHd.shape
    if batch.block_size != block_size or head_dim != width or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{heads} heads of {head_dim} and blocks of {batch.block_size} positions beside a pool of blocks of"
            f" {block_size}, {kv_heads} heads of {width}"
        )
    counted(kv.k_PBHd.numel(), kv.v_PBHd)
    counted(blocks * block_size * kv_heads, kv.k_scales_PBH, kv.v_scales_PBH)
    k_PHdB, v_PHBd = kv.k_PBHd.permute(0, 2, 3, 1), kv.v_PBHd.transpose(1, 2)
    same(x, x.dtype if kv.k_scales_PBH is None else torch.int8, k_PHdB, v_PHBd)
    scales = [None if s is None else s.transpose(1, 2) for s in (kv.k_scales_PBH, kv.v_scales_PBH)]
    same(x, torch.bfloat16, *scales)
    return k_PHdB.data_ptr(), v_PHBd.data_ptr(), address(scales[0]), address(scales[1])


def norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    scale: float = 1.0,
    *,
    centred: bool,
) -> Tensor:
    """Of x, or of what becomes of the residual; without a weight the latter itself."""
    share_threads()
    x_TD, (rows, width) = x_TD.contiguous(), x_TD.shape
    wide = weight_D is not None and weight_D.dtype == torch.float32
    same(x_TD, x_TD.dtype, residual_TD)
    same(x_TD, torch.float32 if wide else x_TD.dtype, weight_D, bias_D)
    counted(width, weight_D, bias_D)
    counted(rows * width, residual_TD)
    out_TD = None if weight_D is None else torch.empty_like(x_TD)
    _native.norm(
        x_TD.data_ptr(),
        address(residual_TD),
        address(weight_D),
        address(bias_D),
        wide,
        centred,
        address(out_TD),
        rows,
        width,
        eps,
        scale,
        dtype_code(x_TD.dtype),
    )
    if out_TD is not None:
        return out_TD
    assert residual_TD is not None
    return residual_TD


def linear(
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
    x_TK, (rows, width), (outputs, inputs) = x_TK.contiguous(), x_TK.shape, weight_NK.shape
    data, bits, group = stored(weight_NK)
    same(x_TK, x_TK.dtype, None if bits else data, bias_N)
    counted(outputs, bias_N)
    # The segments' sums add along a binary tree.
    if width != inputs or not 0 < segments == segments & -segments or inputs % (segments * (group or 1)):
        raise ValueError(f"{list(x_TK.shape)} times {list(weight_NK.shape)} in {segments} segments")
    dtype = torch.float32 if wide else x_TK.dtype
    out_TN = torch.empty(rows, outputs // 2 if gated else outputs, dtype=dtype)
    _native.linear(
        x_TK.data_ptr(),
        data.data_ptr(),
        address(bias_N),
        out_TN.data_ptr(),
        rows,
        outputs,
        inputs,
        segments,
        ACTIVATIONS[activation],
        gated,
        wide,
        bits,
        group,
        dtype_code(x_TK.dtype),
    )
    return out_TN


def attention(
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
    same(q_TNd, torch.int32, tables_RM)
    same(q_TNd, torch.int64, batch.row_starts_R1, batch.contexts_R)
    same(q_TNd, torch.float32, sinks_N, slopes_N)
    counted(heads, sinks_N, slopes_N)
    laid_out(batch, rows, batch.groups[group])
    out_TC = q_TNd.new_empty(rows, heads * head_dim)
    _native.attention(
        q_TNd.data_ptr(),
        *pools(kv, q_TNd, batch, heads, head_dim),
        out_TC.data_ptr(),
        tables_RM.data_ptr(),
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
        address(sinks_N),
        address(slopes_N),
        dtype_code(q_TNd.dtype),
    )
    return out_TC


def route(logits_TE: Tensor, active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    rows, count = logits_TE.shape
    same(logits_TE, torch.float32, logits_TE)
    if not 0 < active <= count:
        raise ValueError(f"{active} of {count} experts")
    chosen_TA, weights_TA = torch.empty(rows, active, dtype=torch.int64), torch.empty(rows, active)
    places = (logits_TE.data_ptr(), chosen_TA.data_ptr(), weights_TA.data_ptr())
    _native.route(*places, rows, count, active, normalize)
    return chosen_TA, weights_TA


def experts(
    x_TD: Tensor,
    chosen_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Weight,
    gate_up_bias_E2F: Tensor | None,
    down_EDF: Weight,
    down_bias_ED: Tensor | None,
    activation: Activation,
    shared: tuple[Tensor, Tensor] | None,
) -> Tensor:
    share_threads()
    x_TD, (count, width, inner) = x_TD.contiguous(), down_EDF.shape
    gate_up, gate_up_bits, gate_up_group = stored(gate_up_E2FD)
    down, down_bits, down_group = stored(down_EDF)
    plain_weights = [data for data, bits in ((gate_up, gate_up_bits), (down, down_bits)) if not bits]
    y_TD, gate_T1 = shared or (None, None)
    same(x_TD, x_TD.dtype, *plain_weights, gate_up_bias_E2F, down_bias_ED, y_TD, gate_T1)
    same(x_TD, torch.int64, chosen_TA)
    same(x_TD, torch.float32, weights_TA)
    if gate_up_E2FD.shape != (count, 2 * inner, x_TD.shape[1]) or x_TD.shape[1] != width:
        raise ValueError(f"{list(x_TD.shape)} through {list(gate_up_E2FD.shape)} and {list(down_EDF.shape)}")
    counted(2 * count * inner, gate_up_bias_E2F)
    counted(count * width, down_bias_ED)
    counted(x_TD.numel(), y_TD)
    counted(len(x_TD), gate_T1)
    if len(chosen_TA) != len(x_TD) or chosen_TA.shape != weights_TA.shape:
        raise ValueError(f"{list(chosen_TA.shape)} and {list(weights_TA.shape)} of {len(x_TD)} rows")
    out_TD = torch.empty_like(x_TD)
    _native.experts(
        x_TD.data_ptr(),
        chosen_TA.data_ptr(),
        weights_TA.data_ptr(),
        gate_up.data_ptr(),
        address(gate_up_bias_E2F),
        down.data_ptr(),
        address(down_bias_ED),
        address(y_TD),
        address(gate_T1),
        out_TD.data_ptr(),
        len(x_TD),
        chosen_TA.shape[1],
        count,
        width,
        inner,
        ACTIVATIONS[activation],
        gate_up_bits,
        gate_up_group,
        down_bits,
        down_group,
        dtype_code(x_TD.dtype),
    )
    return out_TD


def share_threads() -> None:
    """As many threads as torch has: one number for the user to set."""
    _native.set_threads(torch.get_num_threads())
