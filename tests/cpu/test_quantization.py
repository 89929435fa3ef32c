"""Models with weights as small integers: what they take, what they cost in answers, and that backends agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import CPU, paged_logits
from penstock import LLM
from penstock.base import ConfigError
from penstock.kernels import GroupedWeight, Ops, PackedWeight, make_ops, native
from penstock.layers import Packing
from penstock.models import Decoder, Placement, load_decoder, numerics_id
from penstock.spec import EngineConfig
from penstock.spec.hf import read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.quantization import Quantization, check_formats
from penstock.spec.sizing import weight_bytes
from penstock.text import load_tokenizer
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
        yield from (part.codes_NK, part.scales_NG)
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
