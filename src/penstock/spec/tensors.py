"""The tensors of a checkpoint: their Hugging Face names and shapes follow from the ModelSpec alone.

They are listed by slot: what a layer of the decoder reads as one tensor. A checkpoint may keep it in several, which lie
one below the other in the order of the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.base.segments import ffn_segments, sum_segments
from penstock.spec.model import ModelSpec

Shape = tuple[int, ...]
Slots = dict[str, dict[str, Shape]]
"""Slot -> name and shape of its tensors; linears are [out, in]. A slot that the model lacks is absent."""

PACKED_GROUP = 32
"""Numbers of an MXFP4 block, which share a scale (OCP Microscaling Formats 1.0)."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a family's checkpoints call things.

    Attributes:
        model, head: prefix of all but the head, and the head.
        embedding, embed_norm, norm, layers: the modules below it.
        norms: of a layer, where they are not _NORMS; ``attention``: prefix of what is around them.
        qkv, out: inside the attention; ``gate_up``, ``down``: of a feed-forward and of each expert.
        per_head: rows of q, k and v lie together head by head, not q of all heads, then k, then v.
        mlp, sparse: prefixes of a dense and of a sparse feed-forward; ``router`` is inside the latter.
        stacked: each of the experts' linears is one tensor [experts, in, out], with gate and up in turn.
        ignored: prefixes of what is not the decoder's.
        aliases: other prefixes that some versions of transformers wrote, and what they stand for.
    """

    model: str = "model."
    head: str = "lm_head"
    embedding: str = "embed_tokens"
    embed_norm: str = ""
    norm: str = "norm"
    layers: str = "layers."
    norms: Mapping[str, str] = field(default_factory=dict)
    attention: str = "self_attn."
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    per_head: bool = False
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    mlp: str = "mlp."
    sparse: str = "mlp."
    router: str = "gate"
    stacked: bool = False
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def own(self, name: str) -> str:
        """A tensor's name without aliases."""
        for other, prefix in self.aliases:
            if name.startswith(other):
                return prefix + name.removeprefix(other)
        return name


