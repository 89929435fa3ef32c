"""Weights: from memory-mapped safetensors or a GGUF file to a Decoder, and the id that names their numerics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from penstock.base.segments import MAX_SEGMENTS, SUM_GROUP
from penstock.formats import Checkpoint, file_digest, open_checkpoint
from penstock.layers import (
    SCALE,
    SEGMENT,
    Attention,
    BlockInput,
    BlockOutput,
    Embedding,
    Experts,
    FeedForward,
    GateUp,
    GroupedWeight,
    Head,
    LayerNorm,
    Linear,
    Norm,
    NormAfter,
    Ops,
    Pack,
    Packing,
    Placement,
    Router,
    RowLinear,
    SharedExpert,
    SparseFeedForward,
    Up,
    Weight,
    alibi_slopes,
    as_it_is,
    decode_mxfp4,
    rope_table,
)
from penstock.models.compressed import CompressedTensors
from penstock.models.decoder import Block, Decoder
from penstock.models.gguf import GGUFTensors
from penstock.models.tensors import Tensors
from penstock.spec import EncoderSpec, ModelSpec, MoESpec, RopeSpec
from penstock.spec.tensors import (
    Slots,
    checkpoint_tensors,
    layer_slots,
    model_slots,
    names_of,
    slot_inputs,
    slot_segments,
)

Source = Tensors | GGUFTensors | CompressedTensors


def load_decoder(
    folder: Path,
    spec: ModelSpec,
    ops: Ops,
    placement: Placement,
    pack: Pack | None = None,
    told: Callable[[float], None] = lambda _: None,
) -> Decoder:
    """Builds the model with its weights converted and placed; beside them one tensor at a time is in memory.

    Matrices are what ``pack`` makes of them; by default in the backend's own order and nothing else.
    The rope table covers ``spec.max_positions``; replace that by a shorter context to save its memory.
    ``told`` hears after each layer which share of them is there.

    Raises:
        ModelFormatError: as ``open_checkpoint``; (weights_missing), (weights_unexpected), (weights_shape) or
            (weights_dtype) if the tensors are not those of ``spec``; (weights_not_finite).
    """
    tensors = open_tensors(open_checkpoint(folder), spec, placement)
    return _Builder(tensors, spec, ops, placement, pack or Packing(ops, spec, placement)).decoder(told)


def open_tensors(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> Source:
    """A checkpoint whose names, shapes and dtypes are those that the spec calls for."""
    if checkpoint.path.is_file():
        return GGUFTensors(checkpoint, spec, placement)
    expected, names = checkpoint_tensors(spec), names_of(spec)
    # A decoder saved without its head has no prefix either.
    prefix = "" if any(names.own(name).startswith(names.model) for name in checkpoint.names) else names.model

    def rename(name: str) -> str | None:
        name = names.own(name)
        # Some exports keep a buffer that follows from the configuration, or the tied head a second time.
        tied_head = spec.tied and name.startswith(f"{names.head}.weight")
        unused = tied_head or name.startswith(names.ignored) or name.endswith("rotary_emb.inv_freq")
        return None if unused else prefix + name

    tensors = Tensors(checkpoint, placement, rename)
    if any(name.endswith(f".{SCALE}") for name in checkpoint.names):
        return CompressedTensors(tensors, expected, spec.family)
    packed = [name for name in expected if name.endswith(("_blocks", "_scales"))]
    tensors.check(expected, spec.family, packed)
    return tensors


class _Builder:
    """Makes a slot's tensor (``spec.tensors``) when a layer asks for it."""

    def __init__(self, tensors: Source, spec: ModelSpec, ops: Ops, placement: Placement, pack: Pack) -> None:
        self.tensors, self.spec, self.ops, self.placement, self.pack = tensors, spec, ops, placement, pack
        self.tables: dict[RopeSpec, Tensor] = {}
        self.slopes_N = None if spec.alibi is None else alibi_slopes(spec.heads, spec.alibi, placement)

    def decoder(self, told: Callable[[float], None]) -> Decoder:
        spec, ops, slots = self.spec, self.ops, model_slots(self.spec)
        scale = float(torch.tensor(spec.embed_scale, dtype=self.placement.dtype))  # as the models were trained with
        embedding = Embedding(ops, self.matrix(slots, "embedding"), self.placement.dtype, scale)
        head_VD = embedding.table_VD if spec.tied else self.matrix(slots, "head")
        group_of = {layer: i for i, group in enumerate(spec.kv_groups()) for layer in group.layers}
        blocks = []
        for layer in range(spec.layers):
            blocks.append(self.block(layer, group_of[layer]))
            told((layer + 1) / spec.layers)
        return Decoder(
            spec,
            embedding,
            blocks,
            self.before(slots, "norm"),
            Head(ops, head_VD, spec.logit_scale, spec.logit_softcap),
            self.before(slots, "embed_norm"),
        )

    def block(self, layer: int, group: int) -> Block:
        slots, moe = layer_slots(self.spec, layer), self.spec.moe
        return Block(
            attention_norm=self.before(slots, "attention_norm"),
            attention=self.attention(slots, layer, group),
            ffn_norm=self.before(slots, "ffn_norm"),
            ffn=self.feed_forward(slots) if moe is None or not moe.layers[layer] else self.sparse(slots, moe),
            attention_after=self.after(slots, "attention_after"),
            ffn_after=self.after(slots, "ffn_after"),
        )

    def attention(self, slots: Slots, layer: int, group: int) -> Attention:
        spec, normed = self.spec, self.spec.qk_norm != "none"
        rope = spec.rope_of(layer)
        return Attention(
            ops=self.ops,
            qkv=Linear(self.ops, *self.linear(slots, "qkv", self.qkv_order())),
            out=RowLinear(self.ops, *self.linear(slots, "out"), slot_segments(spec, "out.weight")),
            norms=(self.norm_weight(slots, "q_norm"), self.norm_weight(slots, "k_norm")) if normed else None,
            eps=spec.norm_eps,
            rope_Pd=None if rope is None else self.rope_table(rope),
            group=group,
            window=spec.windows[layer],
            scale=spec.head_dim**-0.5 if spec.attn_scale is None else spec.attn_scale,
            softcap=spec.attn_softcap,
            sinks_N=self.fuse(slots, "sinks").float() if spec.sinks else None,
            slopes_N=self.slopes_N,
        )

    def qkv_order(self) -> Tensor | None:
        """Of the checkpoint's rows, where they are not all of q, then k, then v."""
        if not names_of(self.spec).per_head:
            return None
        return torch.arange(3 * self.spec.q_size).view(self.spec.heads, 3, -1).transpose(0, 1).flatten()

    def rope_table(self, rope: RopeSpec) -> Tensor:
        """One for all layers that embed positions alike."""
        if rope not in self.tables:
            self.tables[rope] = rope_table(rope, self.spec.head_dim, self.spec.max_positions, self.placement)
        return self.tables[rope]

    def feed_forward(self, slots: Slots, of: str = "") -> FeedForward:
        down, ops, act = f"{of}down", self.ops, self.spec.activation
        gated = f"{of}gate_up.weight" in slots
        up = GateUp(ops, *self.linear(slots, f"{of}gate_up"), act) if gated else Up(ops, *self.linear(slots, "up"), act)
        segments = slot_segments(self.spec, f"{down}.weight")
        return FeedForward(up, RowLinear(ops, *self.linear(slots, down), segments))

    def sparse(self, slots: Slots, moe: MoESpec) -> SparseFeedForward:
        gate_up = self.experts(slots, "experts.gate_up", 2 * moe.ffn, paired=True)
        down = self.experts(slots, "experts.down", self.spec.hidden)
        shared = None
        if moe.shared_ffn:
            gate = Linear(self.ops, *self.linear(slots, "shared.gate"))
            shared = SharedExpert(self.feed_forward(slots, "shared."), gate)
        weight_ED, bias_E = self.linear(slots, "router")
        assert isinstance(weight_ED, Tensor)  # routers stay plain
        router = Router(self.ops, weight_ED, bias_E, moe.active, moe.normalize)
        return SparseFeedForward(router, Experts(self.ops, *gate_up, *down, self.spec.activation), shared)

    def experts(self, slots: Slots, slot: str, rows: int, *, paired: bool = False) -> tuple[Weight, Tensor | None]:
        """One of the experts' linears, [E, out, in], and its bias. In stacked checkpoints ``paired`` rows are gate and
        up in turn."""
        if not names_of(self.spec).stacked:
            weight = self.matrix(slots, f"{slot}.weight", rows)
            bias = self.fuse(slots, f"{slot}.bias") if f"{slot}.bias" in slots else None
            return weight, None if bias is None else bias.view(-1, rows)
        assert isinstance(self.tensors, Tensors)  # no quantized file of such a family is read
        tensors, names = self.tensors, list(slots[f"{slot}.weight"])
        shape = slots[f"{slot}.weight"][names[0]]
        inputs = slot_inputs(self.spec, f"{slot}.weight", shape) if len(names) == 1 else 2 * prod(shape[2:])
        read = partial(self.stacked, tensors, names, paired)
        packed = self.pack(f"{slot}.weight", names[0], inputs, read)
        (name,) = slots[f"{slot}.bias"]
        stored = self.tensors.stored(name)
        bias = self.placement.empty(tuple(stored.shape))
        self.tensors.copy(name, unpaired(stored, 1) if paired else stored, bias)
        return packed, bias

    def stacked(self, tensors: Tensors, names: list[str], paired: bool, exact: bool) -> Tensor:
        """[E, out, in] of a tensor [E, in, out], or of MXFP4 blocks and scales, one expert at a time."""
        parts = [tensors.stored(name) for name in names]
        experts, first, last = (parts[0] if len(parts) == 1 else parts[0].flatten(2)).shape
        shape = (experts, last, first) if len(parts) == 1 else (experts, first, 2 * last)
        dtype = self.placement.dtype
        if exact:
            dtype = parts[0].dtype if len(parts) == 1 else torch.bfloat16  # which holds all of MXFP4
        weight = self.placement.empty(shape, dtype)
        for index, target in enumerate(weight):
            one = [part[index : index + 1] for part in parts]
            rows = one[0].mT if len(one) == 1 else decode_mxfp4(one[0], one[1], dtype)
            tensors.copy(names[0], unpaired(rows[0], 0) if paired else rows[0], target)
        for name in names:
            tensors.release(name)
        return weight

    def before(self, slots: Slots, slot: str) -> BlockInput:
        eps, scale, normed = self.spec.norm_eps, self.spec.residual_scale, f"{slot}.weight" in slots
        if normed and self.spec.norm == "layer":
            bias = self.fuse(slots, f"{slot}.bias") if self.spec.norm_bias else None
            return LayerNorm(self.ops, self.fuse(slots, f"{slot}.weight"), bias, eps, scale)
        return Norm(self.ops, self.norm_weight(slots, f"{slot}.weight") if normed else None, eps, scale)

    def after(self, slots: Slots, slot: str) -> BlockOutput:
        if f"{slot}.weight" in slots:
            return NormAfter(self.ops, self.norm_weight(slots, f"{slot}.weight"), self.spec.norm_eps)
        return as_it_is

    def norm_weight(self, slots: Slots, slot: str) -> Tensor:
        """With an offset the weight is fp32: near the offset the storage dtype is coarser than near 0."""
        weight = self.fuse(slots, slot)
        return weight.float() + self.spec.norm_offset if self.spec.norm_offset else weight

    def linear(self, slots: Slots, slot: str, order: Tensor | None = None) -> tuple[Weight, Tensor | None]:
        """``order``: of the checkpoint's rows."""
        weight = self.matrix(slots, f"{slot}.weight", order=order)
        bias = self.fuse(slots, f"{slot}.bias") if f"{slot}.bias" in slots else None
        return weight, bias if bias is None or order is None else bias[order]

    def matrix(self, slots: Slots, slot: str, rows: int | None = None, order: Tensor | None = None) -> Weight:
        """A packed matrix, or a stack of those of ``rows`` each."""
        names = list(slots[slot])

        def read(exact: bool) -> Tensor | GroupedWeight:
            weight = self.tensors.weight(*names, exact=exact)
            if order is not None:
                weight = weight[order]
            return weight if rows is None else stack(weight, rows)

        return self.pack(slot, names[0], slots[slot][names[0]][-1], read)

    def fuse(self, slots: Slots, slot: str) -> Tensor:
        return self.tensors.fuse(*slots[slot])


