"""Hugging Face config.json to ModelSpec, for the families this build runs; all others are refused by name.

Defaults of absent keys are those of transformers' configuration classes (v4 keys, and v5's ``rope_parameters``
and ``layer_types``). Nothing is guessed: a value this build does not implement is an error, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from penstock.base import ModelFormatError, NotFound
from penstock.formats import read_json_object
from penstock.spec.fields import Fields, bad_config
from penstock.spec.model import Dtype, ModelSpec, RopeSpec

MAX_WINDOW = 1 << 31


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers' code fixes for an architecture and config.json does not say.

    Attributes:
        qkv_bias, o_bias, mlp_bias: a constant, or the config key that decides.
        head_dim: default where the key is absent; None means hidden_size / heads.
        window: which layers slide: none; all, by ``sliding_window``; or as ``layer_types`` or Qwen's
            ``use_sliding_window`` and ``max_window_layers`` say.
    """

    name: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None
    window: Literal["none", "all", "layers"] = "none"


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family("mistral", window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="layers"),
    "Qwen3ForCausalLM": Family(
        "qwen3", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, head_dim=128, window="layers"
    ),
}
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_model_spec(folder: Path) -> ModelSpec:
    """The spec of a model folder's config.json.

    Raises:
        NotFound: (model_not_found) there is no such folder, or no config.json in it.
        ModelFormatError: (json_invalid), or as ``model_spec``.
    """
    path = folder / "config.json"
    if not path.is_file():
        why = f"it has no {path.name}" if folder.is_dir() else "no such folder"
        raise NotFound("model_not_found", f"{folder} is not a model folder", why=why, fix="give a Hugging Face folder")
    return model_spec(read_json_object(path))


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Translates a config.json.

    Raises:
        ModelFormatError: (remote_code) the model wants its own Python code run; (unknown_architecture);
            (unsupported_quantization), (unsupported_rope), (unsupported_activation), (unsupported_dtype),
            (unsupported_attention) it needs what this build lacks; (config_invalid) a value is missing, of
            the wrong type, out of range or contradicts another.
    """
    family = _family(config)
    fields = Fields(config)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise _unsupported("quantization", f"weights quantized with {method!r}", "use the unquantized checkpoint")
    heads = fields.integer("num_attention_heads", 1, 1 << 14)
    hidden = fields.integer("hidden_size", 1, 1 << 20)
    head_dim = _head_dim(fields, family, hidden, heads)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, default=heads if family.name == "llama" else None)
    if heads % kv_heads:
        raise bad_config("num_key_value_heads", kv_heads, f"it must divide num_attention_heads, which is {heads}")
    max_positions = fields.integer("max_position_embeddings", 1, 1 << 27)
    return ModelSpec(
        family=family.name,
        vocab_size=fields.integer("vocab_size", 1, 1 << 24),
        hidden=hidden,
        ffn=fields.integer("intermediate_size", 1, 1 << 22),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(fields, family, fields.integer("num_hidden_layers", 1, 1 << 12)),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope=_rope(fields, max_positions),
        activation=_activation(fields),
        qkv_bias=fields.flag_or_key(family.qkv_bias),
        o_bias=fields.flag_or_key(family.o_bias),
        mlp_bias=fields.flag_or_key(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied=fields.flag("tie_word_embeddings", default=False),
        dtype=_dtype(config),
    )


def _family(config: Mapping[str, Any]) -> Family:
    if config.get("auto_map"):
        wanted = config["auto_map"]
        wanted = sorted(map(str, wanted.values())) if isinstance(wanted, Mapping) else wanted
        raise ModelFormatError(
            "remote_code",
            "The model brings its own Python code, and Penstock never runs code from a model folder",
            why=f"config.json has auto_map {str(wanted)[:200]}",
            fix="use a checkpoint of an architecture that Penstock implements, converted without auto_map",
        )
    names, model_type = config.get("architectures"), config.get("model_type")
    by_type = {family.name: family for family in FAMILIES.values()}
    if names is None and isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    name = names[0] if isinstance(names, list) and names else model_type
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise _unknown_architecture(str(name)[:100])
    if model_type is not None and model_type != family.name:
        raise bad_config("model_type", model_type, f"architectures says {name}, whose model_type is {family.name!r}")
    return family


def _unknown_architecture(name: str) -> ModelFormatError:
    lower = {known.lower(): known for known in FAMILIES}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
    return ModelFormatError(
        "unknown_architecture",
        f"Penstock does not implement the architecture {name}",
        why=f"implemented are {', '.join(FAMILIES)}; the nearest by name is {lower[near[0]]}",
        fix="choose a model of one of these families",
    )


def _head_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    default = family.head_dim
    if default is None and hidden % heads == 0:
        default = hidden // heads
    head_dim = fields.integer("head_dim", 1, 1024, default=default)
    if head_dim % 2:
        raise bad_config("head_dim", head_dim, "rotary embedding needs an even head_dim")
    return head_dim


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    if family.window == "all":
        window = fields.optional_integer("sliding_window", 1, MAX_WINDOW, default=4096)
        windows: tuple[int | None, ...] = (window,) * layers
    elif family.window == "layers" and fields.flag("use_sliding_window", default=False):
        window = fields.optional_integer("sliding_window", 1, MAX_WINDOW, default=4096)
        first = fields.integer("max_window_layers", 0, 1 << 31, default=28)
        windows = tuple(window if i >= first else None for i in range(layers))
    else:
        window, windows = None, (None,) * layers
    types = fields.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != layers:
        raise bad_config("layer_types", types, f"it must list the kind of each of the {layers} layers")
    kinds: dict[object, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if not isinstance(kind, str) or kind not in kinds:
            raise _unsupported("attention", f"layers of the type {kind!r}", f"choose a {family.name} model without")
    if "sliding_attention" in types and window is None:
        raise bad_config("layer_types", "sliding_attention", "this model has no sliding window")
    named = tuple(kinds[kind] for kind in types)
    if family.window != "layers" and named != windows:
        raise bad_config("layer_types", "...", f"{family.name} models treat all layers alike")
    return named


def _rope(fields: Fields, max_positions: int) -> RopeSpec:
    """transformers' precedence: ``rope_scaling`` over ``rope_parameters``; theta inside it over theta beside it."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = Fields(_one_rope(key, fields.get(key) or {}), prefix=f"{key}.")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is None:
        theta = 10000.0
    theta = Fields({"rope_theta": theta}).number("rope_theta", 0.0, 1e15)
    if any(f.get("partial_rotary_factor", 1) not in (1, None) for f in (rope, fields)):
        raise _unsupported("rope", "partial_rotary_factor", "choose a model that rotates whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3"):
        raise _unsupported("rope", f"rope scaling of the type {kind!r}", "implemented are default, linear and llama3")
    factor = rope.number("factor", 0.0, 1e6)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    low, high = rope.number("low_freq_factor", 0.0, 1e6), rope.number("high_freq_factor", 0.0, 1e6)
    if low >= high:
        raise bad_config(f"{key}.low_freq_factor", low, f"it must be below high_freq_factor, which is {high}")
    outer = fields.optional_integer("original_max_position_embeddings", 1, 1 << 27)
    original = rope.integer("original_max_position_embeddings", 1, 1 << 27, default=max_positions)
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=outer or original,
    )


