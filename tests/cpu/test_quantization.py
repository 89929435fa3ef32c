"""Models with weights as small integers: what they take, what they cost in answers, and that backends agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

from oracle import CPU, paged_logits
from penstock import LLM
from penstock.base import ConfigError
from penstock.compress import Recipe, write_quantized
from penstock.formats import open_checkpoint
from penstock.kernels import GroupedWeight, Ops, PackedWeight, Weight, make_ops, native
from penstock.layers import Packing, Read
from penstock.models import Decoder, Placement, load_decoder, numerics_id
from penstock.models.weights import open_tensors
from penstock.quant import quantize
from penstock.spec import EngineConfig, ModelSpec
from penstock.spec.encoder import read_any_spec
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.quantization import Quantization, check_formats
from penstock.spec.sizing import weight_bytes
from penstock.spec.tensors import checkpoint_tensors
from penstock.text import load_tokenizer
from small_gguf import small
from small_model import CONFIG, write_model
from test_kv_dtype import TEXT

SPEC = read_model_spec(BUNDLED)
PLACEMENT = Placement(torch.float32, CPU)
BACKENDS = ["ref", *(["cpu"] if native() else []), "torch"]
KL_BOUND: dict[Quantization, float] = {"int8": 3e-4, "int4": 0.03}
"""Nats a token, in the mean, of a text that the bundled model did not write."""


def load(backend: str, quantization: Quantization) -> tuple[Decoder, Ops]:
    ops = make_ops(backend)
    return load_decoder(BUNDLED, SPEC, ops, PLACEMENT, Packing(ops, SPEC, PLACEMENT, quantization)), ops


def read(backend: str, quantization: Quantization, count: int | None) -> Tensor:
    decoder, ops = load(backend, quantization)
    ids = load_tokenizer(BUNDLED, SPEC.vocab_size).encode(TEXT)[:count]
    return paged_logits(decoder, ops, ids, 32, 16).log_softmax(-1)


def tensors_of(part: Any) -> Iterator[Tensor]:
    """Every tensor of a model, however deep."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, PackedWeight):
        yield part.data
    elif isinstance(part, GroupedWeight):
        yield from (x for x in (part.codes_NK, part.scales_NG, part.zeros_NG) if x is not None)
    elif isinstance(part, list | tuple):
        for one in part:
            yield from tensors_of(one)
    elif hasattr(part, "__slots__") and not isinstance(part, type) and not hasattr(part, "pack"):
        for name in part.__slots__:
            yield from tensors_of(getattr(part, name))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_bundled_model_says_nearly_the_same(quantization: Quantization) -> None:
    """On every backend; on torch the activations stay as they are."""
    for backend in BACKENDS:
        count = 40 if backend == "ref" else None
        plain, ours = read(backend, "none", count), read(backend, quantization, count)
        kl = float((plain.exp() * (plain - ours)).sum(-1).mean())
        assert 0 < kl < KL_BOUND[quantization], (backend, kl)


@pytest.mark.skipif(not native(), reason="installed without a compiler")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_resident_bytes_are_those_that_sizing_says(quantization: Quantization) -> None:
    decoder, _ = load("cpu", quantization)
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors_of(decoder)}
    assert sum(held.values()) == weight_bytes(SPEC, "float32", quantization)
    assert sum(held.values()) < weight_bytes(SPEC, "bfloat16") * (0.65 if quantization == "int8" else 0.4)


def test_each_recipe_has_a_numerics_id_of_its_own() -> None:
    ops = make_ops("ref")
    recipes = [Packing(ops, SPEC, PLACEMENT, q).recipe for q in ("none", "int8", "int4")]  # type: ignore[arg-type]
    assert len({numerics_id(BUNDLED, SPEC, ops, PLACEMENT, recipe) for recipe in recipes}) == 3


def test_who_has_no_integers_refuses_them() -> None:
    with pytest.raises(ConfigError, match="quant_unsupported"):
        LLM(quant="int8", backend="torch")
    with pytest.raises(ConfigError, match="quant_unsupported"):
        check_formats(EngineConfig(quant="int4"), "cpu", decoder=False)


# -- what integers are made of -----------------------------------------------------------------------------------------

WIDE = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 90}
UP, DOWN = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"), "model.layers.1.mlp.down_proj"
FORMS: dict[Quantization, tuple[int, int]] = {"int8": (8, 32), "int4": (4, 32)}


