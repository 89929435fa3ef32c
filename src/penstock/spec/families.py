"""The families of decoders this build runs, and what transformers' code fixes for each and config.json does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pattern = Literal["none", "all", "upper", "even", "even_lower", "periodic", "unrotated"]
"""Which layers have the sliding window where ``layer_types`` is absent: none; all; those from ``max_window_layers`` on;
every second, from the first; of those, the ones below ``max_window_layers``; all but each n-th, n being
``sliding_window_pattern``; those without position embedding."""


@dataclass(frozen=True, slots=True)
class Family:
    """Attributes:
    name: its ``model_type``.
    names: its own keys for some of the common ones; of several the first that is there counts.
    inner: an object of the configuration whose keys are read as ``inner.key``.
    defaults: values of absent keys, where transformers' configuration class differs from the common ones.
    fixed: keys that may only have this value, as no other is implemented; absent and null are fine.
    qkv_bias, o_bias, mlp_bias: a constant, or the config key that decides.
    mlp_gate: the feed-forward is gated.
    mha: without ``num_key_value_heads`` there are as many as heads.
    window: see Pattern; ``gated``: windows are off unless ``use_sliding_window``.
    partial_rotary: ``partial_rotary_factor`` is honoured.
    local_rope: windowed layers have a rope of their own (``rope_local_base_freq``).
    alibi: linear position biases in place of rope; ``alibi_bias_max`` is 8 where there is no such key.
    norm_bias: of a LayerNorm.
    embed_norm: the embedding is normalized.
    scaled_embedding: the embedding is multiplied by the square root of its width.
    expert_width: the key with the width of an expert; None for a dense family.
    normalized_router: the chosen experts' weights are divided by their sum; a constant, or the config key that decides.
    text_config: the decoder's configuration is inside this key (a model with other modalities, which are left aside).
    """

    name: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inner: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    mlp_gate: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    mha: bool = False
    window: Pattern = "none"
    gated: bool = False
    partial_rotary: bool = False
    local_rope: bool = False
    alibi: bool = False
    activation: str = "hidden_act"
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    embed_norm: bool = False
    norm_offset: float = 0.0
    norm_place: Literal["pre", "post", "both"] = "pre"
    scaled_embedding: bool = False
    sinks: bool = False
    expert_width: str | None = None
    normalized_router: bool | str = True
    text_config: str | None = None


_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_CAUSAL = {"use_bidirectional_attention": False}
_GEMMA: dict[str, Any] = _ATTENTION_BIAS | {
    "norm_offset": 1.0,
    "scaled_embedding": True,
    "activation": "hidden_activation",
}
_GEMMA2_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3: dict[str, Any] = _GEMMA | {
    "defaults": _GEMMA2_SIZES
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
    "fixed": _CAUSAL | {"attn_logit_softcapping": None},
    "window": "periodic",
    "qk_norm": "head",
    "norm_place": "both",
    "local_rope": True,
}
_QWEN_MOE: dict[str, Any] = {
    "gated": True,
    "expert_width": "moe_intermediate_size",
    "normalized_router": "norm_topk_prob",
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", **_ATTENTION_BIAS, mlp_bias="mlp_bias", mha=True),
    "MistralForCausalLM": Family("mistral", defaults={"sliding_window": 4096}, window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="upper", gated=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", defaults={"head_dim": 128}, **_ATTENTION_BIAS, qk_norm="head", window="upper", gated=True
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        defaults={"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        fixed=_CAUSAL,
        **_GEMMA | {"activation": "hidden_act"},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        defaults=_GEMMA2_SIZES
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed=_CAUSAL,
        **_GEMMA,
        window="even",
        norm_place="both",
    ),
    "Gemma3ForCausalLM": Family("gemma3_text", **_GEMMA3),
    "Gemma3ForConditionalGeneration": Family("gemma3", **_GEMMA3, text_config="text_config"),
    "Phi3ForCausalLM": Family(
        "phi3",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        mha=True,
        window="all",
        partial_rotary=True,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", defaults={"rms_norm_eps": 1e-5}, **_ATTENTION_BIAS, qk_norm="all", norm_place="post", mha=True
    ),
    "GraniteForCausalLM": Family(
        "granite", defaults={"attention_multiplier": 1.0}, **_ATTENTION_BIAS, mlp_bias="mlp_bias", mha=True
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "sliding_window": None},
        **_ATTENTION_BIAS,
        mlp_bias="mlp_bias",
        mha=True,
        window="unrotated",
        gated=True,
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        defaults={"partial_rotary_factor": 0.25},
        fixed={"qk_layernorm": False, "use_parallel_residual": False},
        qkv_bias="use_qkv_bias",
        mha=True,
        partial_rotary=True,
        norm="layer",
    ),
    "MptForCausalLM": Family(
        "mpt",
        names={
            "hidden_size": ("d_model", "hidden_size"),
            "num_attention_heads": ("n_heads", "num_attention_heads"),
            "num_key_value_heads": ("n_heads", "num_attention_heads"),
            "num_hidden_layers": ("n_layers", "num_hidden_layers"),
            "max_position_embeddings": ("max_seq_len",),
            "layer_norm_eps": ("layer_norm_epsilon",),
            "alibi_bias_max": ("attn_config.alibi_bias_max",),
            "attn_scale": ("attn_config.softmax_scale",),
        },
        inner="attn_config",
        defaults={"max_seq_len": 2048, "hidden_act": "gelu", "tie_word_embeddings": True},
        fixed={
            "attn_config.alibi": True,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.clip_qkv": None,
            "attn_config.qk_ln": False,
            "attn_config.prefix_lm": False,
            "attn_config.attn_uses_sequence_id": False,
            "no_bias": True,
            "logit_scale": None,
            "norm_type": "low_precision_layernorm",
        },
        alibi=True,
        mlp_gate=False,
        norm="layer",
        norm_bias=False,
    ),
    "BloomForCausalLM": Family(
        "bloom",
        names={
            "hidden_size": ("n_embed", "hidden_size"),
            "intermediate_size": ("n_inner",),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "num_key_value_heads": ("n_head", "num_attention_heads"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "max_position_embeddings": ("seq_length",),
            "layer_norm_eps": ("layer_norm_epsilon",),
        },
        defaults={"seq_length": 2048, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        fixed={"apply_residual_connection_post_layernorm": False},
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        alibi=True,
        mlp_gate=False,
        norm="layer",
        embed_norm=True,
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        defaults={
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        **_QWEN_MOE,
        qkv_bias="qkv_bias",
        window="even_lower",
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        defaults={"moe_intermediate_size": 768, "num_experts_per_tok": 8},
        **_QWEN_MOE | _ATTENTION_BIAS,
        qk_norm="head",
        window="all",
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        window="all",
        expert_width="intermediate_size",
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        fixed={"clip_qkv": None},
        **_ATTENTION_BIAS,
        qk_norm="all",
        mha=True,
        expert_width="intermediate_size",
        normalized_router="norm_topk_prob",
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        defaults={
            "head_dim": 64,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "dtype": "bfloat16",  # of all that is not MXFP4; published files do not say it
        },
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        **_ATTENTION_BIAS,
        window="even",
        sinks=True,
        expert_width="intermediate_size",
    ),
}
