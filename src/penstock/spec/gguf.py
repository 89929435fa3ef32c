"""The metadata of a GGUF file to ModelSpec: as the config.json of the same model would say it (``spec.hf`` checks it).

Keys are those of ggml-org/ggml, docs/gguf.md; what a file leaves to llama.cpp's code is written down here. A key that
is not known is an error, never ignored, unless it is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError
from penstock.formats import GGUFFile, read_gguf
from penstock.spec.fields import Fields, bad_config, unsupported
from penstock.spec.hf import model_spec, unknown_architecture
from penstock.spec.model import Dtype, ModelSpec

COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Key of the metadata, without the architecture before it -> key of config.json."""
ELSEWHERE = frozenset(
    {"attention.value_length", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"}
    | {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_attn_factor"}
    | {"vocab_size", "pooling_type", "tensor_data_layout", "rope.scaling.finetuned"}
)
"""Keys that are read below; and in the last line those that change nothing."""
FIXED = {
    "attention.causal": True,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}
"""Keys that may only have this value, as no other is implemented."""
_WINDOW = {"attention.sliding_window": "sliding_window"}
_PATTERN = "attention.sliding_window_pattern"
_GEMMA = _WINDOW | {_PATTERN: "", "rope.freq_base_swa": "rope_local_base_freq"}
_GEMMA |= {f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("attn", "final")}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_EXPERTS = _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Attributes:
    name: transformers' class.
    keys: beyond COMMON.
    fixed: values of config.json that llama.cpp has in its code.
    widest: layers of the one size whose scores are divided by sqrt(hidden / heads) instead of sqrt(head_dim).
    """

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    widest: int = 0


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", _WINDOW | _EXPERTS),  # Mistral and Mixtral too
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        _QWEN_EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", _QWEN_EXPERTS, {"norm_topk_prob": True}),
    "gemma": Architecture("GemmaForCausalLM"),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", _GEMMA, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, widest=46
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", _GEMMA, {"sliding_window": None}, widest=62),
    "phi3": Architecture("Phi3ForCausalLM", _WINDOW | {"rope.scaling.attn_factor": ""}),
    "granite": Architecture(
        "GraniteForCausalLM",
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "olmo2": Architecture("Olmo2ForCausalLM"),
    "olmoe": Architecture("OlmoeForCausalLM", _EXPERTS, {"norm_topk_prob": False}),
    "smollm3": Architecture("SmolLM3ForCausalLM", fixed={"no_rope_layer_interval": 4}),
    "stablelm": Architecture("StableLmForCausalLM", {"attention.layer_norm_epsilon": "layer_norm_eps"}),
}


def read_gguf_spec(path: Path) -> ModelSpec:
    """The spec of a GGUF file.

    Raises:
        ModelFormatError: as ``GGUFFile`` and ``model_spec``; (gguf_split) it is one of several parts.
    """
    file = read_gguf(path)
    try:
        return model_spec(gguf_config(file))
    except ModelFormatError as error:
        if "config.json" not in error.what:
            raise
        what = error.what.replace("config.json", f"The metadata of {path.name}")
        raise ModelFormatError(error.code, what, why=error.why, fix="download or convert the file again") from None


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """What a config.json would say of the model. Raises ModelFormatError as ``read_gguf_spec``."""
    metadata, name = file.metadata, file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise unknown_architecture(str(name)[:100], list(ARCHITECTURES))
    architecture, parts = ARCHITECTURES[name], metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ModelFormatError(
            "gguf_split",
            f"The GGUF file {file.path.name} is not whole",
            why=f"it is one of {str(parts)[:40]} parts",
            fix="join them with llama-gguf-split --merge",
        )
    own = {key.removeprefix(f"{name}."): _value(of) for key, of in metadata.items() if key.startswith(f"{name}.")}
    _refuse(own, architecture, name)
    keys = COMMON | architecture.keys
    config = dict(architecture.fixed) | {keys[key]: value for key, value in own.items() if keys.get(key)}
    if name == "llama" and config.get("num_experts"):
        architectures = "MixtralForCausalLM"
    elif name == "llama" and config.get("sliding_window"):
        architectures = "MistralForCausalLM"
    else:
        architectures = architecture.name
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    if experts := config.get("num_experts"):  # each has names, which are listed before a tensor is compared
        stacked = file.tensors.get("blk.0.ffn_gate_exps.weight")
        if stacked is None or stacked.shape[:1] != (experts,):
            raise bad_config("num_experts", experts, f"blk.0.ffn_gate_exps is {list(stacked.shape if stacked else ())}")
    tokens, bias = metadata.get("tokenizer.ggml.tokens"), "blk.0.attn_q.bias" in file.tensors
    config |= {
        "architectures": [architectures],
        "vocab_size": len(tokens) if isinstance(tokens, list) else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        **dict.fromkeys(("attention_bias", "qkv_bias", "use_qkv_bias"), bias),
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    config = {"num_key_value_heads": config.get("num_attention_heads"), "rope_theta": 10000.0} | config
    return config | _heads(own, config, architecture) | _layers(own, config) | _rope(own, file)


def _refuse(own: Mapping[str, Any], architecture: Architecture, name: str) -> None:
    known = COMMON.keys() | architecture.keys.keys() | ELSEWHERE
    for key, value in own.items():
        fixed = key in FIXED and value == FIXED[key]
        if key not in known and not fixed and (isinstance(value, bool) or value != 0):
            raise unsupported("value", f"{name}.{key} = {repr(value)[:80]}"[:300], "choose another file")
    if name == "granite" and own.get("rope.scaling.finetuned") is False:
        raise unsupported("rope", "no position embedding at all", "choose another file")


def _value(value: Any) -> Any:
    """A float32 as the shortest decimal that is stored so: 1e-05 and not 9.99999975e-06, as config.json had it."""
    if type(value) is not float or value != _as_float32(value):
        return value
    return next((short for n in (6, 7, 8) if _as_float32(short := float(f"{value:.{n}g}")) == value), value)


def _as_float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf")


def _dtype(file: GGUFFile) -> Dtype:
    """Of the matrices: what is quantized is computed in bfloat16."""
    stored = {entry.dtype for entry in file.tensors.values() if len(entry.shape) > 1}
    if stored <= {"F32"}:
        return "float32"
    return "float16" if stored <= {"F16", "F32"} else "bfloat16"


def _heads(own: Mapping[str, Any], config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """head_dim, and what follows from it."""
    fields = Fields(config)
    heads, hidden = fields.integer("num_attention_heads", 1, 1 << 14), fields.integer("hidden_size", 1, 1 << 20)
    head_dim = fields.integer("head_dim", 1, 1024, default=max(1, hidden // heads))
    if (width := own.get("attention.value_length", head_dim)) != head_dim:
        raise unsupported("value", f"values of {str(width)[:40]} and keys of {head_dim} numbers", "choose another file")
    said = {"head_dim": head_dim}
    rotated = Fields(own).integer("rope.dimension_count", 1, head_dim, default=head_dim)
    share = {"partial_rotary_factor": 1.0 if rotated == head_dim else (rotated + 0.5) / head_dim}  # rounded down again
    if not architecture.widest:
        return said | share
    widest = config.get("num_hidden_layers") == architecture.widest
    return said | share | {"query_pre_attn_scalar": hidden // heads if widest else head_dim}


def _layers(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """layer_types, where the file says which layers have the window: each of them, or all but every n-th."""
    pattern = own.get(_PATTERN)
    if pattern is None:
        return {}
    layers = Fields(config).integer("num_hidden_layers", 1, 1 << 12)
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise bad_config(_PATTERN, pattern, f"it must be a period, or a flag for each of the {layers} layers")
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}


def _rope(own: Mapping[str, Any], file: GGUFFile) -> dict[str, Any]:
    """rope_scaling. Llama 3's is kept as the factor of each frequency, LongRoPE's as two lists of them."""
    kind, factor = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    if "rope_freqs.weight" in file.tensors or "rope_factors_long.weight" in file.tensors:
        if kind not in ("none", "linear", "longrope") or factor:
            what = f"rope scaling of the type {str(kind)[:80]!r} and factors of single frequencies"
            raise unsupported("rope", what, "choose a file with one of the two")
        one = "rope_freqs.weight" in file.tensors
        short, long = ("rope_freqs",) * 2 if one else ("rope_factors_short", "rope_factors_long")
        rope: dict[str, Any] = {
            "rope_type": "longrope",
            "short_factor": _factors(file, short),
            "long_factor": _factors(file, long),
        }
        return {"rope_scaling": rope | {"attention_factor": 1.0 if one else own.get("rope.scaling.attn_factor")}}
    if kind == "none" or (kind == "linear" and not factor):
        return {}
    rope = {"rope_type": kind, "factor": factor}
    for ours in ("beta_fast", "beta_slow"):
        rope[ours] = own.get(f"rope.scaling.yarn_{ours}")
    return {"rope_scaling": rope | {"attention_factor": own.get("rope.scaling.yarn_attn_factor")}}


def _factors(file: GGUFFile, name: str) -> list[float]:
    entry = file.tensors.get(f"{name}.weight")
    if entry is None or entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > 512:
        stored = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise bad_config(name, stored, "it must be a list of at most 512 float32")
    return list(struct.unpack(f"<{entry.shape[0]}f", file.view(entry.name)))
