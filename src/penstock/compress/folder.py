"""A model folder of small integers in the format of compressed-tensors, beside the model it is made of.

A folder appears under its name when all of it is on the disk: it is written beside that and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.base import InvalidRequest
from penstock.formats import Checkpoint, open_checkpoint, read_json_object, tensor_bytes, write_safetensors
from penstock.models import Placement
from penstock.models.compressed import Form, part_of
from penstock.models.tensors import Tensors
from penstock.models.weights import open_tensors
from penstock.quant import quantize, to_tensors
from penstock.spec import ModelSpec
from penstock.spec.compressed import compressed_config
from penstock.spec.quantization import OUTER, Quantization, WeightFormat, format_of
from penstock.spec.tensors import layer_slots, model_slots, names_of

SHARD_BYTES = 4_000_000_000
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Endings of files that are not copied."""
Header = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of a model: ``format_of`` on load, and the same here.

    Attributes:
        group: inputs that share a scale; on load they are 32.
        plain: slots that stay numbers.
    """

    quantization: Quantization
    group: int = 32
    plain: tuple[str, ...] = ()

    def of(self, spec: ModelSpec, slot: str, inputs: int) -> WeightFormat | None:
        found = None if slot in self.plain else format_of(spec, slot, inputs, self.quantization)
        return None if found is None or inputs % self.group else WeightFormat(found.bits, self.group)


def write_quantized(source: Path, out: Path, spec: ModelSpec, recipe: Recipe) -> tuple[int, int]:
    """Writes the folder, one tensor at a time in memory.

    Returns:
        The bytes of all tensors before and after.

    Raises:
        InvalidRequest: (output_exists) there is something at ``out``; (quantize_unsupported) the model is a file, is
            quantized already, or keeps its experts in stacks.
        ModelFormatError: as ``load_decoder``.
    """
    if out.exists():
        raise InvalidRequest(
            "output_exists", f"There is already something at {out}", fix="give a path that is not there"
        )
    if source.is_file():
        raise _unsupported(f"{source.name} is a file", "give the folder it was made of")
    tensors = open_tensors(open_checkpoint(source), spec, Placement(getattr(torch, spec.dtype), torch.device("cpu")))
    if names_of(spec).stacked or not isinstance(tensors, Tensors):
        what = "experts in stacks" if names_of(spec).stacked else "integers already"
        raise _unsupported(f"its weights are {what}", "give a checkpoint of plain matrices")
    formats = _formats(spec, recipe)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        _copy_files(source, part)
        after = _write_weights(part, tensors, formats, tied=spec.tied)
        config = read_json_object(source / "config.json")
        config["quantization_config"] = _config(tensors, formats, spec, recipe)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return _bytes(open_checkpoint(source)), after


def _unsupported(why: str, fix: str) -> InvalidRequest:
    return InvalidRequest("quantize_unsupported", "This model cannot be quantized to a folder", why=why, fix=fix)


def _formats(spec: ModelSpec, recipe: Recipe) -> dict[str, WeightFormat]:
    """Of the tensors that become integers."""
    every = (model_slots(spec), *(layer_slots(spec, layer) for layer in range(spec.layers)))
    named = (
        (name, slot, shape)
        for slots in every
        for slot, tensors in slots.items()
        for name, shape in tensors.items()
        if len(shape) == 2
    )
    return {name: found for name, slot, shape in named if (found := recipe.of(spec, slot, shape[1]))}


def _copy_files(source: Path, part: Path) -> None:
    """Everything but weights and what speaks of them."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.is_file() and not path.name.endswith(WEIGHTS) and not any(p.startswith(".") for p in inside.parts):
            (part / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part / inside)
    (part / "config.json").unlink()  # comes last: a folder without it is no model


def _write_weights(part: Path, tensors: Tensors, formats: Mapping[str, WeightFormat], *, tied: bool) -> int:
    """Shards with an index, or one file."""
    plan = _plan(tensors, formats, tied)
    shards: list[dict[str, Header]] = [{}]
    held = 0
    for stored, header in plan.items():
        size = sum(tensor_bytes(*entry) for entry in header.values())
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][stored] = header
        held += size
    total, weight_map = 0, dict[str, str]()
    for index, shard in enumerate(shards):
        whole = {name: entry for header in shard.values() for name, entry in header.items()}
        several = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        write_safetensors(part / file, whole, _data(tensors, formats, shard))
        weight_map |= dict.fromkeys(whole, file)
        total += sum(tensor_bytes(*entry) for entry in whole.values())
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", "utf-8")
    return total


def _plan(tensors: Tensors, formats: Mapping[str, WeightFormat], tied: bool) -> dict[str, Header]:
    """What is written for each tensor of the checkpoint, by its name there. What the decoder does not use is kept, but
    for a tied head: it would not be the embedding any more."""
    plan = dict[str, Header]()
    for name, stored in _named(tensors):
        entry = tensors.checkpoint.entry(stored)
        if found := formats.get(name):
            form = Form(found.bits, entry.shape[1] // found.group, entry.shape, packed=True, zeros=found.bits == 4)
            plan[stored] = {
                part_of(stored, part): (dtype or "F16", shape) for part, (shape, dtype) in form.parts().items()
            }
        elif not (tied and stored.endswith("lm_head.weight")):
            plan[stored] = {stored: (entry.dtype, entry.shape)}
    return plan


def _data(
    tensors: Tensors, formats: Mapping[str, WeightFormat], shard: Mapping[str, Header]
) -> Iterator[memoryview | bytes]:
    names = {stored: name for name, stored in _named(tensors)}
    for stored, header in shard.items():
        if found := formats.get(names[stored]):
            parts = to_tensors(quantize(tensors.fuse(names[stored], exact=True), found.bits, found.group))
            made = {part_of(stored, part): tensor for part, tensor in parts.items()}
            yield from (made[name].flatten().view(torch.uint8).numpy().tobytes() for name in header)
        else:
            yield tensors.checkpoint.view(stored)
            tensors.checkpoint.release(stored)


def _named(tensors: Tensors) -> list[tuple[str, str]]:
    """The model's name, or "" where it has none, and the checkpoint's, in the order of the latter."""
    ours = {stored: name for name, stored in tensors.stored_as.items()}
    return [(ours.get(stored, ""), stored) for stored in sorted(tensors.checkpoint.names)]


def _config(tensors: Tensors, formats: Mapping[str, WeightFormat], spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    embedding = model_slots(spec)["embedding"]
    outside = {name for slot, named in model_slots(spec).items() if slot in OUTER for name in named}
    modules = {name: part_of(stored, "").removesuffix(".") for name, stored in tensors.stored_as.items()}
    matrices = [name for name, stored in tensors.stored_as.items() if len(tensors.checkpoint.entry(stored).shape) == 2]
    kept = [modules[name] for name in matrices if name not in formats and name not in embedding]
    if spec.tied:
        kept.append("lm_head")
    integers = [name for name in matrices if name in outside & formats.keys()]
    # The embedding goes by its class: that is how vLLM finds it.
    outer = ["Embedding" if name in embedding else modules[name] for name in integers]
    return compressed_config(recipe.quantization, recipe.group, outer, sorted(kept))


def _bytes(checkpoint: Checkpoint) -> int:
    entries = map(checkpoint.entry, checkpoint.names)
    return sum(entry.end - entry.start for entry in entries)
