"""Models in GGUF files, against the same models in folders and in transformers. The files are written, and their blocks
decoded, by llama.cpp's own package."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_models import ARCHITECTURES, as_gguf, in_gguf, quantize
from oracle import CPU, TOLERANCE, build_reference, error, load, paged_logits
from penstock.kernels import make_ops
from penstock.layers import Placement
from penstock.models import load_decoder
from penstock.quant import BITS, decode_rows, group_rows, widen
from penstock.spec.encoder import read_any_spec

ROUNDED = ("gemma", "gemma2", "gemma3_text")
"""Whose norm weights are stored plus one, which costs a last bit."""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_float32_is_the_same_model(family: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"gguf {family} {seed}")
    config = in_gguf(family, rng)
    path = tmp_path / "model.gguf"
    reference = as_gguf(build_reference(family, rng, tmp_path, **config), path)
    spec, ops = read_any_spec(path), make_ops("torch")
    tokens = reference.tokens(rng, rng.choice([60, 150]))
    theirs, certain = reference.logits(tokens), reference.certain(tokens)
    ours = paged_logits(load_decoder(path, spec, ops, Placement(torch.float32, CPU)), ops, tokens, 64, 16)
    folder = paged_logits(load(reference, ops), ops, tokens, 64, 16)
    print(f"differs from transformers by {error(ours[:certain], theirs[:certain]):.1e}, {spec}")
    assert spec.dtype == "float32"
    assert error(ours[:certain], theirs[:certain]) <= TOLERANCE
    if family not in ROUNDED and spec.rope.kind != "scaled":
        assert replace(spec, family=family) == reference.spec
        assert torch.equal(ours, folder)


@pytest.mark.parametrize("kind", BITS)
def test_blocks_decode_as_in_ggml(kind: str) -> None:
    """Random bytes: every code, every scale, infinite ones and NaN too."""
    size = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    data = np.random.default_rng(0).integers(0, 256, (500, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, Kind[kind])
    assert np.array_equal(decode_rows(torch.from_numpy(data), kind).numpy(), expected, equal_nan=True)


# As the docstring of penstock.quant.gguf states them: of a step of the group, or of its largest number.
EXACT = {"Q8_0": {8}, "Q4_0": {4, 8}, "Q5_0": {8}}


@pytest.mark.parametrize("spread", [2e-4, 1e-3, 0.02, 30.0])
@pytest.mark.parametrize("kind", BITS)
def test_what_grouping_costs(kind: str, spread: float) -> None:
    values = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32) * np.float32(spread)
    data = torch.from_numpy(quantize(values, Kind[kind]))
    numbers = decode_rows(data, kind)
    assert (numbers - torch.from_numpy(values)).abs().max() < spread  # the encoder is one
    for bits in {BITS[kind], 8}:
        grouped = group_rows(data, kind, bits)
        assert (grouped.bits, grouped.group) == (bits, 32)
        wide = widen(grouped, torch.empty(numbers.shape))
        off = (wide - numbers).view(-1, 32).abs().amax(1)
        if bits in EXACT.get(kind, ()):
            assert torch.equal(wide, numbers)
        elif bits == 4:
            steps = grouped.scales_NG.float().flatten()
            assert (off <= 0.04 * steps + 5e-7 * (steps < 2**-14)).all()
        else:
            largest = numbers.view(-1, 32).abs().amax(1)
            assert (off <= torch.where(largest < 0.001, 4e-6, largest / 250)).all()


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_what_float16_has_no_scale_for(kind: str) -> None:
    """Groups of every size down to 0: no more off than is said."""
    size = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    data = np.random.default_rng(3).integers(0, 256, (1 << 15, size), dtype=np.uint8)
    scales = np.arange(1 << 15, dtype=np.uint16) & 0x3FFF  # below 2
    steps = scales.view(np.float16).astype(np.float32)
    data[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    data[:, 2:4] = (-7.3 * steps).astype(np.float16).view(np.uint8).reshape(-1, 2)
    rows = torch.from_numpy(data)
    numbers = decode_rows(rows, kind)
    for bits in {BITS[kind], 8}:
        grouped = group_rows(rows, kind, bits)
        off, largest = (widen(grouped, torch.empty(numbers.shape)) - numbers).abs().amax(1), numbers.abs().amax(1)
        if bits == 4:
            most = 0.04 * torch.from_numpy(steps) + 5e-7 * torch.from_numpy(steps < 2**-14)
        else:
            most = torch.where(largest < 0.001, 4e-6, largest / 250)
            assert (off > largest / 250).any()
        assert (off <= most).all()


def test_groups_of_one_sign_are_quantized_anew() -> None:
    """From -6 to -5: the 0 is 90 steps away, and no zero of 4 bits is."""
    factors = np.array([1 / 63 / 15, 6 / 63], dtype=np.float16).view(np.uint8)
    head = np.concatenate([factors, np.full(12, 255, dtype=np.uint8)])
    codes = np.random.default_rng(2).integers(0, 256, (8, 128), dtype=np.uint8)
    data = torch.from_numpy(np.concatenate([np.tile(head, (8, 1)), codes], 1))
    numbers, grouped = decode_rows(data, "Q4_K"), group_rows(data, "Q4_K", 4)
    assert -6.01 < numbers.min() < numbers.max() < -4.99
    assert (widen(grouped, torch.empty(numbers.shape)) - numbers).abs().max() <= 0.55 * grouped.scales_NG.max()


EXACTLY = {
    "Q8_0": {"": Kind.Q8_0},
    "Q4_0": {"": Kind.Q4_0},
    "Q5_0": {"": Kind.Q5_0},
    "Q8_0 beside Q4_0": {"attn_v": Kind.Q8_0, "": Kind.Q4_0},
    "F16": {"": Kind.F16},
    "BF16": {"": Kind.BF16},
    "F16 beside Q8_0": {"attn_k": Kind.F16, "": Kind.Q8_0},
}
NEARLY = {kind: {"": Kind[kind]} for kind in BITS if kind not in EXACT} | {
    "as Q4_K_M": {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "token_embd": Kind.Q6_K, "": Kind.Q4_K}
}
"""Mixture -> type of tensors, by a part of their name. A router may decide otherwise if its input is only nearly the
same. The models are random and steep: what grouping costs grows from layer to layer."""
CASES = [(mixture, family) for mixture in EXACTLY for family in ("llama", "gemma3_text", "qwen3_moe", "mixtral")]
CASES += [(mixture, family) for mixture in NEARLY for family in ("llama", "gemma3_text", "phi3")]


@pytest.mark.parametrize(("mixture", "family"), CASES)
def test_quantized_files(mixture: str, family: str, tmp_path: Path) -> None:
    kinds, tolerance = (EXACTLY | NEARLY)[mixture], TOLERANCE if mixture in EXACTLY else 0.1
    rng = random.Random(f"gguf {mixture} {family}")
    shape = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 64}
    config, path = in_gguf(family, rng) | shape, tmp_path / "model.gguf"
    if family == "phi3":  # whose head_dim is not its own
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    source = build_reference(family, rng, tmp_path, **config)
    reference = as_gguf(source, path, lambda name, x: next(k for part, k in kinds.items() if part in name))
    spec, ops = read_any_spec(path), make_ops("torch")
    assert spec.dtype == ("float16" if mixture == "F16" else "bfloat16")
    tokens = reference.tokens(rng, 60)
    certain = reference.certain(tokens)
    decoder = load_decoder(path, spec, ops, Placement(torch.float32, CPU))
    ours = paged_logits(decoder, ops, tokens, 64, 16)
    theirs = reference.logits(tokens)
    worst = error(ours[:certain], theirs[:certain])
    print(f"{mixture} {family}: differs by {worst:.1e} in {certain} positions")
    assert worst <= tolerance
