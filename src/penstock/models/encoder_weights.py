"""Weights of an encoder: from a folder of safetensors to an Encoder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from penstock.base.segments import ffn_segments, sum_segments
from penstock.formats import Checkpoint, open_checkpoint
from penstock.layers import Embedding, Linear, Ops, Placement, RowLinear, Weight
from penstock.models.encoder import Classifier, Encoder, EncoderBlock, LayerNorm
from penstock.models.tensors import Tensors
from penstock.spec import EncoderSpec
from penstock.spec.encoder import classifier_names, encoder_tensors


def load_encoder(folder: Path, spec: EncoderSpec, ops: Ops, placement: Placement) -> Encoder:
    """Builds the model with its weights converted and placed; beside them one tensor at a time is in memory.

    Raises:
        ModelFormatError: as ``open_checkpoint`` and ``Tensors.check``.
    """
    return _Builder(open_encoder(open_checkpoint(folder), spec, placement), spec, ops).encoder()


def open_encoder(checkpoint: Checkpoint, spec: EncoderSpec, placement: Placement) -> Tensors:
    """A checkpoint whose names, shapes and dtypes are those that the spec calls for."""
    tensors = Tensors(checkpoint, placement, lambda name: _rename(name, spec))
    tensors.check(encoder_tensors(spec), spec.family)
    return tensors


def _rename(name: str, spec: EncoderSpec) -> str | None:
    """Without the prefix of the model inside a larger one, and without TensorFlow's names of a norm's two vectors;
    heads that are not used and buffers of old exports are nobody's."""
    name = name.removeprefix("roberta.").removeprefix("bert.")
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if name == "embeddings.position_ids" or name.startswith(("cls.", "lm_head.")):
        return None
    head = classifier_names(spec) if spec.labels else ()
    return None if name.startswith("pooler.") and not name.startswith(head) else name


class _Builder:
    def __init__(self, tensors: Tensors, spec: EncoderSpec, ops: Ops) -> None:
        self.tensors, self.spec, self.ops = tensors, spec, ops
        self.dtype = tensors.placement.dtype

    def encoder(self) -> Encoder:
        words, positions, types = (
            Embedding(self.ops, self.ops.pack(self.tensors.fuse(f"embeddings.{name}_embeddings.weight")), self.dtype)
            for name in ("word", "position", "token_type")
        )
        return Encoder(
            spec=self.spec,
            words=words,
            positions=positions,
            types=types,
            norm=self.norm("embeddings.LayerNorm"),
            blocks=[self.block(f"encoder.layer.{layer}.") for layer in range(self.spec.layers)],
            classifier=self.classifier() if self.spec.labels else None,
        )

    def block(self, prefix: str) -> EncoderBlock:
        spec, ops, attention = self.spec, self.ops, prefix + "attention."
        up_FD, up_F = self.linear(prefix + "intermediate.dense")
        return EncoderBlock(
            ops=ops,
            heads=spec.heads,
            qkv=Linear(ops, *self.linear(*(f"{attention}self.{name}" for name in ("query", "key", "value")))),
            out=RowLinear(ops, *self.linear(attention + "output.dense"), sum_segments(spec.heads)),
            attention_norm=self.norm(attention + "output.LayerNorm"),
            up_FD=up_FD,
            up_F=up_F,
            activation=spec.activation,
            down=RowLinear(ops, *self.linear(prefix + "output.dense"), ffn_segments(spec.ffn)),
            norm=self.norm(prefix + "output.LayerNorm"),
        )

    def classifier(self) -> Classifier:
        dense, out = (Linear(self.ops, *self.linear(name)) for name in classifier_names(self.spec))
        return Classifier(dense, out)

    def norm(self, name: str) -> LayerNorm:
        weight, bias = (self.tensors.fuse(f"{name}.{part}") for part in ("weight", "bias"))
        return LayerNorm(self.ops, weight, bias, self.spec.norm_eps)

    def linear(self, *names: str) -> tuple[Weight, Tensor]:
        weight, bias = (self.tensors.fuse(*(f"{name}.{part}" for name in names)) for part in ("weight", "bias"))
        return self.ops.pack(weight), bias
