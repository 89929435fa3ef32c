"""Folders in the format of compressed-tensors: read as numpy reads them, written unchanged, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from encoder_models import write_json
from oracle import CPU, paged_logits
from penstock.base import InvalidRequest, ModelFormatError, PenstockError
from penstock.bench.checkpoints import write_w8a8
from penstock.cli.quantize import quantize as quantize_command
from penstock.compress import Recipe, folder, measure_quality, write_quantized
from penstock.formats import open_checkpoint
from penstock.kernels import GroupedWeight, make_ops, native
from penstock.layers import Packing
from penstock.models import Decoder, Placement, load_decoder
from penstock.models.compressed import CompressedTensors
from penstock.models.weights import open_tensors
from penstock.quant import stored_quantization, to_tensors
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.quantization import LARGER, OUTER, Quantization
from penstock.spec.sizing import weight_bytes
from penstock.spec.tensors import checkpoint_tensors
from small_model import CONFIG, write_model
from test_quantization import tensors_of

WIDE = CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "torch_dtype": "bfloat16",
}
SPEC = model_spec(WIDE)
PLACEMENT = Placement(torch.bfloat16, CPU)
IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 79, 32, 38, 46]
BACKEND = "cpu" if native() else "ref"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    source = tmp_path / "plain"
    source.mkdir()
    weights = {name: (torch.randn(shape) / 8).bfloat16() for name, shape in checkpoint_tensors(SPEC).items()}
    write_model(source, WIDE, **{name.replace(".", "__"): weight for name, weight in weights.items()})
    for name in ("tokenizer.json", "generation_config.json", "pytorch_model.bin", ".hidden"):
        (source / name).write_text("{}")
    return source


def args(bits: int, strategy: str, group: int | None, symmetric: bool, **more: Any) -> dict[str, Any]:
    own = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": symmetric}
    return own | {"dynamic": False} | more


def config_with(weights: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    own = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return WIDE | {"quantization_config": own | {"ignore": ["lm_head"], "quantization_status": "compressed"} | more}


def packed(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """As the format's own page has it: unsigned, from the lowest bits of an int32 up."""
    codes = np.moveaxis(codes.astype(np.int64) + (1 << bits - 1), axis, -1)
    per_word = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[-1] % per_word)))
    words = sum(codes[:, i::per_word] << bits * i for i in range(per_word))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))  # type: ignore[union-attr]


FORMS = [
    *[args(4, "group", group, symmetric) for group in (32, 64, 128) for symmetric in (True, False)],
    *[args(8, "group", 32, True), args(8, "group", 128, True), args(8, "channel", None, True)],
    *[args(4, "channel", None, False), args(4, "channel", None, True)],
]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_are_read_as_they_are(form: dict[str, Any], scale_dtype: torch.dtype, tmp_path: Path) -> None:
    """Numpy packs random codes, every one of them, and says which numbers they stand for."""
    rng, bits, tensors, expected = np.random.default_rng(0), form["num_bits"], {}, {}
    for name, shape in checkpoint_tensors(SPEC).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = torch.randn(shape)
            continue
        groups = shape[1] // (form["group_size"] or shape[1])
        codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, shape)
        zeros = np.zeros((shape[0], groups), int) if form["symmetric"] else rng.integers(-8, 8, (shape[0], groups))
        scales = torch.rand(shape[0], groups).add(0.1).to(scale_dtype)
        tensors |= {f"{name}_packed": torch.from_numpy(packed(codes, bits, 1)), f"{name}_scale": scales}
        tensors[f"{name}_shape"] = torch.tensor(shape)
        if not form["symmetric"]:
            tensors[f"{name}_zero_point"] = torch.from_numpy(packed(zeros, bits, 0))
        steps = codes.reshape(shape[0], groups, -1) - zeros[..., None]
        expected[name] = (steps * scales.half().double().numpy()[..., None]).reshape(shape)
    (tmp_path / "config.json").write_text(json.dumps(config_with(form)))
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_model_spec(tmp_path) == SPEC
    read = open_tensors(open_checkpoint(tmp_path), SPEC, Placement(torch.float32, CPU))
    for name, numbers in expected.items():
        weight = read.weight(name)
        assert isinstance(weight, GroupedWeight) and weight.bits == bits
        own = weight.shape[1] // (weight.shape[1] // form["group_size"] if form["group_size"] else 1)
        assert weight.group == (own if bits == 4 and own in LARGER else 32)
        assert np.array_equal(weight.widened().numpy(), numbers.astype(np.float32)), name
        assert np.array_equal(read.fuse(name).numpy(), numbers.astype(np.float32)), name


