"""The decoder of every family: attention and feed-forward around a residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.layers import (
    Attention,
    Batch,
    BlockInput,
    BlockOutput,
    Embedding,
    FeedForward,
    Head,
    KVLayer,
    SparseFeedForward,
    as_it_is,
)
from penstock.spec import ModelSpec


@dataclass(slots=True)
class Block:
    """Attributes:
    attention_norm, ffn_norm: what the two halves read of the residual.
    attention_after, ffn_after: what becomes of their output before it is added to it.
    """

    attention_norm: BlockInput
    attention: Attention
    ffn_norm: BlockInput
    ffn: FeedForward | SparseFeedForward
    attention_after: BlockOutput = as_it_is
    ffn_after: BlockOutput = as_it_is

    def __call__(
        self, residual_TD: Tensor, delta_TD: Tensor | None, batch: Batch, kv: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """(residual, delta): what is added to the residual is left to the norm that reads it next."""
        hidden_TD, residual_TD = self.attention_norm(residual_TD, delta_TD)
        delta_TD = self.attention_after(self.attention(hidden_TD, batch, kv))
        hidden_TD, residual_TD = self.ffn_norm(residual_TD, delta_TD)
        return residual_TD, self.ffn_after(self.ffn(hidden_TD))


@dataclass(slots=True)
class Decoder:
    """Attributes:
    embed_norm: what the first block reads of the embedding.
    """

    spec: ModelSpec
    embedding: Embedding
    blocks: list[Block]
    norm: BlockInput
    head: Head
    embed_norm: BlockInput

    def forward(self, ids_T: Tensor, batch: Batch, kv: list[KVLayer]) -> tuple[Tensor, Tensor]:
        """Computes all rows of a step, writing their K and V.

        Args:
            ids_T: int64 token ids.
            kv: one entry per layer of the model.

        Returns:
            (residual, delta), [T, D]: what ``hidden`` takes.
        """
        (residual_TD, _), delta_TD = self.embed_norm(self.embedding(ids_T), None), None
        for block, layer in zip(self.blocks, kv, strict=True):
            residual_TD, delta_TD = block(residual_TD, delta_TD, batch, layer)
        assert delta_TD is not None  # a ModelSpec has at least one layer
        return residual_TD, delta_TD

    def hidden(self, residual_TD: Tensor, delta_TD: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Final hidden states [R, D] of the rows ``rows_R`` (int64), as stored, final norm applied. Without them of all
        rows, and ``residual_TD`` may be overwritten."""
        residual_RD, delta_RD = (x_TD if rows_R is None else x_TD[rows_R] for x_TD in (residual_TD, delta_TD))
        if not len(residual_RD):  # a chunk of a prompt: its K and V are all that was wanted
            return residual_RD
        hidden_RD, _ = self.norm(residual_RD, delta_RD)
        return hidden_RD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """fp32 [R, V]."""
        return self.head(hidden_RD)
