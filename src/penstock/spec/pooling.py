"""PoolingSpec: how a model folder wants its vectors made, as sentence-transformers writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from penstock.base import InvalidRequest, ModelFormatError
from penstock.formats import parse_json_object, read_gguf, read_json_object
from penstock.spec.encoder import EncoderSpec
from penstock.spec.fields import Fields, bad_config
from penstock.spec.hf import is_headless
from penstock.spec.model import ModelSpec

Pooling = Literal["mean", "last", "cls"]

MODES: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
"""sentence-transformers' names of the modes that are implemented."""
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken", "pooling_mode_cls_token": "cls"}
"""The flags that mean them in most files; a new file may have ``pooling_mode``."""
MAX_MODULES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """Attributes:
    pooling: which hidden states make the vector.
    normalize: vectors get length 1.
    max_length: tokens of a text that the model was made for, None if the folder does not say.
    lower: texts are put into lower case first.
    classifier: the vector holds the logits of a classifier (a cross-encoder), not an embedding.
    sigmoid: the score of a pair is the sigmoid of its logit, not the logit.
    headless: a decoder without an output layer, which cannot generate.
    embedder: the model was made to make vectors, as far as its folder says.
    """

    pooling: Pooling
    normalize: bool = True
    max_length: int | None = None
    lower: bool = False
    classifier: bool = False
    sigmoid: bool = True
    headless: bool = False
    embedder: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How a vector is wanted. Names and meaning are vLLM's; None is what the model's folder says.

    Attributes:
        dimensions: keep this many leading numbers of an embedding (Matryoshka models are trained for it).
        normalize: give an embedding length 1, after the cut.
        use_activation: a cross-encoder's score is the sigmoid of its logit; a likelihood is a probability, not its
            logarithm.
        truncate_prompt_tokens: shorten longer prompts to this many tokens, those that end a text included; -1 means as
            many as the model holds.

    Raises:
        InvalidRequest: (invalid_parameter).
    """

    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("dimensions", 1), ("truncate_prompt_tokens", -1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low or value == 0):
                raise _invalid(name, value, "it must be a positive integer" + (" or -1" if low < 0 else ""))
        for name in ("normalize", "use_activation"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise _invalid(name, value, "it must be true, false or None")


def _invalid(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{name} = {repr(value)[:60]} cannot be used", why=why)


def read_pooling(folder: Path, spec: ModelSpec | EncoderSpec) -> PoolingSpec:
    """How a folder's model pools: by its modules.json and what that names; without one, encoders by the mean and
    decoders by the last token, normalized. Prompts that it may name are left to the caller.

    Raises:
        ModelFormatError: (unsupported_pooling) a module or mode that is not implemented; (config_invalid),
            (file_missing), (json_invalid).
    """
    if folder.is_file():  # a GGUF file, of a decoder
        return PoolingSpec(
            pooling="last", embedder=any(k.endswith(".pooling_type") for k in read_gguf(folder).metadata)
        )
    config = read_json_object(folder / "config.json")
    bert = folder / "sentence_bert_config.json"
    fields = Fields(read_json_object(bert) if bert.exists() else {}, f"{bert.name}: ")
    headless, modules = isinstance(spec, ModelSpec) and is_headless(config), (folder / "modules.json").exists()
    found = PoolingSpec(
        pooling="mean" if isinstance(spec, EncoderSpec) else "last",
        max_length=fields.optional_integer("max_seq_length", 1, 1 << 27),
        lower=fields.flag("do_lower_case", default=False),
        headless=headless,
        embedder=headless or modules or isinstance(spec, EncoderSpec),
    )
    if isinstance(spec, EncoderSpec) and spec.labels:
        return replace(found, pooling="cls", normalize=False, classifier=True, sigmoid=_sigmoid(config))
    if not modules:
        return found
    kinds = _modules(folder)
    if "Pooling" in kinds:
        found = replace(found, pooling=_pooling(read_json_object(folder / kinds["Pooling"] / "config.json")))
        if found.pooling == "cls" and isinstance(spec, ModelSpec):
            raise _unsupported("the first token of a decoder, which sees nothing else", "the mean and the last token")
    return replace(found, normalize="Normalize" in kinds)


def _sigmoid(config: Mapping[str, Any]) -> bool:
    """sentence-transformers writes a cross-encoder's activation into config.json, by the name of its class."""
    newer = config.get("sentence_transformers")
    name = newer.get("activation_fn") if isinstance(newer, Mapping) else None
    name = str(name or config.get("sbert_ce_default_activation_function") or "Sigmoid").rsplit(".", 1)[-1]
    if name not in ("Sigmoid", "Identity"):
        raise _unsupported(f"the activation {name!r}", "Sigmoid and Identity")
    return name == "Sigmoid"


def _modules(folder: Path) -> dict[str, str]:
    """Kind -> folder of each step after the transformer, in order Pooling, Normalize; both may be absent."""
    with (folder / "modules.json").open("rb") as file:
        data = file.read(MAX_MODULES_BYTES)
    modules = parse_json_object(b'{"modules":' + data + b"}", "modules.json")["modules"]
    if not isinstance(modules, list) or not all(isinstance(module, Mapping) for module in modules):
        raise bad_config("modules.json", modules, "it must list objects")
    kinds: dict[str, str] = {}
    for module in modules:
        kind, path = str(module.get("type")).rsplit(".", 1)[-1], module.get("path", "")
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise _unsupported(f"the module {kind!r}", "Transformer, Pooling and Normalize")
        if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise bad_config("modules.json: path", path, "it must be a folder inside the model's")
        kinds[kind] = path
    return kinds


def _pooling(config: Mapping[str, Any]) -> Pooling:
    """The one mode that is on; several would be concatenated."""
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [
            FLAGS.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is not False
        ]
    elif isinstance(modes, str):
        modes = [modes]
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in MODES:
        raise _unsupported(f"pooling by {str(modes)[:200]}", f"one of {', '.join(MODES)}")
    if config.get("include_prompt") is False:
        raise _unsupported("pooling that leaves the prompt out", "pooling of all tokens")
    return MODES[modes[0]]


def _unsupported(what: str, known: str) -> ModelFormatError:
    return ModelFormatError(
        "unsupported_pooling",
        f"The model uses {what}, which this build lacks",
        why=f"implemented: {known}",
        fix="choose another model",
    )