def test_eight_bit_models_of_others(plain: Path, tmp_path: Path) -> None:
    """int-quantized, a scale for each output: the numbers are kept, and with plain embeddings the model runs."""
    out = tmp_path / "w8a8"
    out.mkdir()
    (plain / "tokenizer_config.json").write_text("{}")
    write_w8a8(plain, out)
    stored = load_file(out / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] = -128  # no code of ours, but of others
    save_file(stored, out / "model.safetensors")
    read = open_tensors(open_checkpoint(out), SPEC, PLACEMENT)
    for name in (name for name in checkpoint_tensors(SPEC) if name.endswith("_proj.weight")):
        weight = read.weight(name)
        assert isinstance(weight, GroupedWeight)
        assert torch.equal(weight.widened(), stored[name].float() * stored[f"{name}_scale"].half().float())
    assert logits(out, "none").isfinite().all()
    assert stored_quantization(out, "none") == "none"  # the embedding is counted as it is


def logits(path: Path, quantization: Quantization, backend: str = BACKEND, count: int = 13) -> torch.Tensor:
    decoder, ops = load(path, quantization, backend)
    return paged_logits(decoder, ops, IDS[:count], 5, 16)


def load(path: Path, quantization: Quantization = "none", backend: str = BACKEND) -> tuple[Decoder, Any]:
    ops, spec = make_ops(backend), read_model_spec(path)
    return load_decoder(path, spec, ops, PLACEMENT, Packing(ops, spec, PLACEMENT, quantization)), ops


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_answers_as_the_model_quantized_on_load(
    quantization: Quantization, dtype: torch.dtype, plain: Path, tmp_path: Path
) -> None:
    """Bit for bit; and its size is what was foretold."""
    if dtype == torch.float16:
        halves = {name: x.to(dtype) for name, x in load_file(plain / "model.safetensors").items()}
        save_file(halves, plain / "model.safetensors")
        (plain / "config.json").write_text(json.dumps(WIDE | {"torch_dtype": "float16"}))
    out = tmp_path / "out"
    before, after = write_quantized(plain, out, read_model_spec(plain), Recipe(quantization))
    assert torch.equal(logits(plain, quantization), logits(out, "none"))
    assert after < before and stored_quantization(out, "none") == quantization
    held = {name: tensor.nbytes for name, tensor in load_file(out / "model.safetensors").items()}
    assert sum(held.values()) == after
    shapes = sum(size for name, size in held.items() if name.endswith("_shape"))
    halved = sum(size for name, size in held.items() if name.endswith("_zero_point"))  # two zeros to the byte
    tables = weight_bytes(SPEC, "bfloat16") - before
    assert after - shapes + halved == weight_bytes(SPEC, "bfloat16", quantization) - tables
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    }


