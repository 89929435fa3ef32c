"""``penstock show``: what a model is, and how much of it fits on this machine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from penstock.base import ConfigError
from penstock.cli.complete import complete_model
from penstock.cli.exits import as_dict, emit
from penstock.cli.options import MODEL_HELP, engine_options
from penstock.cli.terminal import human, size
from penstock.spec import Dtype, EncoderSpec, EngineConfig, ModelSpec
from penstock.spec.encoder import encoder_parameters, encoder_weight_bytes, read_any_spec
from penstock.spec.pooling import read_pooling
from penstock.spec.sizing import (
    activation_bytes,
    active_parameters,
    kv_block_bytes,
    kv_bytes_per_token,
    kv_dtype_of,
    kv_request_blocks,
    kv_request_bytes,
    parameters,
    weight_bytes,
)

if TYPE_CHECKING:
    from penstock.formats import Checkpoint


@engine_options
def show(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    engine: dict[str, Any],
) -> None:
    """Show what MODEL is, and which context and how many requests fit here."""
    config = EngineConfig(model=model, **engine)
    folder, absent = outline(model)
    facts = describe(folder, absent)
    if as_json:
        emit(json.dumps(facts | {"here": fit(folder, config, absent)}))
        return
    _print(facts)
    emit("")
    _print_fit(fit(folder, config, absent))  # torch is loaded only here


def outline(model: str | None) -> tuple[Path, dict[str, int]]:
    """As ``find_model``, but weights are not downloaded.

    Returns:
        The folder; and where weight files are absent, the bytes of each one, those that are there included.
    """
    from penstock.formats import weight_files
    from penstock.spec.location import locate

    place = locate(model)
    if isinstance(place, Path):
        return place, {}
    from penstock.hub import fetch, file_sizes

    folder = fetch(place, weights=False)
    names = weight_files(folder)
    if all((folder / name).exists() for name in names):
        return folder, {}
    sizes = file_sizes(place)
    return folder, {name: sizes[name] for name in names if name in sizes}


def describe(folder: Path, absent: Mapping[str, int]) -> dict[str, Any]:
    """What the files of a model folder say. Reads headers only, and needs no torch.

    Args:
        absent: bytes of the weight files, if they are still on the hub.

    Raises:
        NotFound, ModelFormatError: the folder is not a model, is damaged, or is of a kind this build does not run.
    """
    from penstock.formats import open_checkpoint
    from penstock.text import load_chat_template, load_tokenizer

    spec = read_any_spec(folder)
    stored = _on_the_hub(absent) if absent else weights(open_checkpoint(folder))
    pooling = read_pooling(folder, spec)
    tokenizer = load_tokenizer(folder, spec.vocab_size)
    vocabulary = tokenizer.vocabulary
    return {
        "path": str(folder),
        "family": spec.family,
        "architecture": architecture(spec),
        "parameters": _parameters(spec),
        "weights": stored,
        "context": pooling.max_length or spec.max_positions if isinstance(spec, EncoderSpec) else spec.max_positions,
        "kv_bytes_per_token": 0 if isinstance(spec, EncoderSpec) else kv_bytes_per_token(spec, spec.dtype),
        "tokenizer": {
            "vocabulary": vocabulary.size,
            "special_tokens": len(tokenizer.special_tokens),
            "bos": None if vocabulary.bos_id is None else tokenizer.token_text(vocabulary.bos_id),
            "eos": [tokenizer.token_text(token) for token in sorted(vocabulary.eos_ids)],
        },
        "chat_template": load_chat_template(folder) is not None,
        "generates": not isinstance(spec, EncoderSpec) and not pooling.headless,
        "pooling": asdict(pooling),
    }


def _parameters(spec: ModelSpec | EncoderSpec) -> dict[str, int]:
    if isinstance(spec, EncoderSpec):
        return {"total": encoder_parameters(spec), "active": encoder_parameters(spec)}
    return {"total": parameters(spec), "active": active_parameters(spec)}


def architecture(spec: ModelSpec | EncoderSpec) -> dict[str, Any]:
    """What a spec says beyond its defaults; windows as width -> number of layers."""
    own = {name: value for name, value in _said(spec).items() if name not in ("family", "max_positions")}
    if isinstance(spec, ModelSpec):
        own["windows"] = Counter("all" if window is None else f"{window}" for window in spec.windows)
    return {"layers": spec.layers} | own


def _said(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, in dataclasses within it as well."""
    said = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return {name: _said(inner) if is_dataclass(inner) else inner for name, inner in said.items()}


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the weight files hold: bytes by dtype, as the files name them."""
    count: Counter[str] = Counter()
    for entry in (entry for file in checkpoint.files for entry in file.tensors.values()):
        count[entry.dtype] += entry.end - entry.start
    by_dtype = dict(sorted(count.items()))
    here = {"files": len(checkpoint.files), "bytes": sum(by_dtype.values()), "bytes_by_dtype": by_dtype}
    return here | {"downloaded": True}


def _on_the_hub(sizes: Mapping[str, int]) -> dict[str, Any]:
    """As ``weights``, of files whose headers cannot be read yet."""
    return {"files": len(sizes), "bytes": sum(sizes.values()), "bytes_by_dtype": {}, "downloaded": False}


def fit(folder: Path, config: EngineConfig, absent: Mapping[str, int]) -> dict[str, Any]:
    """What an engine would make of this machine now. Loads torch, but no weights.

    Args:
        absent: as for ``describe``.

    Raises:
        ModelFormatError: the weight files are not those of config.json.
        ConfigError: the configuration cannot run here.
    """
    import torch

    from penstock.assemble import as_stored, is_packed, resolve_here
    from penstock.formats import open_checkpoint
    from penstock.kernels import make_ops
    from penstock.models import Placement
    from penstock.models.weights import open_tensors
    from penstock.runtime.fit import fit
    from penstock.runtime.memory import free_memory, plan_pools

    spec = read_any_spec(folder)
    config = resolve_here(config, spec)
    ops = make_ops(config.backend)
    config = as_stored(config, folder, ops)
    device, dtype = torch.device(config.device), cast(Dtype, config.dtype)
    if isinstance(spec, EncoderSpec):
        needed = encoder_weight_bytes(spec, dtype)
    else:
        needed = weight_bytes(spec, dtype, config.quant)
        if not absent:
            open_tensors(open_checkpoint(folder), spec, Placement(getattr(torch, dtype), device))
    free = free_memory(device)
    facts: dict[str, Any] = {name: getattr(config, name) for name in ("device", "backend", "dtype")} | {
        "one_answer": ops.one_answer,
        "kv_dtype": None if isinstance(spec, EncoderSpec) else kv_dtype_of(config, dtype),
        "free_bytes": free,
        "weight_bytes": needed,
        "fits": None,
    }
    try:
        config = fit(spec, config, dtype, device, packed=is_packed(config, folder, ops))
        if isinstance(spec, EncoderSpec):
            return facts | {"fits": True, "context": config.max_model_len or spec.max_positions}
        pools = plan_pools(spec, config, dtype, device, reserved=needed)
    except ConfigError as error:
        return facts | {"fits": False, "why": as_dict(error)}
    length = config.max_model_len or spec.max_positions
    size, groups, stored = config.block_size, spec.kv_groups(), facts["kv_dtype"]
    working = activation_bytes(spec, config.max_num_batched_tokens, config.max_num_seqs, dtype)
    return facts | {
        "fits": True,
        "context": length,
        "kv_pool_bytes": sum(
            pool.blocks * kv_block_bytes(group, size, stored) for group, pool in zip(groups, pools, strict=True)
        ),
        "requests": min(
            pool.blocks // kv_request_blocks(group, length, size) for group, pool in zip(groups, pools, strict=True)
        ),
        "requests_in_all_memory": max(0, free - needed - working) // kv_request_bytes(spec, length, size, stored),
    }


def _print(facts: Mapping[str, Any]) -> None:
    numbers, total, active = facts["architecture"], facts["parameters"]["total"], facts["parameters"]["active"]
    stored = facts["weights"]
    tokenizer = facts["tokenizer"]
    rest = {k: v for k, v in numbers.items() if k not in _SHAPE}
    rows = {
        "family": facts["family"],
        "shape": ", ".join(f"{name} {numbers[name]}" for name in _SHAPE if name in numbers),
        "also": ", ".join(f"{name} {_brief(value)}" for name, value in rest.items() if name != "windows"),
        "attention": ", ".join(
            f"{'whole context' if window == 'all' else f'window of {window}'} in {layers} of {numbers['layers']} layers"
            for window, layers in numbers.get("windows", {}).items()
        ),
        "parameters": human(total) + (f", of which a token uses {human(active)}" if active != total else ""),
        "weights": f"{size(stored['bytes'])} in {stored['files']} file{'s' * (stored['files'] > 1)}"
        + ("" if stored["downloaded"] else ", not downloaded")
        + "".join(f"; {dtype} {size(count)}" for dtype, count in stored["bytes_by_dtype"].items()),
        "context": f"{facts['context']} tokens",
        "KV": f"{size(facts['kv_bytes_per_token'])} per token" if facts["kv_bytes_per_token"] else "none: an encoder",
        "tokenizer": f"{tokenizer['vocabulary']} tokens, {tokenizer['special_tokens']} of them special;"
        f" ends at {', '.join(tokenizer['eos']) or 'none'}",
        "chat template": "yes" if facts["chat_template"] else "no",
        "vectors": _vectors(facts["pooling"]) + ("" if facts["generates"] else "; it does not generate"),
        "path": facts["path"],
    }
    _print_rows(rows)


def _vectors(pooling: Mapping[str, Any]) -> str:
    if pooling["classifier"]:
        return "scores of pairs (a cross-encoder)"
    return f"pooled by {pooling['pooling']}" + (", of length 1" if pooling["normalize"] else "")


_SHAPE = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab_size")


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_brief(inner)}" for name, inner in value.items()) + ")"
    if isinstance(value, tuple) and set(value) <= {True, False}:
        return f"{sum(value)} of {len(value)}"
    return str(value)


def _print_fit(facts: Mapping[str, Any]) -> None:
    promise = "one answer" if facts["one_answer"] else "does not promise one answer"
    rows = {
        "here": f"{facts['device']}, {facts['dtype']}, kernels {facts['backend']} ({promise})",
        "memory": f"{size(facts['free_bytes'])} free, weights take {size(facts['weight_bytes'])}",
    }
    if facts["fits"] and "requests" in facts:
        rows["fits"] = (
            f"{facts['requests']} requests of {facts['context']} tokens in a KV pool of {size(facts['kv_pool_bytes'])}"
            f"{'' if facts['kv_dtype'] == facts['dtype'] else ' in ' + facts['kv_dtype']};"
            f" {facts['requests_in_all_memory']} if the pool took all that is free"
        )
    else:
        rows["fits"] = f"texts of {facts['context']} tokens" if facts["fits"] else f"no: {facts['why']['why']}"
    _print_rows(rows)


def _print_rows(rows: Mapping[str, str]) -> None:
    for name, value in rows.items():
        if value:
            emit(f"{name:14}{value}")
