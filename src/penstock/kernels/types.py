"""What a step looks like to the kernels.

Shape suffixes used throughout the device wing:
    T  rows (tokens) of the step, requests one after the other
    R  requests of the step
    D  hidden size          F  feed-forward width      V  vocabulary
    N  query heads          H  KV heads                d  head_dim
    P  blocks of a pool     B  tokens in a block       M  columns of a block table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class KVLayer:
    """K and V of one layer, as stored. Attention reads nothing else (ONE_ANSWER rule 5). The order in memory is the
    backend's own: shapes and strides say where a number is, and a pool may not be contiguous.

    Attributes:
        k_scales_PBH, v_scales_PBH: of int8 pools, bfloat16: a number is scale * code.
    """

    k_PBHd: Tensor
    v_PBHd: Tensor
    k_scales_PBH: Tensor | None = None
    v_scales_PBH: Tensor | None = None

    def pools(self) -> list[Tensor]:
        """All that a block is made of."""
        every = (self.k_PBHd, self.v_PBHd, self.k_scales_PBH, self.v_scales_PBH)
        return [pool for pool in every if pool is not None]


@dataclass(slots=True)
class GroupedWeight:
    """A matrix [..., N, K] of small integers; each ``group`` neighbouring inputs of an output share a scale:
    w = scale * code with 8 bits, w = scale * (code - zero / 16) with 4.

    Attributes:
        codes_NK: int8; with zeros uint8 below 16.
        scales_NG: float16 [..., N, K / group].
        zeros_NG: uint8 sixteenths of a step, for 4 bits only.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes_NK.shape

    @property
    def bits(self) -> int:
        return 8 if self.zeros_NG is None else 4

    @property
    def group(self) -> int:
        return self.codes_NK.shape[-1] // self.scales_NG.shape[-1]

    def __getitem__(self, index: int | slice | Tensor) -> GroupedWeight:
        """One matrix of a stack, or rows of a matrix."""
        zeros_NG = None if self.zeros_NG is None else self.zeros_NG[index]
        return GroupedWeight(self.codes_NK[index], self.scales_NG[index], zeros_NG)

    def stacked(self, rows: int) -> GroupedWeight:
        """[X, rows, K] of matrices [X rows, K] one below the other."""
        parts = (self.codes_NK, self.scales_NG, self.zeros_NG)
        codes_NK, scales_NG, zeros_NG = (None if x is None else x.view(-1, rows, x.shape[-1]) for x in parts)
        assert codes_NK is not None and scales_NG is not None
        return GroupedWeight(codes_NK, scales_NG, zeros_NG)

    def in_groups(self, group: int) -> GroupedWeight:
        """The same numbers in groups that divide these: scales and zeros are repeated."""
        times = self.group // group
        if times == 1:
            return self
        parts = (self.scales_NG, self.zeros_NG)
        scales_NG, zeros_NG = (None if x is None else x.repeat_interleave(times, -1) for x in parts)
        assert scales_NG is not None
        return GroupedWeight(self.codes_NK, scales_NG, zeros_NG)

    def widened(self) -> Tensor:
        """The numbers in fp32: an exact integer times the scale, or a sixteenth of it, rounded once."""
        codes_NGg = self.codes_NK.float().view(*self.scales_NG.shape, self.group)
        scales_NG1 = self.scales_NG.float().unsqueeze(-1)
        if self.zeros_NG is not None:
            codes_NGg = 16 * codes_NGg - self.zeros_NG.float().unsqueeze(-1)
            scales_NG1 = scales_NG1 / 16
        return (codes_NGg * scales_NG1).flatten(-2)


@dataclass(slots=True)
class PackedWeight:
    """A GroupedWeight in a backend's own order.

    Attributes:
        data: uint8, contiguous; the bytes of one matrix after the other if ``shape`` is of a stack.
        shape: [..., N, K], as ever.
    """

    data: Tensor
    shape: torch.Size
    bits: int
    group: int

    def __getitem__(self, index: int) -> PackedWeight:
        """One matrix of a stack."""
        return PackedWeight(self.data[index], self.shape[1:], self.bits, self.group)


Quantize = Callable[[Tensor, int, int], GroupedWeight]
"""Of a plain weight, bits and group."""

Weight = Tensor | GroupedWeight | PackedWeight
"""A matrix or a stack of them as an op takes it: what ``Ops.pack`` returned."""


def plain(weight: Weight) -> Tensor:
    """A weight of which each number stands for itself, where a backend knows no others."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"a plain weight is wanted, not one of {weight.bits} bits")
    return weight


@dataclass(slots=True)
class GroupBatch:
    """Where one KV group's rows live.

    Attributes:
        slots_T: int64, block * B + offset at which each row's K and V are written; -1 writes nothing.
        tables_RM: int32 block ids by block index; entries outside the window or past the context may be
            anything and must not be read.
        plan: the backend's own notes on this group, made by its first attention call of the step.
    """

    slots_T: Tensor
    tables_RM: Tensor
    plan: object = None


@dataclass(slots=True)
class Batch:
    """One step's rows. Tensors live on the device; lists are their host twins, for planning on the CPU.

    Attributes:
        positions_T: int64, absolute position of each row.
        row_starts: R + 1 offsets; rows row_starts[r] .. row_starts[r+1] - 1 belong to request r.
        contexts: R lengths; request r's rows are its positions contexts[r] - count .. contexts[r] - 1.
        block_size: B, tokens in a block.
        groups: one entry per KV group, in the order of ``ModelSpec.kv_groups()``.
    """

    positions_T: Tensor
    row_starts: list[int]
    row_starts_R1: Tensor
    contexts: list[int]
    contexts_R: Tensor
    block_size: int
    groups: list[GroupBatch]
