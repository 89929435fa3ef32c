"""Hugging Face config.json to ModelSpec, for the families this build runs; all others are refused by name.

Defaults of absent keys are those of transformers' configuration classes (v4 keys, and v5's ``rope_parameters``
and ``layer_types``). Nothing is guessed: a value this build does not implement is an error, never ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.base import ModelFormatError, NotFound
from penstock.formats import read_json_object
from penstock.spec.compressed import METHOD, check_compressed
from penstock.spec.families import FAMILIES, Family
from penstock.spec.fields import Fields, bad_config, unsupported
from penstock.spec.model import Activation, Dtype, ModelSpec, MoESpec, RopeSpec
from penstock.spec.rope import read_rope

MAX_WINDOW = 1 << 31
MAX_EXPERTS = 1 << 17
"""In all layers. Kimi K2 has 23,000; each has tensors of its own, whose names are listed before any is read."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
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
        raise NotFound(
            "model_not_found",
            f"{folder} is not a model folder",
            why=why,
            fix="give a Hugging Face folder or a GGUF file",
        )
    return model_spec(read_json_object(path))


def model_spec(config: Mapping[str, Any], also: Collection[str] = ()) -> ModelSpec:
    """Translates a config.json. ``also`` are architectures that are read elsewhere, for the error of an unknown one.

    Raises:
        ModelFormatError: (remote_code) the model wants its own Python code run; (unknown_architecture);
            (unsupported_quantization), (unsupported_rope), (unsupported_activation), (unsupported_dtype),
            (unsupported_attention), (unsupported_value) it needs what this build lacks; (config_invalid) a value is
            missing, of the wrong type, out of range or contradicts another.
    """
    family = _family(config, also)
    fields = Fields(dict(family.defaults) | _text_config(config, family), names=family.names)
    packed = _packed(fields, family)
    if others := {key: only for key, only in family.fixed.items() if fields.get(key, only) != only}:
        said = " and ".join(f"{key} = {repr(fields.get(key))[:80]}" for key in others)
        fix = f"only {' and '.join(f'{key} = {only!r}' for key, only in others.items())} is implemented"
        raise unsupported("value", said, fix)
    heads = fields.integer("num_attention_heads", 1, 1 << 14)
    hidden = fields.integer("hidden_size", 1, 1 << 20)
    head_dim = _head_dim(fields, hidden, heads)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, default=heads if family.mha else None)
    if heads % kv_heads:
        raise bad_config("num_key_value_heads", kv_heads, f"it must divide num_attention_heads, which is {heads}")
    layers = fields.integer("num_hidden_layers", 1, 1 << 12)
    unrotated = _unrotated(fields, layers) if family.name == "smollm3" else ()
    rope, local_rope, max_positions = _positions(fields, family, head_dim)
    eps = "layer_norm_eps" if family.norm == "layer" else "rms_norm_eps"
    return ModelSpec(
        family=family.name,
        vocab_size=fields.integer("vocab_size", 1, 1 << 24),
        hidden=hidden,
        ffn=_ffn(fields, family, hidden),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(fields, family, layers, unrotated),
        max_positions=max_positions,
        norm_eps=fields.number(eps, 0.0, 1.0, default=1e-5 if family.norm == "layer" else 1e-6),
        rope=rope,
        activation=_activation(fields, family),
        qkv_bias=fields.flag_or_key(family.qkv_bias),
        o_bias=fields.flag_or_key(family.o_bias),
        mlp_bias=fields.flag_or_key(family.mlp_bias),
        mlp_gate=family.mlp_gate,
        qk_norm=family.qk_norm,
        tied=fields.flag("tie_word_embeddings", default="tie_word_embeddings" in family.defaults)
        or is_headless(config),
        dtype=_dtype(fields),
        local_rope=local_rope,
        unrotated=unrotated,
        alibi=fields.number("alibi_bias_max", 0.0, 64.0, default=8.0) if family.alibi else None,
        norm=family.norm,
        norm_bias=family.norm_bias,
        embed_norm=family.embed_norm,
        norm_offset=family.norm_offset,
        norm_place=family.norm_place,
        sinks=family.sinks,
        moe=_moe(fields, family, layers, packed),
        **_scales(fields, family, hidden),
    )


