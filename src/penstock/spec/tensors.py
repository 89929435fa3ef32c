"""The tensors of a checkpoint: their Hugging Face names and shapes follow from the ModelSpec alone."""

from __future__ import annotations

from penstock.spec.model import ModelSpec

Shape = tuple[int, ...]


def checkpoint_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor a checkpoint must hold, no more and no less; linears are [out, in]."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (spec.vocab_size, spec.hidden)}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in layer_tensors(spec).items()}
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden)
    return shapes


def layer_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """The same for one layer, without its ``model.layers.N.`` prefix."""
    linears = {
        "self_attn.q_proj": (spec.q_size, spec.hidden, spec.qkv_bias),
        "self_attn.k_proj": (spec.kv_size, spec.hidden, spec.qkv_bias),
        "self_attn.v_proj": (spec.kv_size, spec.hidden, spec.qkv_bias),
        "self_attn.o_proj": (spec.hidden, spec.q_size, spec.o_bias),
        "mlp.gate_proj": (spec.ffn, spec.hidden, spec.mlp_bias),
        "mlp.up_proj": (spec.ffn, spec.hidden, spec.mlp_bias),
        "mlp.down_proj": (spec.hidden, spec.ffn, spec.mlp_bias),
    }
    shapes: dict[str, Shape] = {}
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{name}.weight"] = (spec.hidden,)
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes
