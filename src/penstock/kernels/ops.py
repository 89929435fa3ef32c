"""Ops: every operation of a forward pass, fused as far as its roundings are.

Each op names the points at which a value is rounded to the storage dtype ("stored" below: float32, bfloat16
or float16, the dtype of weights, residual and KV). Between these points everything is fp32. Backends round
there and nowhere else (ONE_ANSWER rule 1); float32 models then differ only in the order of sums.

**Grouped weights.** Beside a weight of small integers (``GroupedWeight``) the input is one too. The group of a row's
inputs that shares a scale, as stored, becomes codes = round(x * (127 / max |x|)), ties to even, with the scale
max |x| / 127, both factors in fp32; a group below 2^-100 throughout is zeros, and one with a number that is not finite
has the scale NaN. The sum of a group's products of codes is exact; times the product of both scales it joins the fp32
sum of its segment in one fused multiply-add, and with 4 bits zero / 16 * (weight's scale) times -(x's scale * sum of
x's codes) in another; groups add in ascending order. Nothing else differs.

A backend with ``one_answer`` also promises that the bits of a row are a function of that row's own inputs
alone: not of the other rows, the chunk, the block size, the place in the batch or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from penstock.kernels.types import Batch, GroupedWeight, KVLayer, Quantize, Weight

Activation = Literal["silu", "gelu", "gelu_tanh", "swiglu_clamped"]
"""How ``gate_up`` joins gate g and up u: act(g) * u; "swiglu_clamped" (gpt-oss) is (u + 1) * g * sigmoid(1.702 g) with
g clamped to at most 7 and u to [-7, 7]."""

Forward = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""From a step's token ids and batch to what its rows have become, [T, D] twice."""

Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A token of each row, int64 [R], or UNDECIDED, from

logits_RV   float32
limits_R5   float64: temperature (0: greedy), the least gap of min_p, top_p and top_k; off are -inf, inf, V. Last 1 if
            rules may have made logits -inf, else 0: then a row with such a logit is left
sites_R5    int64: where the token stands, as ``sampling.philox`` has it
"""

UNDECIDED = -5
"""In place of a token that ``draw`` left to the sampler."""

SEGMENT = 128
"""Keys in one attention segment. A key belongs to segment ``position // SEGMENT``; every block size divides it."""