def is_headless(config: Mapping[str, Any]) -> bool:
    """Whether a decoder was saved without its head, to make vectors: its architecture is an XModel, no XForCausalLM."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith("Model")


def _family(config: Mapping[str, Any], also: Collection[str]) -> Family:
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
    family = None
    if isinstance(name, str):
        family = FAMILIES.get(name) or FAMILIES.get(name.removesuffix("Model") + "ForCausalLM")
    if family is None:
        raise unknown_architecture(str(name)[:100], [*FAMILIES, *also])
    if model_type is not None and model_type != family.name:
        raise bad_config("model_type", model_type, f"architectures says {name}, whose model_type is {family.name!r}")
    return family


def unknown_architecture(name: str, implemented: Sequence[str]) -> ModelFormatError:
    def likeness(known: str) -> list[float]:
        """As if all versions were one, then as it is."""
        plain = (known.lower(), name.lower())
        masked = (re.sub(r"\d", "#", text) for text in plain)
        return [difflib.SequenceMatcher(None, *pair).ratio() for pair in (masked, plain)]

    nearest = max(reversed(implemented), key=likeness)  # of two equally like it the later version
    return ModelFormatError(
        "unknown_architecture",
        f"Penstock does not implement the architecture {name}",
        why=f"implemented are {', '.join(implemented)}; the nearest by name is {nearest}",
        fix="choose a model of one of these families",
    )


def _text_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if family.inner is not None:
        inner = config.get(family.inner) or {}
        if not isinstance(inner, Mapping):
            raise bad_config(family.inner, inner, "it must be an object")
        return dict(config) | {f"{family.inner}.{key}": value for key, value in inner.items()}
    if family.text_config is None:
        return dict(config)
    inner = config.get(family.text_config)
    if not isinstance(inner, Mapping):
        raise bad_config(family.text_config, inner, "it must be an object: the configuration of the decoder")
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return outer | dict(inner)


def _packed(fields: Fields, family: Family) -> bool:
    """Whether the experts are MXFP4. What compressed-tensors packs, the loader finds by itself."""
    config = fields.get("quantization_config")
    if config is None:
        return False
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if method == METHOD and isinstance(config, Mapping) and family.name != "gpt_oss":
        check_compressed(config)
        return False
    if (family.name, method) != ("gpt_oss", "mxfp4"):
        raise unsupported(
            "quantization",
            f"weights quantized with {str(method)[:80]!r}",
            f"use the unquantized checkpoint, or one of {METHOD}",
        )
    return True


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = fields.integer("head_dim", 1, 1024, default=None if hidden % heads else hidden // heads)
    if head_dim % 2:
        raise bad_config("head_dim", head_dim, "the kernels need an even head_dim")
    return head_dim


def _ffn(fields: Fields, family: Family, hidden: int) -> int:
    if family.name == "mpt":
        return hidden * fields.integer("expansion_ratio", 1, 64, default=4)
    return fields.integer("intermediate_size", 1, 1 << 22, default=4 * hidden if family.name == "bloom" else None)


def _positions(fields: Fields, family: Family, head_dim: int) -> tuple[RopeSpec, RopeSpec | None, int]:
    """As ``read_rope``. Without a rope contexts end where fp32 no longer counts in ones."""
    if family.alibi:
        return RopeSpec(), None, fields.integer("max_position_embeddings", 1, 1 << 24)
    return read_rope(fields, family, head_dim)


def _unrotated(fields: Fields, layers: int) -> tuple[int, ...]:
    """Layers for which ``no_rope_layers`` has a 0; by default each n-th."""
    every = fields.integer("no_rope_layer_interval", 1, 1 << 31)
    rotated = fields.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if not isinstance(rotated, list) or len(rotated) != layers or any(one not in (0, 1) for one in rotated):
        raise bad_config("no_rope_layers", rotated, f"it must have a 0 or 1 for each of the {layers} layers")
    return tuple(i for i, one in enumerate(rotated) if not one)


def _windows(fields: Fields, family: Family, layers: int, unrotated: tuple[int, ...]) -> tuple[int | None, ...]:
    window = None
    if family.window != "none" and not (family.gated and not fields.flag("use_sliding_window", default=False)):
        window = fields.optional_integer("sliding_window", 1, MAX_WINDOW, default=4096 if family.gated else None)
    match family.window:
        case "none":
            sliding = [False] * layers
        case "all":
            sliding = [True] * layers
        case "upper":
            first = fields.integer("max_window_layers", 0, 1 << 31, default=28)
            sliding = [i >= first for i in range(layers)]
        case "even":
            sliding = [i % 2 == 0 for i in range(layers)]
        case "even_lower":
            last = fields.integer("max_window_layers", 0, 1 << 31, default=28)
            sliding = [i % 2 == 0 and i < last for i in range(layers)]
        case "periodic":
            period = fields.integer("sliding_window_pattern", 1, 1 << 31)
            sliding = [(i + 1) % period != 0 for i in range(layers)]
        case "unrotated":
            sliding = [i in unrotated for i in range(layers)]
    windows = tuple(window if slides else None for slides in sliding)
    types = fields.get("layer_types")
    return windows if types is None else _layer_types(types, family, window, windows)


def _layer_types(
    types: object, family: Family, window: int | None, windows: tuple[int | None, ...]
) -> tuple[int | None, ...]:
    """What ``layer_types`` says, where it may differ from the family's own pattern."""
    if not isinstance(types, list) or len(types) != len(windows):
        raise bad_config("layer_types", types, f"it must list the kind of each of the {len(windows)} layers")
    kinds: dict[object, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if not isinstance(kind, str) or kind not in kinds:
            raise unsupported("attention", f"layers of the type {kind!r}", f"choose a {family.name} model without")
    if "sliding_attention" in types and window is None:
        raise bad_config("layer_types", "sliding_attention", "this model has no sliding window")
    named = tuple(kinds[kind] for kind in types)
    if family.window in ("none", "all") and named != windows:
        raise bad_config("layer_types", "...", f"{family.name} models treat all layers alike")
    return named


def _activation(fields: Fields, family: Family) -> Activation:
    name = fields.get(family.activation, family.defaults.get(family.activation, "silu"))
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unsupported(
            "activation", f"the activation {str(name)[:80]!r}", f"implemented are {', '.join(ACTIVATIONS)}"
        )
    if family.name == "gpt_oss":  # its code never asks
        return "swiglu_clamped"
    if family.name == "gemma" and name == "gelu":  # as published, and not what was trained
        return "gelu_tanh"
    return ACTIVATIONS[name]


def _scales(fields: Fields, family: Family, hidden: int) -> dict[str, Any]:
    """Factors and caps of a ModelSpec, where the family has them."""
    if family.name == "granite":
        return {
            "attn_scale": fields.number("attention_multiplier", 0.0, 1e6),
            "embed_scale": fields.number("embedding_multiplier", 0.0, 1e6, default=1.0),
            "residual_scale": fields.number("residual_multiplier", 0.0, 1e6, default=1.0),
            "logit_scale": 1.0 / fields.number("logits_scaling", 0.0, 1e6, default=1.0),
        }
    if family.name == "mpt" and fields.get("attn_scale") is not None:
        return {"attn_scale": fields.number("attn_scale", 0.0, 1e6)}
    scales: dict[str, Any] = {"embed_scale": hidden**0.5} if family.scaled_embedding else {}
    if family.norm_place == "both":  # Gemma 2 and 3
        scales["attn_scale"] = fields.number("query_pre_attn_scalar", 0.0, 1e6) ** -0.5
        for ours, key in (("attn_softcap", "attn_logit_softcapping"), ("logit_softcap", "final_logit_softcapping")):
            if fields.get(key) is not None:
                scales[ours] = fields.number(key, 0.0, 1e6)
    return scales


def _moe(fields: Fields, family: Family, layers: int, packed: bool) -> MoESpec | None:
    if family.expert_width is None:
        return None
    count = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    experts = fields.integer(count, 1, MAX_EXPERTS)
    if experts * layers > MAX_EXPERTS:
        raise bad_config(count, experts, f"it makes more than {MAX_EXPERTS} experts in {layers} layers")
    dense, step = fields.get("mlp_only_layers", []), fields.integer("decoder_sparse_step", 1, 1 << 12, default=1)
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise bad_config("mlp_only_layers", dense, "it must be a list of layers")
    gpt_oss = family.name == "gpt_oss"
    return MoESpec(
        experts=experts,
        active=fields.integer("num_experts_per_tok", 1, experts),
        ffn=fields.integer(family.expert_width, 1, 1 << 22),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        normalize=fields.flag_or_key(family.normalized_router),
        router_bias=gpt_oss,
        bias=gpt_oss,
        shared_ffn=fields.integer("shared_expert_intermediate_size", 1, 1 << 22) if family.name == "qwen2_moe" else 0,
        packed=packed,
    )


def _dtype(fields: Fields) -> Dtype:
    """v5 writes ``dtype``, v4 wrote ``torch_dtype``; transformers' default is float32."""
    name = fields.get("torch_dtype") or fields.get("dtype") or "float32"
    match str(name).removeprefix("torch."):
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
        case "float16":
            return "float16"
    raise unsupported("dtype", f"weights stored as {str(name)[:80]!r}", "implemented are float32, bfloat16 and float16")
