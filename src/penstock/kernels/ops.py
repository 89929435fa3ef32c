"""Ops: every operation of a forward pass, fused as far as its roundings are.

Each op names the points at which a value is rounded to the storage dtype ("stored" below: float32, bfloat16
or float16, the dtype of weights, residual and KV). Between these points everything is fp32. Backends round
there and nowhere else (ONE_ANSWER rule 1); float32 models then differ only in the order of sums.

A backend with ``one_answer`` also promises that the bits of a row are a function of that row's own inputs
alone: not of the other rows, the chunk, the block size, the place in the batch or the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from penstock.kernels.types import Batch, KVLayer

Activation = Literal["silu", "gelu_tanh"]

SEGMENT = 128
"""Keys in one attention segment. A key belongs to segment ``position // SEGMENT``; every block size divides it."""

MAX_SEGMENTS = 8
"""Most segments S into which a row-parallel linear splits K, so the largest tensor-parallel degree of a model."""


def sum_segments(units: int) -> int:
    """S: the largest power of two <= MAX_SEGMENTS that divides ``units``, the parts of K that stay whole."""
    segments = MAX_SEGMENTS
    while units % segments:
        segments //= 2
    return segments


class Ops(Protocol):
    """Shape suffixes are those of ``kernels.types``; K is a linear's input width, N its output width."""

    name: str
    one_answer: bool

    @property
    def numerics(self) -> str:
        """All that decides the backend's bits: its name, the version of its arithmetic, library and ISA class."""
        ...

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        """Rows of the table, as stored: [T, D]."""
        ...

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """RMSNorm, x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). Rounded once: the output."""
        ...

    def add_norm(self, delta_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(residual + delta), residual + delta). The sum is rounded as it is stored, and the norm reads
        it as stored; ``residual_TD`` may be overwritten by it."""
        ...

    def linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        """x W^T + bias: [T, N]. The bias joins the fp32 sum; rounded once: the output."""
        ...

    def row_linear(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, segments: int) -> Tensor:
        """As ``linear``, but K is summed in ``segments`` equal fp32 parts that add along a binary tree, neighbours
        first: the sum is the same at every tensor-parallel degree that divides ``segments`` (rule 4)."""
        ...

    def gate_up(self, x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        """act(x Wg^T) * (x Wu^T): [T, F]; gate rows first in the weight. Rounded once: the product."""
        ...

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
        """Splits q, k, v (C = (N + 2H) d, whole heads, H of them from ``kv``), normalizes q and k over d if
        ``norms`` = (q weight, k weight) are given, rotates both, writes k and v to the rows' slots and returns
        q: [T, N, d]. Slot -1 writes nothing.

        ``rope_Pd`` holds fp32 cosines then sines of d/2 angles for each position; the rotation pairs element i
        with i + d/2. Rounded: qkv as stored by the linear, and q, k once after norm and rotation together.
        """
        ...

    def attention(
        self, q_TNd: Tensor, kv: KVLayer, batch: Batch, group: int, window: int | None, scale: float
    ) -> Tensor:
        """softmax(scale q k^T) v: [T, N d]. Query head n reads KV head n // (N / H). A row at position p sees the
        positions in (p - window, p] of its own request.

        K and V are read only as stored, those of this step's rows too (rule 5). Scores, weights and sums stay
        fp32; rounded once: the output. Keys meet in absolute segments of SEGMENT positions, each with its own
        maximum; segments merge along a binary tree over their absolute index; masked keys are never read.
        """
        ...

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        """fp32 [R, V]. Not rounded, where the backend's product allows it."""
        ...

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
        """Zeroed K and V of one group; each tensor holds at least ``blocks`` blocks, all a backend's own extras last.

        Raises:
            ConfigError: (block_size_invalid) ``block_size`` does not divide SEGMENT.
        """
        ...

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block ``src`` to block ``dst`` in each of a group's layers, for each (src, dst). No block is
        both a source and a target in one call."""
        ...
