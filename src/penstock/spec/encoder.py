"""EncoderSpec: BERT and its kin (Devlin et al. 2018; Liu et al. 2019), their config.json and their tensors.

Defaults of absent keys are those of transformers' configuration classes. Nothing is guessed: a value this build does
not implement is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from penstock.base import ModelFormatError
from penstock.formats import read_json_object
from penstock.spec.fields import Fields, bad_config, unsupported
from penstock.spec.gguf import read_gguf_spec
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.model import DTYPE_BYTES, Activation, Dtype, ModelSpec
from penstock.spec.tensors import Shape

EncoderFamily = Literal["bert", "roberta", "xlm-roberta"]
ENCODERS: dict[EncoderFamily, str] = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""model_type -> what the names of the architectures begin with."""
PARTS = ("Model", "ForMaskedLM", "ForSequenceClassification")
"""What they end with. A language modelling head is left aside."""
ARCHITECTURES = tuple(start + end for start in ENCODERS.values() for end in PARTS)
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A bidirectional transformer with norms after each block.

    Attributes:
        max_positions: tokens of the longest text.
        pad_id: RoBERTa's positions count from ``pad_id`` + 1 and pass over pad tokens; -1 for BERT, which counts all
            tokens from 0.
        token_types: rows of the table that tells the parts of a pair from each other.
        labels: outputs of the classifier on the first token; 0 if there is none.
        dtype: of the weights as stored.
    """

    family: EncoderFamily
    vocab_size: int
    hidden: int
    ffn: int
    heads: int
    layers: int
    max_positions: int
    pad_id: int = -1
    token_types: int = 1
    norm_eps: float = 1e-12
    activation: Activation = "gelu"
    labels: int = 0
    dtype: Dtype = "float32"


def read_any_spec(folder: Path) -> ModelSpec | EncoderSpec:
    """The spec of a folder's config.json, or of a GGUF file. Raises as ``read_model_spec`` or ``read_gguf_spec``."""
    if folder.is_file():
        return read_gguf_spec(folder)
    path = folder / "config.json"
    if not path.is_file():
        return read_model_spec(folder)  # says why not
    config = read_json_object(path)
    return encoder_spec(config) if is_encoder(config) else model_spec(config, ARCHITECTURES)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json means one of ``ENCODERS``."""
    return _architecture(config) is not None


def encoder_spec(config: Mapping[str, Any]) -> EncoderSpec:
    """Translates a config.json that ``is_encoder``.

    Raises:
        ModelFormatError: (remote_code); (unsupported_quantization), (unsupported_activation), (unsupported_dtype),
            (unsupported_positions), (unsupported_attention) it needs what this build lacks; (config_invalid).
    """
    architecture = _architecture(config)
    assert architecture is not None
    family, part = architecture
    if config.get("model_type", family) != family:
        raise bad_config("model_type", config["model_type"], f"that of a {ENCODERS[family]}{part} is {family!r}")
    _refuse(config)
    fields = Fields(config)
    heads, hidden = fields.integer("num_attention_heads", 1, 1 << 14), fields.integer("hidden_size", 1, 1 << 20)
    if hidden % heads:
        raise bad_config("hidden_size", hidden, f"it must be a multiple of num_attention_heads, which is {heads}")
    vocab_size, pad_id = fields.integer("vocab_size", 1, 1 << 24), -1
    if family != "bert":
        pad_id = fields.integer("pad_token_id", 0, vocab_size - 1, default=1)
    rows = fields.integer("max_position_embeddings", pad_id + 2, 1 << 27, default=512)
    return EncoderSpec(
        family=family,
        vocab_size=vocab_size,
        hidden=hidden,
        ffn=fields.integer("intermediate_size", 1, 1 << 22),
        heads=heads,
        layers=fields.integer("num_hidden_layers", 1, 1 << 12),
        max_positions=rows - pad_id - 1,
        pad_id=pad_id,
        token_types=fields.integer("type_vocab_size", 1, 1 << 16, default=2),
        norm_eps=fields.number("layer_norm_eps", 0.0, 1.0, default=1e-12),
        activation=ACTIVATIONS[config.get("hidden_act") or "gelu"],
        labels=_labels(fields) if part == "ForSequenceClassification" else 0,
        dtype=DTYPES[_dtype_name(config)],
    )


def encoder_tensors(spec: EncoderSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor, without the model's prefix ("bert.", "roberta."); linears are [out, in]."""
    tables = {
        "word": spec.vocab_size,
        "position": spec.max_positions + spec.pad_id + 1,
        "token_type": spec.token_types,
    }
    shapes: dict[str, Shape] = {
        f"embeddings.{name}_embeddings.weight": (rows, spec.hidden) for name, rows in tables.items()
    }
    shapes |= _affine("embeddings.LayerNorm", spec.hidden)
    for layer in range(spec.layers):
        prefix = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            shapes |= _affine(f"{prefix}attention.self.{name}", spec.hidden, spec.hidden)
        shapes |= _affine(prefix + "attention.output.dense", spec.hidden, spec.hidden)
        shapes |= _affine(prefix + "attention.output.LayerNorm", spec.hidden)
        shapes |= _affine(prefix + "intermediate.dense", spec.ffn, spec.hidden)
        shapes |= _affine(prefix + "output.dense", spec.hidden, spec.ffn)
        shapes |= _affine(prefix + "output.LayerNorm", spec.hidden)
    if spec.labels:
        dense, out = classifier_names(spec)
        shapes |= _affine(dense, spec.hidden, spec.hidden) | _affine(out, spec.labels, spec.hidden)
    return shapes


def classifier_names(spec: EncoderSpec) -> tuple[str, str]:
    """The two linears of the classifier: BERT's first one is its pooler."""
    if spec.family == "bert":
        return "pooler.dense", "classifier"
    return "classifier.dense", "classifier.out_proj"


def encoder_parameters(spec: EncoderSpec) -> int:
    return sum(map(prod, encoder_tensors(spec).values()))


def encoder_weight_bytes(spec: EncoderSpec, dtype: Dtype) -> int:
    return encoder_parameters(spec) * DTYPE_BYTES[dtype]


def encoder_activation_bytes(spec: EncoderSpec, tokens: int, dtype: Dtype) -> int:
    """Peak of one step of ``tokens`` rows: what enters and leaves the widest layer, in fp32 and as stored."""
    row = 2 * spec.hidden * DTYPE_BYTES[dtype] + max(4 * spec.hidden, 2 * spec.ffn) * (4 + DTYPE_BYTES[dtype])
    return tokens * row


def _affine(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _architecture(config: Mapping[str, Any]) -> tuple[EncoderFamily, str] | None:
    names, model_type = config.get("architectures"), config.get("model_type")
    for family, start in ENCODERS.items():
        if names is None and model_type == family:
            return family, PARTS[0]
        for part in PARTS:
            if isinstance(names, list) and names[:1] == [start + part]:
                return family, part
    return None


def _refuse(config: Mapping[str, Any]) -> None:
    """What would need code that is not here."""
    if config.get("auto_map"):
        raise ModelFormatError(
            "remote_code",
            "The model brings its own Python code, and Penstock never runs code from a model folder",
            why=f"config.json has auto_map {str(config['auto_map'])[:200]}",
            fix="use a checkpoint converted without auto_map",
        )
    if config.get("quantization_config") is not None:
        raise unsupported("quantization", "quantized weights", "use the unquantized checkpoint")
    if (kind := config.get("position_embedding_type", "absolute")) not in ("absolute", None):
        raise unsupported("positions", f"position embeddings of the type {kind!r}", "only absolute ones are here")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise unsupported("attention", "a BERT that decodes", "choose one that only encodes")
    activation = config.get("hidden_act") or "gelu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise unsupported("activation", f"the activation {activation!r}", f"implemented are {', '.join(ACTIVATIONS)}")
    if (dtype := _dtype_name(config)) not in DTYPES:
        raise unsupported("dtype", f"weights stored as {dtype!r}", f"implemented are {', '.join(DTYPES)}")


def _dtype_name(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _labels(fields: Fields) -> int:
    names = fields.get("id2label")
    if names is None:
        return fields.integer("num_labels", 1, 1 << 16, default=2)
    if not isinstance(names, Mapping) or not names:
        raise bad_config("id2label", names, "it must name at least one label")
    return len(names)