def write(folder: Path, dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    """A model of Gaussian numbers, its tensors in these dtypes in turn."""
    shapes = checkpoint_tensors(model_spec(WIDE))
    tensors = {name: torch.randn(s).to(dtypes[i % len(dtypes)]) for i, (name, s) in enumerate(sorted(shapes.items()))}
    config = WIDE | {"torch_dtype": str(dtypes[0]).removeprefix("torch.")}
    write_model(folder, config, **{name.replace(".", "__"): x for name, x in tensors.items()})
    return tensors


def packed(path: Path, dtype: torch.dtype, quantization: Quantization, backend: str) -> tuple[dict[str, Weight], Ops]:
    """What each slot's matrix becomes, by the name of its first tensor."""
    ops, spec, placement = make_ops(backend), read_any_spec(path), Placement(dtype, CPU)
    assert isinstance(spec, ModelSpec)
    packing, weights = Packing(ops, spec, placement, quantization), dict[str, Weight]()

    def pack(slot: str, name: str, inputs: int, read: Read) -> Weight:
        weights[name] = packing(slot, name, inputs, read)
        return weights[name]

    load_decoder(path, spec, ops, placement, pack)
    return weights, ops


def same(weight: Weight, expected: Weight) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(weight), tensors_of(expected), strict=True))


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
def test_integers_are_made_of_the_stored_numbers(backend: str, quantization: Quantization, tmp_path: Path) -> None:
    """Of float16 not by way of bfloat16, in which it is computed; so do the integers of a folder written beforehand."""
    stored = write(tmp_path, [torch.float16])
    name, form = f"{DOWN}.weight", FORMS[quantization]
    weights, ops = packed(tmp_path, torch.bfloat16, quantization, backend)
    exact = quantize(stored[name], *form)
    assert same(weights[name], ops.pack(exact))
    assert same(weights[UP[0]], ops.pack(quantize(torch.cat([stored[part] for part in UP]), *form)))
    errors = [
        float((quantize(numbers, *form).widened() - stored[name].float()).square().mean())
        for numbers in (stored[name], stored[name].bfloat16())
    ]
    assert errors[0] < errors[1] * (0.95 if quantization == "int8" else 1)
    spec, out = read_model_spec(tmp_path), tmp_path / "out"
    write_quantized(tmp_path, out, spec, Recipe(quantization))
    again = open_tensors(open_checkpoint(out), spec, PLACEMENT).weight(name)
    assert isinstance(again, GroupedWeight) and same(again, exact)


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_of_bfloat16_are_the_same_in_every_dtype(
    dtype: torch.dtype, quantization: Quantization, tmp_path: Path
) -> None:
    stored = write(tmp_path, [torch.bfloat16])[f"{DOWN}.weight"]
    weights, ops = packed(tmp_path, dtype, quantization, "ref")
    assert same(weights[f"{DOWN}.weight"], ops.pack(quantize(stored.to(dtype), *FORMS[quantization])))


def test_integers_of_several_dtypes_and_of_gguf_files(tmp_path: Path) -> None:
    stored = write(tmp_path, [torch.float16, torch.bfloat16, torch.float32])
    assert {stored[name].dtype for name in UP} != {stored[UP[0]].dtype}
    weights, ops = packed(tmp_path, torch.bfloat16, "int8", "ref")
    exact, out = quantize(torch.cat([stored[name].float() for name in UP]), 8, 32), tmp_path / "out"
    assert same(weights[UP[0]], ops.pack(exact))
    write_quantized(tmp_path, out, read_model_spec(tmp_path), Recipe("int8"))
    again = open_tensors(open_checkpoint(out), read_model_spec(out), PLACEMENT).weight(*UP)
    assert isinstance(again, GroupedWeight) and same(again, exact)
    file = small(tmp_path / "small.gguf", kind=Kind.F16)
    weights, _ = packed(file, torch.bfloat16, "int8", "ref")
    data = open_checkpoint(file).view("blk.0.ffn_down.weight")
    numbers = torch.frombuffer(bytearray(data), dtype=torch.float16).view(32, 32)
    assert same(weights[f"{DOWN}.weight".replace("1", "0")], ops.pack(quantize(numbers, 8, 32)))


def test_what_stays_plain_is_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    """Rows of 24 and 40 inputs have no groups of 32."""
    path = write_model(tmp_path, CONFIG)
    weights, _ = packed(path, torch.bfloat16, "int8", "ref")
    down = load_file(path / "model.safetensors")[f"{DOWN}.weight"]
    assert same(weights[f"{DOWN}.weight"], down.bfloat16())
    assert {weight.dtype for weight in weights.values() if isinstance(weight, Tensor)} == {torch.bfloat16}
