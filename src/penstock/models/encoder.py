"""BERT and RoBERTa (Devlin et al. 2018; Liu et al. 2019): norms after each block, attention both ways, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from penstock.layers import Embedding, Linear, Ops, RowLinear, Weight
from penstock.spec import Activation, EncoderSpec


@dataclass(slots=True)
class LayerNorm:
    """Of a sum, which is rounded as it is stored."""

    ops: Ops
    weight_D: Tensor
    bias_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor, delta_TD: Tensor) -> Tensor:
        return self.ops.layer_norm(x_TD + delta_TD, self.weight_D, self.bias_D, self.eps)


@dataclass(slots=True)
class EncoderBlock:
    """Attributes:
    up_FD, up_F: weight and bias of the linear before the activation.
    """

    ops: Ops
    heads: int
    qkv: Linear
    out: RowLinear
    attention_norm: LayerNorm
    up_FD: Weight
    up_F: Tensor
    activation: Activation
    down: RowLinear
    norm: LayerNorm

    def __call__(self, x_TD: Tensor, row_starts: Sequence[int]) -> Tensor:
        scale = (x_TD.shape[1] // self.heads) ** -0.5
        seen_TD = self.ops.attend_whole(self.qkv(x_TD), self.heads, row_starts, scale)
        x_TD = self.attention_norm(x_TD, self.out(seen_TD))
        return self.norm(x_TD, self.down(self.ops.linear(x_TD, self.up_FD, self.up_F, 1, self.activation)))


@dataclass(slots=True)
class Classifier:
    """tanh between two linears, on the first token's hidden state."""

    dense: Linear
    out: Linear

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        return self.out(torch.tanh(self.dense(hidden_RD)))


@dataclass(slots=True)
class Encoder:
    """Attributes:
    classifier: of a cross-encoder, whose logits are its answer.
    """

    spec: EncoderSpec
    words: Embedding
    positions: Embedding
    types: Embedding
    norm: LayerNorm
    blocks: list[EncoderBlock]
    classifier: Classifier | None

    def forward(self, ids_T: Tensor, types_T: Tensor, row_starts: Sequence[int]) -> Tensor:
        """Hidden states [T, D], as stored, of whole texts.

        Args:
            ids_T, types_T: int64, token ids, and to which part of a pair each belongs.
            row_starts: text r is rows row_starts[r] .. row_starts[r + 1] - 1.
        """
        x_TD = self.norm(self.words(ids_T) + self.types(types_T), self.positions(self.places(ids_T, row_starts)))
        for block in self.blocks:
            x_TD = block(x_TD, row_starts)
        return x_TD

    def places(self, ids_T: Tensor, row_starts: Sequence[int]) -> Tensor:
        """Row of the position table for each token: ``pad_id`` plus its number among those of its text that do not
        pad; a pad token's is ``pad_id`` itself (fairseq's rule, which for BERT, without a pad id, counts from 0)."""
        counts_T = ids_T != self.spec.pad_id
        parts = torch.split(counts_T, [end - start for start, end in pairwise(row_starts)])
        numbers_T = torch.cat([part.cumsum(0) for part in parts])
        return numbers_T * counts_T + self.spec.pad_id
