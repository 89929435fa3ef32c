"""Weights: from a folder of memory-mapped safetensors to a Decoder, and the id that names their numerics."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from penstock.base import ModelFormatError
from penstock.formats import Checkpoint, file_digest, open_checkpoint
from penstock.layers import (
    SEGMENT,
    Attention,
    Embedding,
    FeedForward,
    GateUp,
    Head,
    Linear,
    Norm,
    Ops,
    Placement,
    RowLinear,
    rope_table,
    sum_segments,
)
from penstock.models.decoder import Block, Decoder
from penstock.spec import ModelSpec
from penstock.spec.tensors import checkpoint_tensors

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SUM_GROUP = 32
"""Elements of the feed-forward width that stay in one segment of the down projection, where 32 divides it."""


def load_decoder(folder: Path, spec: ModelSpec, ops: Ops, placement: Placement) -> Decoder:
    """Builds the model with its weights converted and placed; beside them one tensor at a time is in memory.

    The rope table covers ``spec.max_positions``; replace that by a shorter context to save its memory.

    Raises:
        ModelFormatError: as ``open_checkpoint``; (weights_missing), (weights_unexpected), (weights_shape) or
            (weights_dtype) if the tensors are not those of ``spec``.
    """
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint, spec)
    return _Builder(checkpoint, spec, ops, placement).decoder()


def check_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Compares names, shapes and dtypes with what the spec calls for, before anything is read."""
    expected = checkpoint_tensors(spec)
    if missing := sorted(expected.keys() - checkpoint.names):
        raise _mismatch("weights_missing", checkpoint, f"{len(missing)} tensors are missing: {_some(missing)}")
    unexpected = sorted(
        name
        for name in checkpoint.names - expected.keys()
        # Some exports keep a buffer that follows from the configuration, or the tied head a second time.
        if not name.endswith("rotary_emb.inv_freq") and not (spec.tied and name == "lm_head.weight")
    )
    if unexpected:
        what = f"{len(unexpected)} tensors are not part of a {spec.family} model of this configuration"
        raise _mismatch("weights_unexpected", checkpoint, f"{what}: {_some(unexpected)}")
    for name, shape in expected.items():
        entry = checkpoint.entry(name)
        if entry.shape != shape:
            why = f"tensor {name} is {list(entry.shape)}, config.json calls for {list(shape)}"
            raise _mismatch("weights_shape", checkpoint, why)
        if entry.dtype not in STORED:
            raise _mismatch("weights_dtype", checkpoint, f"tensor {name} is {entry.dtype}, not one of {_some(STORED)}")


class _Builder:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, ops: Ops, placement: Placement) -> None:
        self.checkpoint, self.spec, self.ops, self.placement = checkpoint, spec, ops, placement
        self.rope_Pd = rope_table(spec.rope, spec.head_dim, spec.max_positions, placement)

    def decoder(self) -> Decoder:
        spec, ops = self.spec, self.ops
        embedding = Embedding(ops, self.fuse("model.embed_tokens.weight"))
        head = Head(ops, embedding.table_VD if spec.tied else self.fuse("lm_head.weight"))
        group_of = {layer: i for i, group in enumerate(spec.kv_groups()) for layer in group.layers}
        blocks = [self.block(layer, group_of[layer]) for layer in range(spec.layers)]
        return Decoder(spec, embedding, blocks, self.norm("model.norm"), head)

    def block(self, layer: int, group: int) -> Block:
        spec, ops, prefix = self.spec, self.ops, f"model.layers.{layer}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [attn + "q_proj", attn + "k_proj", attn + "v_proj"]
        gate_up = [mlp + "gate_proj", mlp + "up_proj"]
        norms = (self.fuse(attn + "q_norm.weight"), self.fuse(attn + "k_norm.weight")) if spec.qk_norm else None
        attention = Attention(
            ops=ops,
            qkv=Linear(ops, *self.linear(*qkv, bias=spec.qkv_bias)),
            out=RowLinear(ops, *self.linear(attn + "o_proj", bias=spec.o_bias), sum_segments(spec.heads)),
            norms=norms,
            eps=spec.norm_eps,
            rope_Pd=self.rope_Pd,
            group=group,
            window=spec.windows[layer],
            scale=spec.head_dim**-0.5,
        )
        down_units = spec.ffn if spec.ffn % SUM_GROUP else spec.ffn // SUM_GROUP
        ffn = FeedForward(
            GateUp(ops, *self.linear(*gate_up, bias=spec.mlp_bias), spec.activation),
            RowLinear(ops, *self.linear(mlp + "down_proj", bias=spec.mlp_bias), sum_segments(down_units)),
        )
        return Block(
            self.norm(prefix + "input_layernorm"), attention, self.norm(prefix + "post_attention_layernorm"), ffn
        )

    def norm(self, name: str) -> Norm:
        return Norm(self.ops, self.fuse(name + ".weight"), self.spec.norm_eps)

    def linear(self, *names: str, bias: bool) -> tuple[Tensor, Tensor | None]:
        weight = self.fuse(*(f"{name}.weight" for name in names))
        return weight, self.fuse(*(f"{name}.bias" for name in names)) if bias else None

    def fuse(self, *names: str) -> Tensor:
        """The tensors, one below the other, in memory of our own: aligned alike in every process."""
        parts = [self.stored(name) for name in names]
        rows = sum(len(part) for part in parts)
        fused = self.placement.empty((rows, *parts[0].shape[1:]))
        for part, target in zip(parts, torch.split(fused, [len(part) for part in parts]), strict=True):
            target.copy_(part)
        for name in names:
            self.checkpoint.release(name)  # else the copy and the mapped file together are twice the weights
        return fused

    def stored(self, name: str) -> Tensor:
        """The file's bytes as a tensor, not copied. It must not be written to."""
        entry = self.checkpoint.entry(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self.checkpoint.view(name), dtype=STORED[entry.dtype])
        return flat.view(entry.shape)


def numerics_id(folder: Path, spec: ModelSpec, ops: Ops, placement: Placement) -> bytes:
    """16 bytes that agree exactly where bits may be shared: same weights, arithmetic and KV dtype.

    It roots every KV block hash (ONE_ANSWER, "Where the promise holds"). How long a context is served does not enter.
    """
    parts = [ops.numerics, str(placement), f"segment={SEGMENT}", f"sum_group={SUM_GROUP}"]
    parts.append(repr(replace(spec, max_positions=0)))
    parts += [f"{file.path.name}={file_digest(file.path)}" for file in open_checkpoint(folder).files]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _mismatch(code: str, checkpoint: Checkpoint, why: str) -> ModelFormatError:
    return ModelFormatError(
        code,
        f"The weights in {checkpoint.folder} do not fit their config.json",
        why=why,
        fix="download the folder again, or take config.json and weights from the same revision",
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
