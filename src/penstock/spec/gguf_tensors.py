"""Where a GGUF file keeps the tensors that ``spec.tensors`` calls for, and what its writer did to them.

Names are those of gguf-py's tensor_mapping; the changes are those of llama.cpp's convert_hf_to_gguf.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from penstock.spec.fields import unsupported
from penstock.spec.model import ModelSpec
from penstock.spec.tensors import Shape, checkpoint_tensors

_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERTS = dict.fromkeys(("gate_proj", "w1"), "ffn_gate_exps")
_EXPERTS |= dict.fromkeys(("up_proj", "w3"), "ffn_up_exps") | dict.fromkeys(("down_proj", "w2"), "ffn_down_exps")
_INTERLEAVED = frozenset({"llama", "mistral", "mixtral", "granite", "smollm3"})
"""Families whose queries and keys are kept in the order of the original rope: its pairs are neighbours."""
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Part of the spec; and ``attn_rot_embd`` follows from it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the model in the file.

    Attributes:
        name: of the file's tensor.
        expert: the tensor is this slice of it.
        heads: of that many heads the rows lie in pairs, those of the first half and of the second in turn.
        offset: what the file has added to each number.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    offset: float = 0.0


def gguf_tensors(spec: ModelSpec) -> dict[str, Stored]:
    """By the names of ``checkpoint_tensors``."""
    return {name: _stored(name, spec) for name in checkpoint_tensors(spec)}


def gguf_shapes(tensors: Mapping[str, Stored], spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor a file must hold; experts are stacked, and a single row is a vector."""
    shapes: dict[str, Shape] = {}
    for name, shape in checkpoint_tensors(spec).items():
        stored = tensors[name]
        if stored.expert is not None and spec.moe is not None:
            shape = (spec.moe.experts, *shape)
        shapes[stored.name] = shape[1:] if stored.name.endswith("ffn_gate_inp_shexp.weight") else shape
    return shapes


def check_types(types: Mapping[str, str], known: Collection[str]) -> None:
    """A file with blocks of another type is whole: to download it again would not help.

    Raises:
        ModelFormatError: (unsupported_quantization).
    """
    for name, kind in sorted(types.items()):
        if kind not in known:
            what = f"tensors of the type {kind}, as {name} is"
            raise unsupported("quantization", what, f"choose a file whose tensors are of {', '.join(sorted(known))}")


def is_ignored(name: str) -> bool:
    return name in IGNORED or name.endswith("attn_rot_embd")


def _stored(name: str, spec: ModelSpec) -> Stored:
    part, kind = name.removeprefix("model.").rsplit(".", 1)
    offset = spec.norm_offset if part.endswith("norm") else 0.0
    layer = re.match(r"layers\.(\d+)\.", part)
    if layer is None:
        return Stored(f"{_OUTSIDE[part]}.{kind}", offset=offset)
    prefix, part = f"blk.{layer[1]}.", part[layer.end() :]
    if expert := re.fullmatch(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)", part):
        return Stored(f"{prefix}{_EXPERTS[expert[2]]}.{kind}", expert=int(expert[1]))
    heads = {"self_attn.q_proj": spec.heads, "self_attn.k_proj": spec.kv_heads}.get(part, 0)
    if part == "post_attention_layernorm":  # of two norms the second, or the one after the block
        theirs = "ffn_norm" if spec.norm_place == "pre" else "post_attention_norm"
    else:
        theirs = _INSIDE[part]
    return Stored(f"{prefix}{theirs}.{kind}", heads=heads if spec.family in _INTERLEAVED else 0, offset=offset)