_NAMES = {
    "phi3": Names(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "mpt": Names(
        model="transformer.",
        embedding="wte",
        norm="norm_f",
        layers="blocks.",
        norms={"attention_norm": "norm_1", "ffn_norm": "norm_2"},
        attention="attn.",
        qkv=("Wqkv",),
        out="out_proj",
        mlp="ffn.",
        gate_up=("up_proj",),
    ),
    "bloom": Names(
        model="transformer.",
        embedding="word_embeddings",
        embed_norm="word_embeddings_layernorm",
        norm="ln_f",
        layers="h.",
        attention="self_attention.",
        qkv=("query_key_value",),
        out="dense",
        per_head=True,
        gate_up=("dense_h_to_4h",),
        down="dense_4h_to_h",
    ),
    "mixtral": Names(sparse="block_sparse_moe.", gate_up=("w1", "w3"), down="w2"),
    "gpt_oss": Names(router="router", stacked=True),
    "gemma3": Names(
        model="language_model.model.",
        head="language_model.lm_head",
        ignored=("vision_tower.", "multi_modal_projector."),
        aliases=(
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
    ),
}
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "post": {"attention_after": "post_attention_layernorm", "ffn_after": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_after": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_after": "post_feedforward_layernorm",
    },
}
"""What the norms before and after a block are called, by ``ModelSpec.norm_place``."""


def checkpoint_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor a checkpoint must hold, no more and no less."""
    slots = [model_slots(spec), *(layer_slots(spec, layer) for layer in range(spec.layers))]
    return {name: shape for of_one in slots for tensors in of_one.values() for name, shape in tensors.items()}


def names_of(spec: ModelSpec) -> Names:
    return _NAMES.get(spec.family, Names())


def slot_inputs(spec: ModelSpec, slot: str, shape: Shape) -> int:
    """K of a matrix or a stack of them, given the shape of a tensor of the checkpoint that is not packed."""
    return shape[1] if slot.startswith("experts.") and names_of(spec).stacked else shape[-1]


def slot_segments(spec: ModelSpec, slot: str) -> int:
    """The equal parts of a slot's inputs that are summed by themselves."""
    if slot.startswith("out."):
        return sum_segments(spec.heads)
    if slot.startswith("down."):
        return ffn_segments(spec.ffn)
    if slot.startswith("shared.down.") and spec.moe is not None:
        return ffn_segments(spec.moe.shared_ffn)
    return 1


def model_slots(spec: ModelSpec) -> Slots:
    """Slots outside the layers."""
    names = names_of(spec)
    slots: Slots = {"embedding": {f"{names.model}{names.embedding}.weight": (spec.vocab_size, spec.hidden)}}
    if spec.embed_norm:
        slots |= _norm(spec, "embed_norm", names.model + names.embed_norm)
    slots |= _norm(spec, "norm", names.model + names.norm)
    if not spec.tied:
        slots["head"] = {f"{names.head}.weight": (spec.vocab_size, spec.hidden)}
    return slots


def layer_slots(spec: ModelSpec, layer: int) -> Slots:
    """Slots of one layer."""
    names = names_of(spec)
    prefix = f"{names.model}{names.layers}{layer}."
    slots: Slots = {}
    for slot, name in (names.norms or _NORMS[spec.norm_place]).items():
        slots |= _norm(spec, slot, prefix + name)
    slots |= _attention(spec, names, prefix + names.attention)
    if spec.moe is not None and spec.moe.layers[layer]:
        return slots | _sparse(spec, names, prefix + names.sparse)
    mlp, up = prefix + names.mlp, "gate_up" if spec.mlp_gate else "up"
    rows = (spec.ffn, spec.ffn) if spec.mlp_gate else (spec.ffn,)
    slots |= _linear(up, [mlp + name for name in names.gate_up], rows, spec.hidden, spec.mlp_bias)
    return slots | _linear("down", [mlp + names.down], (spec.hidden,), spec.ffn, spec.mlp_bias)


def _attention(spec: ModelSpec, names: Names, prefix: str) -> Slots:
    rows = (spec.q_size, spec.kv_size, spec.kv_size)
    slots = _linear("qkv", [prefix + name for name in names.qkv], rows, spec.hidden, spec.qkv_bias)
    slots |= _linear("out", [prefix + names.out], (spec.hidden,), spec.q_size, spec.o_bias)
    if spec.qk_norm != "none":
        widths = (spec.head_dim,) * 2 if spec.qk_norm == "head" else (spec.q_size, spec.kv_size)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            slots[name] = {f"{prefix}{name}.weight": (width,)}
    if spec.sinks:
        slots["sinks"] = {f"{prefix}sinks": (spec.heads,)}
    return slots


def _sparse(spec: ModelSpec, names: Names, prefix: str) -> Slots:
    moe = spec.moe
    assert moe is not None
    slots = _linear("router", [prefix + names.router], (moe.experts,), spec.hidden, moe.router_bias)
    if names.stacked:
        slots |= _stacked(
            moe.experts, f"{prefix}experts.gate_up_proj", "experts.gate_up", 2 * moe.ffn, spec.hidden, moe.packed
        )
        slots |= _stacked(moe.experts, f"{prefix}experts.down_proj", "experts.down", spec.hidden, moe.ffn, moe.packed)
    else:
        each = [f"{prefix}experts.{i}." for i in range(moe.experts)]
        gate_up = [one + name for one in each for name in names.gate_up]
        slots |= _linear("experts.gate_up", gate_up, (moe.ffn,) * len(gate_up), spec.hidden, moe.bias)
        slots |= _linear(
            "experts.down", [one + names.down for one in each], (spec.hidden,) * moe.experts, moe.ffn, moe.bias
        )
    if moe.shared_ffn:
        shared, widths = f"{prefix}shared_expert.", (moe.shared_ffn, moe.shared_ffn)
        slots |= _linear("shared.gate_up", [shared + name for name in names.gate_up], widths, spec.hidden, False)
        slots |= _linear("shared.down", [shared + names.down], (spec.hidden,), moe.shared_ffn, False)
        slots |= _linear("shared.gate", [f"{prefix}shared_expert_gate"], (1,), spec.hidden, False)
    return slots


def _norm(spec: ModelSpec, slot: str, name: str) -> Slots:
    kinds = ("weight", "bias") if spec.norm == "layer" and spec.norm_bias else ("weight",)
    return {f"{slot}.{kind}": {f"{name}.{kind}": (spec.hidden,)} for kind in kinds}


def _linear(slot: str, names: list[str], rows: tuple[int, ...], columns: int, bias: bool) -> Slots:
    """Linears one below the other; a single name holds all the rows."""
    if len(names) == 1:
        rows = (sum(rows),)
    slots: Slots = {f"{slot}.weight": {f"{name}.weight": (n, columns) for name, n in zip(names, rows, strict=True)}}
    if bias:
        slots[f"{slot}.bias"] = {f"{name}.bias": (n,) for name, n in zip(names, rows, strict=True)}
    return slots


def _stacked(experts: int, name: str, slot: str, rows: int, columns: int, packed: bool) -> Slots:
    weight: dict[str, Shape] = {name: (experts, columns, rows)}
    if packed:
        blocks = (experts, rows, columns // PACKED_GROUP)
        weight = {f"{name}_blocks": (*blocks, PACKED_GROUP // 2), f"{name}_scales": blocks}
    return {f"{slot}.weight": weight, f"{slot}.bias": {f"{name}_bias": (experts, rows)}}