OWN_NAMES = {
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2},
    "bloom": {"hidden_size": 128, "n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("family", OWN_NAMES)
def test_names_and_orders_of_other_families(family: str, tmp_path: Path) -> None:
    """The embedding is found by any name, and rows that lie head by head are put in order with their scales."""
    config = OWN_NAMES[family] | {"model_type": family, "vocab_size": 90, "torch_dtype": "bfloat16"}
    weights = {name: torch.randn(s).div(8).bfloat16() for name, s in checkpoint_tensors(model_spec(config)).items()}
    (source := tmp_path / "plain").mkdir()
    write_model(source, config, **{name.replace(".", "__"): weight for name, weight in weights.items()})
    write_quantized(source, tmp_path / "out", read_model_spec(source), Recipe("int4"))
    assert torch.equal(logits(source, "int4"), logits(tmp_path / "out", "none"))
    assert stored_quantization(tmp_path / "out", "none") == "int4"
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head"]
    assert any(group["targets"] == ["Embedding"] for group in said["config_groups"].values())


def test_shards_and_plain_embeddings(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 64 fit the inputs of all; what is kept is named, and the rest of the model is the same."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_quantized(plain, whole, SPEC, Recipe("int4", 64, OUTER))
    monkeypatch.setattr(folder, "SHARD_BYTES", 30_000)
    write_quantized(plain, out, SPEC, Recipe("int4", 64, OUTER))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["metadata"]["total_size"] > 100_000
    assert torch.equal(logits(whole, "none"), logits(out, "none"))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"] and config["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert stored_quantization(out, "none") == "none" and stored_quantization(out, "int8") == "int8"


def test_one_group_to_the_row(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path / "out", SPEC, Recipe("int4", 128))
    assert logits(tmp_path / "out", "none").isfinite().all()
    assert stored_quantization(tmp_path / "out", "none") == "int4"


@pytest.mark.parametrize("group", LARGER)
def test_groups_stay_as_they_are_stored(group: int, plain: Path, tmp_path: Path) -> None:
    """Where they cross no segment of a sum; it saves memory, and backends agree."""
    write_quantized(plain, tmp_path / "out", SPEC, Recipe("int4", group))
    for name in (name for name in checkpoint_tensors(SPEC) if name.endswith("_proj.weight")):
        weight = open_tensors(open_checkpoint(tmp_path / "out"), SPEC, PLACEMENT).weight(name)
        assert isinstance(weight, GroupedWeight) and weight.group == group
    ops = make_ops("ref")
    packing = Packing(ops, SPEC, PLACEMENT)
    for slot, fits in (("qkv.weight", group), ("gate_up.weight", group), ("out.weight", 64), ("down.weight", 32)):
        kept = packing(slot, "", weight.shape[1], lambda _: weight)
        assert isinstance(kept, GroupedWeight) and kept.group == fits, slot
        assert torch.equal(kept.widened(), weight.widened())
    held = {}
    for each in (32, group):
        out = tmp_path / f"by {each}"
        write_quantized(plain, out, SPEC, Recipe("int4", each))
        held[each] = sum(tensor.nbytes for tensor in tensors_of(load(out)[0]))
    assert held[group] < held[32]
    assert torch.equal(logits(tmp_path / "out", "none").argmax(-1), logits(tmp_path / "out", "none", "ref").argmax(-1))


def test_a_slot_of_several_groups(tmp_path: Path) -> None:
    """The smallest is that of all; beside 8 bits it is 32."""
    tensors = {name: torch.randn(shape) for name, shape in checkpoint_tensors(SPEC).items()}
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    (tmp_path / "config.json").write_text(json.dumps(config_with(args(4, "group", 128, False))))
    for bits, group in ((4, 64), (8, 32)):
        parts, expected = dict[str, torch.Tensor](), []
        for name, form in zip(names, ((4, 128), (bits, group), (4, 128)), strict=True):
            weight = folder.quantize(tensors[name], *form)
            parts |= {name.replace("weight", part): x for part, x in to_tensors(weight).items()}
            expected.append(weight.widened())
        rest = {name: x for name, x in tensors.items() if name not in names}
        save_file(rest | parts, tmp_path / "model.safetensors")
        read = open_tensors(open_checkpoint(tmp_path), SPEC, PLACEMENT).weight(*names)
        assert isinstance(read, GroupedWeight) and (read.bits, read.group) == (bits, group)
        assert torch.equal(read.widened(), torch.cat(expected))


def test_a_slot_of_several_widths(tmp_path: Path) -> None:
    """Four bits beside eight become eight, with the same numbers; integers beside numbers become numbers."""
    config = config_with(args(4, "group", 32, False))
    tensors = {name: torch.randn(shape) for name, shape in checkpoint_tensors(SPEC).items()}
    prefix, expected = "model.layers.0.self_attn.", []
    for module, bits in (("q_proj", 4), ("k_proj", 8), ("v_proj", 4)):
        plain = tensors.pop(f"{prefix}{module}.weight")
        weight = folder.quantize(plain, bits, 32)
        tensors |= {f"{prefix}{module}.{part}": x for part, x in to_tensors(weight).items()}
        expected.append(weight.widened())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_tensors(open_checkpoint(tmp_path), SPEC, Placement(torch.float32, CPU))
    assert isinstance(read, CompressedTensors)
    names = [f"{prefix}{module}.weight" for module in ("q_proj", "k_proj", "v_proj")]
    fused = read.weight(*names)
    assert isinstance(fused, GroupedWeight) and fused.bits == 8
    assert torch.equal(fused.widened(), torch.cat(expected))
    mixed = read.weight("model.layers.0.mlp.gate_proj.weight", names[0])
    assert isinstance(mixed, torch.Tensor) and torch.equal(mixed[-128:], expected[0])


REFUSED: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("bits", lambda: config_with(args(3, "group", 32, True))),
    ("bits", lambda: config_with(args(4, "channel", None, True), "int-quantized")),
    ("type float", lambda: config_with(args(8, "channel", None, True, type="float"))),
    ("zero points", lambda: config_with(args(8, "channel", None, False), "int-quantized")),
    ("g_idx", lambda: config_with(args(4, "group", 128, True, actorder="group"))),
    ("groups of 16", lambda: config_with(args(4, "group", 16, True))),
    ("block", lambda: config_with(args(8, "block", None, True))),
    ("marlin-24", lambda: config_with(args(4, "group", 32, True), "marlin-24")),
    ("kv_cache_scheme", lambda: config_with(args(4, "group", 32, True), kv_cache_scheme={"num_bits": 8})),
    ("sparsity", lambda: config_with(args(4, "group", 32, True), sparsity_config={"format": "sparse-bitmask"})),
    ("transform", lambda: config_with(args(4, "group", 32, True), transform_config={"config_groups": {"a": 1}})),
]


@pytest.mark.parametrize("said, config", REFUSED, ids=[said for said, _ in REFUSED])
def test_what_is_not_read_is_refused_by_name(said: str, config: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(ModelFormatError, match=said) as error:
        model_spec(config())
    assert error.value.code == "unsupported_quantization"


def test_activations_fixed_beforehand_are_refused() -> None:
    config = config_with(args(8, "channel", None, True), "int-quantized")
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = inputs
    assert model_spec(config) == SPEC
    group["input_activations"] = inputs | {"dynamic": False, "strategy": "tensor"}
    with pytest.raises(ModelFormatError, match="activations"):
        model_spec(config)


DAMAGE: list[tuple[str, str, torch.Tensor | None]] = [
    ("weights_missing", "weight_shape", None),
    ("weights_missing", "weight_packed", None),
    ("weights_shape", "weight_shape", torch.tensor([128, 64])),
    ("weights_shape", "weight_packed", torch.zeros(128, 15, dtype=torch.int32)),
    ("weights_shape", "weight_scale", torch.zeros(128, 3, dtype=torch.float16)),
    ("weights_dtype", "weight_packed", torch.zeros(128, 16, dtype=torch.float32)),
    ("weights_shape", "weight_zero_point", torch.zeros(16, 2, dtype=torch.int32)),
    ("weights_unexpected", "weight_g_idx", torch.zeros(128, dtype=torch.int32)),
    ("weights_not_finite", "weight_scale", torch.full((128, 4), 1e6)),
]


@pytest.mark.parametrize("code, part, tensor", DAMAGE)
def test_damage_is_named(code: str, part: str, tensor: torch.Tensor | None, plain: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", f"model.layers.1.self_attn.q_proj.{part}"
    write_quantized(plain, out, SPEC, Recipe("int4"))
    tensors = load_file(out / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), out / "model.safetensors")
    with pytest.raises(ModelFormatError) as error:
        load(out)
    assert error.value.code == code


def test_a_half_written_folder_is_no_model(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out", list[list[str]]()

    def fail(*_: object) -> None:
        (part,) = tmp_path.glob(".out.part-*")
        seen.append(sorted(path.name for path in part.iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "compressed_config", fail)
    with pytest.raises(OSError, match="No space"):
        write_quantized(plain, out, SPEC, Recipe("int8"))
    assert seen == [["generation_config.json", "model.safetensors", "tokenizer.json"]]  # all but what makes it a model
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_cannot_be_written_is_refused(plain: Path, tmp_path: Path) -> None:
    def code(source: Path, out: Path) -> str:
        with pytest.raises(PenstockError) as error:
            write_quantized(source, out, SPEC, Recipe("int8"))
        return error.value.code

    out = tmp_path / "out"
    assert code(plain, plain) == "output_exists"
    write_quantized(plain, out, SPEC, Recipe("int8"))
    assert code(out, tmp_path / "again") == "quantize_unsupported"
    assert code(plain / "config.json", tmp_path / "again") == "quantize_unsupported"


def test_an_encoder_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", transformers.BertConfig().to_dict() | {"architectures": ["BertModel"]})
    with pytest.raises(InvalidRequest) as error:
        quantize_command(str(tmp_path), tmp_path / "out")
    assert error.value.code == "quantize_unsupported" and "a model that writes text" in error.value.fix


def test_quality(plain: Path) -> None:
    """Against the sums of the textbook; a model is no distance from itself."""
    (model, ops), (quantized, _) = load(plain), load(plain, "int4")
    found = measure_quality(model, quantized, ops, PLACEMENT, IDS, window=7)
    logs = [
        [paged_logits(d, ops, ids, 7, 16).double().log_softmax(-1) for d in (model, quantized)]
        for ids in (IDS[:7], IDS[7:])
    ]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in logs])
    surprises = [
        torch.cat([-both[i][range(len(ids) - 1), ids[1:]] for both, ids in zip(logs, (IDS[:7], IDS[7:]), strict=True)])
        for i in (0, 1)
    ]
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=2e-3)
    assert found.kl_p99 == pytest.approx(float(kl.max()), rel=2e-3)
    assert found.perplexity == pytest.approx(float(surprises[0].mean().exp()), rel=1e-5)
    assert found.quantized_perplexity == pytest.approx(float(surprises[1].mean().exp()), rel=1e-5)
    assert 0 < found.same_top <= 1 and found.tokens == 13
    itself = measure_quality(model, model, ops, PLACEMENT, IDS)
    assert (itself.kl_mean, itself.same_top, itself.window) == (0, 1, 13)
    with pytest.raises(InvalidRequest, match="text"):
        measure_quality(model, model, ops, PLACEMENT, IDS[:1])


def test_the_package_reads_what_is_written(plain: Path, tmp_path: Path) -> None:
    """compressed-tensors itself, where it is installed."""
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    out = tmp_path / "out"
    write_quantized(plain, out, SPEC, Recipe("int4"))
    config = schemes.QuantizationConfig(**json.loads((out / "config.json").read_text())["quantization_config"])
    read = open_tensors(open_checkpoint(out), SPEC, Placement(torch.float32, CPU))
    stored = load_file(out / "model.safetensors")
    for module in (name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        parts = {name.removeprefix(f"{module}."): x for name, x in stored.items() if name.startswith(f"{module}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        named = [group for group in config.config_groups.values() if kind in group.targets]
        theirs = package.PackedQuantizationCompressor.decompress(parts, named[0])["weight"]
        assert torch.equal(read.fuse(f"{module}.weight"), theirs)