def _one_rope(key: str, rope: object) -> Mapping[str, Any]:
    """The rope of all layers; v5 may nest one per layer type, which must then be equal."""
    if not isinstance(rope, Mapping):
        raise bad_config(key, rope, "it must be an object")
    nested = [rope[kind] for kind in ("full_attention", "sliding_attention") if rope.get(kind) is not None]
    if not nested:
        return rope
    if any(one != nested[0] for one in nested):
        raise _unsupported("rope", "a different rope in each type of layer", "choose a model with one rope")
    return _one_rope(key, nested[0])


def _activation(fields: Fields) -> Literal["silu", "gelu_tanh"]:
    name = fields.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise _unsupported("activation", f"the activation {name!r}", f"implemented are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _dtype(config: Mapping[str, Any]) -> Dtype:
    """v5 writes ``dtype``, v4 wrote ``torch_dtype``; transformers' default is float32."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    match str(name).removeprefix("torch."):
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
        case "float16":
            return "float16"
    raise _unsupported("dtype", f"weights stored as {name!r}", "implemented are float32, bfloat16 and float16")


def _unsupported(kind: str, what: str, fix: str) -> ModelFormatError:
    return ModelFormatError(f"unsupported_{kind}", f"The model uses {what}, which this build lacks", fix=fix)