class Ops(Protocol):
    """Shape suffixes are those of ``kernels.types``; K is a linear's input width, N its output width."""

    name: str
    one_answer: bool
    grouped: bool
    """Whether ``pack`` takes grouped weights."""
    numerics: str
    """All that decides the backend's bits: its name, the version of its arithmetic, library and ISA class."""
    quantize: Quantize | None
    """``quant.quantize`` done faster, with the same bits; None where nothing does."""
    draw: Draw | None
    """Draws as ``sampling`` does, where exact numbers are not needed to tell."""
    captured: Callable[[Forward], Forward] | None
    """The same function without the time that Python takes between ops: recorded once, and replayed. Results have the
    same bits and hold until the next call; ``replayed`` of the function then says which it was."""
    layout: str
    """What decides the order in which ``pack`` puts numbers; empty where it leaves them as they are."""

    def pack(self, weight: Tensor | GroupedWeight) -> Weight:
        """Puts matrices [..., N, K] into the order in which this backend reads them, perhaps in place.
        Weights of linears, experts and the embedding are given to ops as it returns them.
        """
        ...

    def embed(self, ids_T: Tensor, table_VD: Weight, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Rows of the table times ``scale``, [T, D]. Rounded: a grouped table's rows, and the product (unless it is by
        1), to ``dtype``."""
        ...

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """RMSNorm, x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). Rounded once: the output."""
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
        """LayerNorm, (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016). Rounded once: the output."""
        ...

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
        """(norm(sum), sum) of sum = residual + scale * delta; without a weight (sum, sum). If ``centred`` the norm is
        ``layer_norm`` with the bias. The product and the sum are rounded as they are stored, and the norm reads the sum
        as stored; ``residual_TD`` may be overwritten by it."""
        ...

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None,
        segments: int = 1,
        activation: Activation | None = None,
    ) -> Tensor:
        """act(x W^T + bias): [T, N]; an activation is for feed-forwards without a gate. The bias joins the fp32 sum;
        rounded once: the output.

        K is summed in ``segments`` equal fp32 parts that add along a binary tree, neighbours first: where ranks hold
        parts of K, the sum is the same at every tensor-parallel degree that divides ``segments`` (rule 4)."""
        ...

    def gate_up(self, x_TD: Tensor, weight_2FD: Weight, bias_2F: Tensor | None, activation: Activation) -> Tensor:
        """act(x Wg^T) * (x Wu^T): [T, F]; gate rows first in the weight. Rounded once: the product."""
        ...

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
        """Splits q, k, v (C = (N + 2H) d, whole heads, H of them from ``kv``), normalizes q and k if ``norms`` =
        (q weight, k weight) are given, rotates both, writes k and v to the rows' slots and returns q: [T, N, d].
        Slot -1 writes nothing.

        Norm weights of size d normalize each head; those of size N d and H d all heads of a row together.
        ``rope_Pd`` holds fp32 cosines then sines of d'/2 angles for each position; the rotation pairs element i
        with i + d'/2 among the first d' <= d elements of a head and leaves the others; None rotates nothing.
        Rounded: qkv as stored by the linear, and q, k once after norm and rotation together.

        With int8 pools k is rounded to codes instead, from its fp32 value, and v from its stored one, each head of a
        row by itself: scale = max |x| / 127 rounded to bfloat16, code = x * (1 / scale) rounded to the nearest whole
        number, ties to even. A scale below 2^-126 is 0, with zeros; that of a head which is not all finite is NaN.
        """
        ...

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
        """softmax(scale q k^T) v: [T, N d]. Query head n reads KV head n // (N / H). A row at position p sees the
        positions in (p - window, p] of its own request. With ``softcap`` a score s becomes softcap * tanh(s / softcap);
        ``slopes_N``, fp32, then make it s + slope * (key's position - p), the distance exact and the product rounded
        before the sum (ALiBi, Press et al. 2021). ``sinks_N``, fp32, adds exp(sink) to each head's sum of weights, and
        no value.

        K and V are read only as stored, those of this step's rows too (rule 5): of int8 pools, a score is
        (q . codes) * k scale * scale, and a value weight * v scale times its codes. Scores, weights and sums stay
        fp32; rounded once: the output. Keys meet in absolute segments of SEGMENT positions, each with its own
        maximum; segments merge along a binary tree over their absolute index; masked keys are never read.
        """
        ...

    def attend_whole(self, qkv_TC: Tensor, heads: int, row_starts: Sequence[int], scale: float) -> Tensor:
        """Bidirectional attention of whole sequences, without a cache: [T, N d]. C = 3 N d, all of q first, then k, v;
        sequence r is rows row_starts[r] .. row_starts[r + 1] - 1 and sees itself alone. Rounded once: the output."""
        ...

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, active: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        """The experts of each row and their weights, int64 and fp32 [T, active]: the largest of the logits x W^T + bias
        in descending order, ties to the lower expert id, and their softmax over all E, divided by the sum of the
        chosen if ``normalize``. Nothing is rounded: logits and softmax stay fp32 (rule 7)."""
        ...

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
        """sum over a of weights[a] * down(gate_up(x)) of expert chosen[a]: [T, D]. Each expert's output stays fp32 and
        comes back to its row unsummed; slots add in ascending order in fp32 (rule 7). Rounded: the product of
        gate and up, as in ``gate_up``, and the output. To the rounded output ``shared`` = (y [T, D], gate [T, 1]) adds
        y / (1 + exp(-gate)), and the sum is rounded again."""
        ...

    def logits(self, x_RD: Tensor, weight_VD: Weight) -> Tensor:
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
        ``dtype`` is the one of activations or int8, which the torch backend has not.

        Raises:
            ConfigError: (block_size_invalid) ``block_size`` does not divide SEGMENT.
        """
        ...

    def copy_blocks(self, layers: Sequence[KVLayer], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block ``src`` to block ``dst`` in each of a group's layers, for each (src, dst). No block is
        both a source and a target in one call."""
        ...
