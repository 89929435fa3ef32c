"""Random configurations of every family of decoders, small enough for transformers' float32 on one core."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "olmo2": "Olmo2Config",
    "granite": "GraniteConfig",
    "smollm3": "SmolLM3Config",
    "stablelm": "StableLmConfig",
    "mpt": "MptConfig",
    "bloom": "BloomConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "olmoe": "OlmoeConfig",
    "gpt_oss": "GptOssConfig",
}
"""Family -> the name of its configuration class in transformers."""
FAMILIES = tuple(CONFIGS)
OWN_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "gpt_oss")
"""Families whose head_dim need not be hidden_size / heads."""


def random_config(family: str, rng: random.Random) -> Config:
    """Head counts may be odd, head_dim is any even number from 8 to 128, windows and contexts are short."""
    if family in ("mpt", "bloom"):
        return _alibi(family, rng)
    kv_heads, group = rng.choice([(1, 1), (1, 3), (3, 1), (2, 2), (5, 1), (3, 2), (1, 7), (2, 4)])
    heads = kv_heads * group
    config: Config = {
        "vocab_size": rng.randrange(90, 300),
        "hidden_size": heads * rng.choice([8, 12, 17]),
        "intermediate_size": rng.choice([50, 96, 129, 172]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * rng.randrange(4, 65),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "hidden_act": rng.choice(["silu", "silu", "gelu_pytorch_tanh", "gelu"]),
        "rope_parameters": random_rope(rng),
    }
    if family not in OWN_HEAD_DIM:
        config["hidden_size"] = heads * 2 * rng.randrange(4, 33)
        del config["head_dim"]
    return config | OWN.get(family, lambda *_: {})(config, rng)


def _alibi(family: str, rng: random.Random) -> Config:
    """These two have few keys, and names of their own for most."""
    heads = rng.choice([1, 2, 3, 5, 6, 8, 12])
    config: Config = {
        "vocab_size": rng.randrange(90, 300),
        "hidden_size": heads * 2 * rng.randrange(4, 17),
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice([2, 3]),
        "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
        "pad_token_id": 0,
    }
    own = {"mpt": {"max_seq_len": 512, "attn_config": {"softmax_scale": rng.choice([None, 0.15])}}}
    return config | own.get(family, {})


def random_rope(rng: random.Random, *kinds: str) -> Config:
    """A rope of one of the kinds, by default of one that every family has."""
    kind = rng.choice(kinds or ("default", "linear", "llama3", "yarn"))
    rope: Config = {"rope_type": kind, "rope_theta": rng.choice([500.0, 10000.0, 1e6])}
    if kind == "linear":
        rope["factor"] = 2.5
    if kind == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "yarn":
        rope |= {"factor": 8.0, "original_max_position_embeddings": 64, "truncate": rng.random() < 0.5}
        rope |= rng.choice([{}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"attention_factor": 1.2}])
        rope |= rng.choice([{}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
    return rope


def _llama(_: Config, rng: random.Random) -> Config:
    return {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}


def _mistral(_: Config, rng: random.Random) -> Config:
    return {"sliding_window": rng.choice([None, 5, 32, 100])}


def _qwen2(_: Config, rng: random.Random) -> Config:
    sliding = rng.random() < 0.5
    return {"use_sliding_window": sliding, "sliding_window": rng.choice([7, 64]), "max_window_layers": 1}


def _qwen3(config: Config, rng: random.Random) -> Config:
    return _qwen2(config, rng) | {"attention_bias": rng.random() < 0.3}


def _gemma(config: Config, rng: random.Random) -> Config:
    heads = config["num_attention_heads"]
    return {
        "hidden_size": heads * rng.choice([8, 12, 18]),
        "attention_bias": rng.random() < 0.3,
        "tie_word_embeddings": rng.random() < 0.7,
    }


def _gemma2(config: Config, rng: random.Random) -> Config:
    return _gemma(config, rng) | {
        "hidden_activation": rng.choice(["gelu_pytorch_tanh", "silu"]),
        "query_pre_attn_scalar": rng.choice([config["head_dim"], 24]),
        "sliding_window": rng.choice([5, 32, 100]),
        "attn_logit_softcapping": rng.choice([None, 3.0, 50.0]),
        "final_logit_softcapping": rng.choice([None, 12.0, 30.0]),
    }


def _gemma3(config: Config, rng: random.Random) -> Config:
    ropes = {
        "full_attention": random_rope(rng, "default", "linear"),
        "sliding_attention": random_rope(rng, "default") | {"rope_theta": 77.0},
    }
    return _gemma2(config, rng) | {
        "attn_logit_softcapping": None,
        "sliding_window_pattern": rng.choice([2, 3]),
        "rope_parameters": ropes,
    }


def _phi3(config: Config, rng: random.Random) -> Config:
    share, long = rng.choice([1.0, 0.75, 0.5]), rng.random() < 0.7
    head_dim = 8 * rng.randrange(1, 13)
    rope: Config = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    if long:
        factors = [[rng.uniform(1.0, top) for _ in range(int(head_dim * share) // 2)] for top in (1.5, 9.0)]
        rope |= {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[1]}
    return {
        "hidden_size": config["num_attention_heads"] * head_dim,
        "original_max_position_embeddings": rng.choice([32, 512]),  # every sequence here is longer than 32
        "rope_parameters": rope,
        "sliding_window": rng.choice([None, 5, 100]),
    }


def _olmo2(_: Config, rng: random.Random) -> Config:
    return {"attention_bias": rng.random() < 0.3}


def _granite(_: Config, rng: random.Random) -> Config:
    return {
        "attention_bias": rng.random() < 0.3,
        "mlp_bias": rng.random() < 0.3,
        "attention_multiplier": rng.uniform(0.05, 0.4),
        "embedding_multiplier": rng.choice([1.0, 3.3]),
        "residual_multiplier": rng.choice([1.0, 0.22, 0.7]),
        "logits_scaling": rng.choice([1.0, 7.0]),
    }


def _smollm3(_: Config, rng: random.Random) -> Config:
    return {
        "no_rope_layer_interval": rng.choice([2, 3]),
        "use_sliding_window": rng.random() < 0.5,
        "sliding_window": rng.choice([7, 64]),
        "attention_bias": rng.random() < 0.3,
    }


def _stablelm(config: Config, rng: random.Random) -> Config:
    return {
        "hidden_size": config["num_attention_heads"] * 8 * rng.randrange(1, 13),
        "rope_parameters": random_rope(rng, "default", "linear")
        | {"partial_rotary_factor": rng.choice([0.25, 0.5, 1.0])},
        "layer_norm_eps": rng.choice([1e-5, 1e-3]),
        "use_qkv_bias": rng.random() < 0.5,
    }


def _experts(rng: random.Random, count: str) -> Config:
    experts = rng.choice([3, 4, 8, 16])
    return {count: experts, "num_experts_per_tok": rng.randrange(1, min(4, experts) + 1)}


def _qwen3_moe(config: Config, rng: random.Random) -> Config:
    sliding = rng.random() < 0.3
    return _experts(rng, "num_experts") | {
        "moe_intermediate_size": rng.choice([10, 32, 45]),
        "norm_topk_prob": rng.random() < 0.5,
        "mlp_only_layers": rng.choice([[], [], [0]]),
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "use_sliding_window": sliding,
        "sliding_window": rng.choice([7, 64]),
        "attention_bias": rng.random() < 0.3,
    }


def _qwen2_moe(config: Config, rng: random.Random) -> Config:
    shared = {"shared_expert_intermediate_size": rng.choice([20, 64]), "qkv_bias": rng.random() < 0.7}
    return _qwen3_moe(config, rng) | shared | {"max_window_layers": 2}


def _mixtral(config: Config, rng: random.Random) -> Config:
    return _mistral(config, rng) | _experts(rng, "num_local_experts")


def _olmoe(_: Config, rng: random.Random) -> Config:
    bias, normalized = rng.random() < 0.3, rng.random() < 0.5
    return _experts(rng, "num_experts") | {"attention_bias": bias, "norm_topk_prob": normalized}


def _gpt_oss(_: Config, rng: random.Random) -> Config:
    return _experts(rng, "num_local_experts") | {
        "hidden_act": "silu",
        "rope_parameters": random_rope(rng, "yarn", "yarn", "default"),
        "sliding_window": rng.choice([5, 32, 100]),
        "attention_bias": rng.random() < 0.7,
    }


OWN: dict[str, Callable[[Config, random.Random], Config]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}
