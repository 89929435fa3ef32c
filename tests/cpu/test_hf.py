"""config.json: what it means, and that what cannot run is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import ModelFormatError, NotFound
from penstock.spec import RopeSpec
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.sizing import parameters
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
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 8)
    qwen3 = model_spec(CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
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
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    expected, config = PUBLISHED[name]
    spec = model_spec(config)
    assert parameters(spec) == expected
    assert set(spec.windows) == {None} and spec.dtype == config["torch_dtype"]


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown_architecture", "nearest by name is LlamaFor"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "unknown_architecture", "nearest by name is Qwen3ForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "unknown_architecture", "nearest by name is MistralForCausalLM"),
        ({"architectures": [7]}, "unknown_architecture", "7"),
        ({"architectures": None, "model_type": None}, "unknown_architecture", "None"),
        ({"model_type": "mistral"}, "config_invalid", "model_type"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "remote_code", "modeling_evil.Evil"),
        ({"quantization_config": {"quant_method": "awq"}}, "unsupported_quantization", "awq"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "unsupported_rope", "yarn"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "unsupported_rope", "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "unsupported_rope", "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "config_invalid", "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "config_invalid", "factor"),
        ({"rope_scaling": [1]}, "config_invalid", "rope_scaling"),
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


@settings(max_examples=3 * settings.default.max_examples)
@given(
    key=st.sampled_from([*CONFIG, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
        max_leaves=5,
    ),
    family=st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
)
def test_any_value_gives_a_spec_or_a_coded_error(key: str, value: Any, family: str) -> None:
    config = CONFIG | {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()} | {key: value}
    try:
        spec = model_spec(config)
    except ModelFormatError as error:
        assert error.code and len(str(error)) < 1000
    else:
        assert spec.heads % spec.kv_heads == 0 and spec.head_dim % 2 == 0
