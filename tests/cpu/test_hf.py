"""config.json: what it means, and that what cannot run is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import ModelFormatError, NotFound
from penstock.spec import ModelSpec, MoESpec, RopeSpec
from penstock.spec.families import FAMILIES
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.sizing import active_parameters, parameters
from small_model import CONFIG, SPEC, code_of


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFound) as error:
            read_model_spec(folder)
        assert error.value.code == "model_not_found"


def test_old_and_new_rope_keys_mean_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = model_spec(CONFIG | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}})
    new = model_spec(CONFIG | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}})
    assert old == new
    assert old.rope == RopeSpec(
        theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
    )
    oldest = model_spec(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert oldest.rope == RopeSpec(kind="linear", factor=2.0)
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 77.0}, "sliding_attention": None}
    assert model_spec(CONFIG | {"rope_parameters": nested}).rope == RopeSpec(theta=77.0)


def qwen(**keys: Any) -> tuple[int | None, ...]:
    config = CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 4}
    return model_spec(config | keys).windows


def test_windows_of_each_family() -> None:
    mistral = CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert model_spec(mistral).windows == (4096, 4096)
    assert model_spec(mistral | {"sliding_window": None}).windows == (None, None)
    assert model_spec(mistral | {"sliding_window": 9}).windows == (9, 9)
    assert qwen(sliding_window=8, max_window_layers=1) == (None,) * 4
    assert qwen(sliding_window=8, max_window_layers=1, use_sliding_window=True) == (None, 8, 8, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert qwen(sliding_window=8, use_sliding_window=True, layer_types=kinds) == (8, None, 8, None)
    groups = model_spec(
        CONFIG
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8}
        | {"use_sliding_window": True, "layer_types": kinds}
    ).kv_groups()
    assert [(g.window, g.layers) for g in groups] == [(None, (1, 3)), (8, (0, 2))]


def test_family_facts() -> None:
    qwen2 = model_spec(CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, "none", 8)
    qwen3 = model_spec(CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, "head", 128)
    llama = model_spec(CONFIG | {"attention_bias": True, "mlp_bias": True, "head_dim": 10})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.head_dim) == (True, True, True, 10)
    assert model_spec({k: v for k, v in CONFIG.items() if k != "architectures"}) == SPEC


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-2-7b": (6_738_415_616, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16",
    }),
    "Llama-3.1-8B": (8_030_261_248, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    }),
    "Mistral-7B-v0.3": (7_248_023_552, {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None, "torch_dtype": "bfloat16",
    }),
    "Qwen2.5-7B": (7_615_616_512, {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 131072, "use_sliding_window": False, "sliding_window": 131072,
        "max_window_layers": 28, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }),
    "Qwen3-0.6B": (596_049_920, {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 28, "attention_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }),
    "SmolLM2-135M": (134_515_008, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000, "rope_interleaved": False, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }),
    "gemma-2b": (2_506_172_416, {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048,
        "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    }),
    "gemma-2-2b": (2_614_341_888, {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
    }),
    "gemma-3-1b-it": (999_885_952, {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "vocab_size": 262144, "torch_dtype": "bfloat16",
    }),
    "gemma-3-4b-it": (3_880_263_168, {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152}, "torch_dtype": "bfloat16",
    }),
    "Phi-3-mini-4k": (3_821_079_552, {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047, "vocab_size": 32064,
        "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16",
    }),
    "Phi-4-mini": (3_836_021_760, {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064, "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
    }),
    "OLMo-2-1124-7B": (7_298_617_344, {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06, "rope_theta": 500000, "vocab_size": 100352, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }),
    "granite-3.1-2b": (2_533_531_648, {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "tie_word_embeddings": True,
        "vocab_size": 49155, "torch_dtype": "bfloat16",
    }),
    "SmolLM3-3B": (3_075_098_624, {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False, "hidden_size": 2048,
        "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 65536, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "rope_scaling": None, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 128256, "layer_types": ["full_attention"] * 36,
        "torch_dtype": "bfloat16",
    }),
    "stablelm-2-1_6b": (1_644_515_328, {
        "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "layer_norm_eps": 1e-05, "partial_rotary_factor": 0.25, "rope_theta": 10000,
        "use_qkv_bias": True, "vocab_size": 100352, "tie_word_embeddings": False, "torch_dtype": "float16",
    }),
    "mpt-7b": (6_649_286_656, {
        "architectures": ["MptForCausalLM"], "model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32,
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        "expansion_ratio": 4, "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "no_bias": True,
        "norm_type": "low_precision_layernorm", "vocab_size": 50432, "torch_dtype": "bfloat16",
    }),
    "bloom-560m": (559_214_592, {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "layer_norm_epsilon": 1e-05, "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
        "offset_alibi": 100, "vocab_size": 250880, "torch_dtype": "float16",
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "Mixtral-8x7B": (46_702_792_704, {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    }),
    "OLMoE-1B-7B": (6_919_161_856, {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 50304, "torch_dtype": "bfloat16",
    }),
    "gpt-oss-20b": (20_914_757_184, {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
    }),
}  # fmt: skip
"""Parameters as their pages state them (of gemma-3-4b-it, the text model's), and config.json with what matters here."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    expected, config = PUBLISHED[name]
    spec = model_spec(config)
    assert parameters(spec) == expected
    assert spec.dtype == config.get("torch_dtype", "bfloat16")


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    active = {name: round(active_parameters(model_spec(config)) / 1e9, 1) for name, (_, config) in PUBLISHED.items()}
    assert active["Qwen3-30B-A3B"] == 3.4 and active["Mixtral-8x7B"] == 12.9 and active["OLMoE-1B-7B"] == 1.3
    assert active["Qwen1.5-MoE-A2.7B"] == 2.7 and active["Llama-3.1-8B"] == 8.0


def published(name: str, **changes: Any) -> ModelSpec:
    return model_spec(PUBLISHED[name][1] | changes)


def test_what_published_configurations_mean() -> None:
    gemma = published("gemma-2b")
    assert (gemma.activation, gemma.norm_offset, gemma.tied, gemma.embed_scale) == ("gelu_tanh", 1.0, True, 2048**0.5)
    gemma2 = published("gemma-2-2b")
    assert gemma2.windows[:3] == (4096, None, 4096) and gemma2.norm_place == "both"
    assert (gemma2.attn_softcap, gemma2.logit_softcap, gemma2.attn_scale) == (50.0, 30.0, 1 / 16)
    assert published("gemma-2-2b", attn_logit_softcapping=None).attn_softcap is None
    gemma3 = published("gemma-3-1b-it")
    assert gemma3.windows[:7] == (512,) * 5 + (None, 512) and gemma3.qk_norm == "head" and gemma3.tied
    assert gemma3.local_rope == RopeSpec(theta=10000.0) and gemma3.rope == RopeSpec(theta=1e6)
    assert gemma3.rope_of(0) == gemma3.local_rope and gemma3.rope_of(5) == gemma3.rope
    seen = published("gemma-3-4b-it")
    assert seen.rope == RopeSpec(theta=1e6, kind="linear", factor=8.0) and seen.local_rope == RopeSpec(theta=10000.0)
    assert (seen.heads, seen.kv_heads, seen.vocab_size, seen.dtype) == (8, 4, 262208, "bfloat16")
    assert set(published("Phi-3-mini-4k").windows) == {2047}
    olmo2, stable = published("OLMo-2-1124-7B"), published("stablelm-2-1_6b")
    assert (olmo2.norm_place, olmo2.qk_norm) == ("post", "all")
    assert (stable.norm, stable.rope.dims, stable.qkv_bias) == ("layer", 16, True)
    granite = published("granite-3.1-2b")
    assert (granite.attn_scale, granite.embed_scale) == (0.015625, 12.0)
    assert (granite.residual_scale, granite.logit_scale) == (0.22, 0.125)
    assert published("SmolLM3-3B").unrotated == tuple(range(3, 36, 4))
    assert published("SmolLM3-3B", no_rope_layers=None) == published("SmolLM3-3B")


def test_what_published_configurations_with_biases_mean() -> None:
    mpt, bloom = published("mpt-7b"), published("bloom-560m")
    assert (mpt.alibi, mpt.norm, mpt.norm_bias, mpt.mlp_gate, mpt.activation) == (8.0, "layer", False, False, "gelu")
    assert (mpt.ffn, mpt.kv_heads, mpt.max_positions, mpt.tied, mpt.attn_scale) == (16384, 32, 2048, True, None)
    assert mpt.rope_of(0) is None
    inner = PUBLISHED["mpt-7b"][1]["attn_config"]
    steep = published("mpt-7b", attn_config=inner | {"alibi_bias_max": 16, "softmax_scale": 0.1}, max_seq_len=65536)
    assert (steep.alibi, steep.attn_scale, steep.max_positions) == (16.0, 0.1, 65536)
    assert (bloom.alibi, bloom.norm_bias, bloom.embed_norm, bloom.activation) == (8.0, True, True, "gelu_tanh")
    assert (bloom.qkv_bias, bloom.o_bias, bloom.mlp_bias, bloom.ffn, bloom.heads) == (True, True, True, 4096, 16)
    assert published("bloom-560m", n_embed=None, hidden_size=1024, n_inner=4096) == bloom


def test_what_published_sparse_configurations_mean() -> None:
    qwen2, qwen3 = published("Qwen1.5-MoE-A2.7B").moe, published("Qwen3-30B-A3B").moe
    assert qwen2 == MoESpec(experts=60, active=4, ffn=1408, layers=(True,) * 24, normalize=False, shared_ffn=5632)
    assert qwen3 == MoESpec(experts=128, active=8, ffn=768, layers=(True,) * 48)
    assert published("Mixtral-8x7B").moe == MoESpec(experts=8, active=2, ffn=14336, layers=(True,) * 32)
    gpt = published("gpt-oss-20b")
    assert gpt.moe == MoESpec(
        experts=32, active=4, ffn=2880, layers=(True,) * 24, router_bias=True, bias=True, packed=True
    )
    assert gpt.sinks and gpt.windows[:2] == (128, None) and gpt.activation == "swiglu_clamped"
    assert gpt.rope.kind == "yarn" and not gpt.rope.truncate and gpt.rope.amplitude == pytest.approx(1.3466, abs=1e-4)
    assert gpt.max_positions == 131072
    assert published("Qwen3-30B-A3B", num_experts=None, num_local_experts=128).moe == qwen3
    dense = published("Qwen3-30B-A3B", mlp_only_layers=[1], decoder_sparse_step=2).moe
    assert dense is not None and dense.layers == (False, False, False, True) + (False, True) * 22


def test_longrope_settles_on_the_list_of_the_context_served() -> None:
    rope = published("Phi-4-mini").rope
    assert (rope.kind, rope.dims, rope.original_max_positions) == ("scaled", 96, 4096)
    assert rope.amplitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope.settled(4096).factors == (1.0,) * 48 and rope.settled(4097).factors == (2.0,) * 48
    assert rope.settled(4096) == rope.settled(1).settled(9999)


def test_yarn_states_the_context_it_reaches() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert published("Qwen2.5-7B", max_position_embeddings=32768, rope_scaling=yarn).max_positions == 131072
    assert published("Qwen2.5-7B", rope_scaling=yarn).max_positions == 131072


@pytest.mark.parametrize(
    ("name", "change", "code", "names"),
    [
        ("stablelm-2-1_6b", {"use_parallel_residual": True}, "unsupported_value", "use_parallel_residual"),
        ("stablelm-2-1_6b", {"qk_layernorm": True}, "unsupported_value", "qk_layernorm = True, which"),
        (
            "stablelm-2-1_6b",  # as the one of 12B has it
            {"qk_layernorm": True, "use_parallel_residual": True},
            "unsupported_value",
            "qk_layernorm = True and use_parallel_residual = True, which this build lacks",
        ),
        ("stablelm-2-1_6b", {"partial_rotary_factor": 0.05}, "config_invalid", "partial_rotary_factor"),
        ("mpt-7b", {"attn_config": {"clip_qkv": 6}}, "unsupported_value", "attn_config.clip_qkv = 6, which"),
        ("mpt-7b", {"attn_config": {"alibi": False}}, "unsupported_value", "attn_config.alibi = True is implemented"),
        ("mpt-7b", {"attn_config": {"qk_ln": True}}, "unsupported_value", "attn_config.qk_ln"),
        ("mpt-7b", {"attn_config": {"alibi_bias_max": 0}}, "config_invalid", "attn_config.alibi_bias_max = 0"),
        ("mpt-7b", {"attn_config": [8]}, "config_invalid", "attn_config"),
        ("mpt-7b", {"no_bias": False}, "unsupported_value", "no_bias"),
        ("mpt-7b", {"n_heads": None}, "config_invalid", "lacks n_heads"),
        ("mpt-7b", {"max_seq_len": 1 << 25}, "config_invalid", "max_seq_len"),
        ("bloom-560m", {"apply_residual_connection_post_layernorm": True}, "unsupported_value", "post_layernorm"),
        ("bloom-560m", {"n_embed": "1024"}, "config_invalid", "n_embed"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "unsupported_value", "clip_qkv"),
        ("OLMoE-1B-7B", {"num_experts": 10_000}, "config_invalid", "more than 131072 experts in 16 layers"),
        ("OLMoE-1B-7B", {"num_experts_per_tok": 65}, "config_invalid", "num_experts_per_tok"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "unsupported_value", "use_bidirectional_attention"),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "unsupported_value", "attn_logit_softcapping"),
        ("gemma-3-1b-it", {"rope_parameters": {"rope_theta": 5.0}}, "config_invalid", "rope_parameters"),
        ("gemma-3-1b-it", {"sliding_window_pattern": 0}, "config_invalid", "sliding_window_pattern"),
        ("gemma-3-4b-it", {"text_config": 7}, "config_invalid", "text_config"),
        ("gemma-2-2b", {"final_logit_softcapping": -1}, "config_invalid", "final_logit_softcapping"),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, "unsupported_value", "swiglu_limit"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "gptq"}}, "unsupported_quantization", "gptq"),
        ("Phi-4-mini", {"rope_scaling": {"type": "longrope"}}, "config_invalid", "short_factor"),
        ("Phi-4-mini", {"partial_rotary_factor": 1.0}, "config_invalid", "short_factor"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": "all"}, "config_invalid", "mlp_only_layers"),
        ("Qwen3-30B-A3B", {"num_experts": None}, "config_invalid", "num_local_experts"),
        ("SmolLM3-3B", {"no_rope_layers": [1]}, "config_invalid", "no_rope_layers"),
        ("granite-3.1-2b", {"logits_scaling": 0}, "config_invalid", "logits_scaling"),
        (
            "Qwen3-0.6B",
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            "unsupported_rope",
            "mrope_section",
        ),
    ],
)
def test_a_value_of_a_family_that_cannot_run_is_refused_by_name(
    name: str, change: dict[str, Any], code: str, names: str
) -> None:
    with pytest.raises(ModelFormatError, match=names) as error:
        published(name, **change)
    assert code_of(error) == code


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown_architecture", "nearest by name is LlamaFor"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "unknown_architecture", "nearest by name is Qwen3ForCausalLM"),
        ({"architectures": ["Olmo3ForCausalLM"]}, "unknown_architecture", "nearest by name is Olmo2ForCausalLM"),
        ({"architectures": ["Gemma4ForCausalLM"]}, "unknown_architecture", "nearest by name is Gemma3ForCausalLM"),
        ({"architectures": ["GraniteMoeForCausalLM"]}, "unknown_architecture", "nearest by name is GraniteForCausalLM"),
        ({"architectures": [7]}, "unknown_architecture", "7"),
        ({"architectures": None, "model_type": None}, "unknown_architecture", "None"),
        ({"model_type": "mistral"}, "config_invalid", "model_type"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "remote_code", "modeling_evil.Evil"),
        ({"quantization_config": {"quant_method": "awq"}}, "unsupported_quantization", "awq"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 0.5}, "config_invalid", "rope_theta"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "config_invalid", "short_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "unsupported_rope", "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "config_invalid", "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "config_invalid", "factor"),
        ({"rope_scaling": [1]}, "config_invalid", "rope_scaling"),
        ({"hidden_size": 32.5}, "config_invalid", "hidden_size = 32.5, "),
        ({"hidden_size": "32"}, "config_invalid", "hidden_size = '32', "),
        ({"partial_rotary_factor": 0.5}, "unsupported_rope", "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "unsupported_activation", "relu"),
        ({"hidden_act": ["silu"]}, "unsupported_activation", "silu"),
        ({"torch_dtype": "float8_e4m3fn"}, "unsupported_dtype", "float8_e4m3fn"),
        ({"layer_types": ["chunked_attention"] * 2}, "unsupported_attention", "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "config_invalid", "layer_types"),
        ({"layer_types": ["full_attention"]}, "config_invalid", "each of the 2 layers"),
        ({"hidden_size": None}, "config_invalid", "lacks hidden_size"),
        ({"hidden_size": -24}, "config_invalid", "hidden_size"),
        ({"hidden_size": 0}, "config_invalid", "hidden_size"),
        ({"hidden_size": "24"}, "config_invalid", "hidden_size"),
        ({"hidden_size": 24.0}, "config_invalid", "hidden_size"),
        ({"hidden_size": True}, "config_invalid", "hidden_size"),
        ({"hidden_size": 10**30}, "config_invalid", "hidden_size"),
        ({"hidden_size": 25}, "config_invalid", "head_dim"),
        ({"head_dim": 7}, "config_invalid", "even head_dim"),
        ({"num_hidden_layers": 10**9}, "config_invalid", "num_hidden_layers"),
        ({"num_key_value_heads": 2}, "config_invalid", "must divide num_attention_heads"),
        ({"num_key_value_heads": 6}, "config_invalid", "num_key_value_heads"),
        ({"vocab_size": 0}, "config_invalid", "vocab_size"),
        ({"max_position_embeddings": 2**60}, "config_invalid", "max_position_embeddings"),
        ({"rms_norm_eps": 0}, "config_invalid", "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "config_invalid", "rms_norm_eps"),
        ({"rope_theta": 10**400}, "config_invalid", "rope_theta"),
        ({"rms_norm_eps": "1e-5"}, "config_invalid", "rms_norm_eps"),
        ({"rope_theta": -1.0}, "config_invalid", "rope_theta"),
        ({"tie_word_embeddings": 1}, "config_invalid", "tie_word_embeddings"),
        ({"attention_bias": "no"}, "config_invalid", "attention_bias"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict[str, Any], code: str, names: str) -> None:
    with pytest.raises(ModelFormatError, match=names) as error:
        model_spec(CONFIG | change)
    assert code_of(error) == code


INNER_KEYS = ["type", "factor", "x", "rope_theta", "full_attention", "short_factor", "clip_qkv", "alibi_bias_max"]
KEYS = [
    *CONFIG,
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "head_dim",
    "partial_rotary_factor",
]
KEYS += ["num_experts", "num_experts_per_tok", "mlp_only_layers", "no_rope_layers", "sliding_window_pattern"]
KEYS += ["d_model", "n_heads", "attn_config", "n_embed", "n_inner", "expansion_ratio", "seq_length"]
KEYS += ["query_pre_attn_scalar", "attn_logit_softcapping", "quantization_config", "logits_scaling", "layer_norm_eps"]


@settings(max_examples=10 * settings.default.max_examples)
@given(
    key=st.sampled_from(KEYS),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER_KEYS), inner),
        max_leaves=5,
    ),
    name=st.sampled_from(sorted(FAMILIES)),
)
def test_any_value_gives_a_spec_or_a_coded_error(key: str, value: Any, name: str) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"} | {"query_pre_attn_scalar": 8}
    config |= {"architectures": [name], "model_type": FAMILIES[name].name, "num_experts": 4, "num_experts_per_tok": 2}
    config |= {"d_model": 24, "n_heads": 3, "n_layers": 2}
    config |= {key: value} if FAMILIES[name].text_config is None else {"text_config": config | {key: value}}
    try:
        spec = model_spec(config)
    except ModelFormatError as error:
        assert error.code and len(str(error)) < 1000
    else:
        assert spec.heads % spec.kv_heads == 0 and spec.head_dim % 2 == 0