def stack(weight: Tensor | GroupedWeight, rows: int) -> Tensor | GroupedWeight:
    """[X, rows, K] of matrices [X rows, K] one below the other."""
    if isinstance(weight, GroupedWeight):
        return weight.stacked(rows)
    return weight.view(-1, rows, weight.shape[1])


def unpaired(x: Tensor, axis: int) -> Tensor:
    """Elements 0, 2, 4, ... of an axis, then 1, 3, 5, ..."""
    count = x.shape[axis]
    return x.index_select(axis, torch.cat((torch.arange(0, count, 2), torch.arange(1, count, 2))))


def numerics_id(
    folder: Path,
    spec: ModelSpec | EncoderSpec,
    ops: Ops,
    placement: Placement,
    recipe: str = "",
    digest: Callable[[Path], str] = file_digest,
) -> bytes:
    """16 bytes that agree exactly where bits may be shared: same weights, arithmetic and KV dtype.

    It roots every KV block hash (ONE_ANSWER, "Where the promise holds"). How long a context is served does not enter,
    but for the rope that follows from it. ``recipe`` names what became of the checkpoint's matrices,
    ``digest`` what a file holds.
    """
    sums = f"segment={SEGMENT} sum_group={SUM_GROUP} max_segments={MAX_SEGMENTS}"
    parts = [ops.numerics, str(placement), sums, recipe]
    if isinstance(spec, ModelSpec):
        spec = replace(spec, max_positions=0, rope=spec.rope.settled(spec.max_positions))
    parts.append(repr(spec))
    parts += [f"{file.path.name}={digest(file.path)}" for file in open_checkpoint(folder).files]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()
