"""Layers: weights beside the Ops that apply them. Tensor parallelism and weight formats will live here."""

from penstock.kernels import SEGMENT, Batch, GroupedWeight, KVLayer, Ops, Weight
from penstock.layers.attention import Attention
from penstock.layers.embedding import Embedding, Head
from penstock.layers.linear import FeedForward, GateUp, Linear, RowLinear, Up
from penstock.layers.moe import Experts, Router, SharedExpert, SparseFeedForward
from penstock.layers.norm import BlockInput, BlockOutput, LayerNorm, Norm, NormAfter, as_it_is
from penstock.layers.packing import Pack, Packing, Read
from penstock.layers.placement import Placement, frozen_bytes
from penstock.layers.rope import alibi_slopes, rope_table
from penstock.quant import (
    AT_ONCE,
    BITS,
    FLOATS,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    decode_mxfp4,
    decode_rows,
    group_rows,
    in_eight,
    to_grouped,
    unpack,
    widen,
)

__all__ = [
    "AT_ONCE",
    "BITS",
    "FLOATS",
    "PACKED",
    "SCALE",
    "SEGMENT",
    "SHAPE",
    "ZERO",
    "Attention",
    "Batch",
    "BlockInput",
    "BlockOutput",
    "Embedding",
    "Experts",
    "FeedForward",
    "GateUp",
    "GroupedWeight",
    "Head",
    "KVLayer",
    "LayerNorm",
    "Linear",
    "Norm",
    "NormAfter",
    "Ops",
    "Pack",
    "Packing",
    "Placement",
    "Read",
    "Router",
    "RowLinear",
    "SharedExpert",
    "SparseFeedForward",
    "Up",
    "Weight",
    "alibi_slopes",
    "as_it_is",
    "decode_mxfp4",
    "decode_rows",
    "frozen_bytes",
    "group_rows",
    "in_eight",
    "rope_table",
    "to_grouped",
    "unpack",
    "widen",
]
