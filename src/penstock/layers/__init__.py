"""Layers: weights beside the Ops that apply them. Tensor parallelism and weight formats will live here."""

from penstock.kernels import SEGMENT, Batch, KVLayer, Ops, sum_segments
from penstock.layers.attention import Attention
from penstock.layers.embedding import Embedding, Head
from penstock.layers.linear import FeedForward, GateUp, Linear, RowLinear
from penstock.layers.norm import Norm
from penstock.layers.placement import Placement
from penstock.layers.rope import rope_table

__all__ = [
    "SEGMENT",
    "Attention",
    "Batch",
    "Embedding",
    "FeedForward",
    "GateUp",
    "Head",
    "KVLayer",
    "Linear",
    "Norm",
    "Ops",
    "Placement",
    "RowLinear",
    "rope_table",
    "sum_segments",
]
