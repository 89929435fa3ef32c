"""Weight files: what is read, and that damage ends in a coded error that names the place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from penstock.base import ModelFormatError
from penstock.formats import SafetensorsFile, file_digest, open_checkpoint, read_bytes, read_json_object
from penstock.kernels import make_ops
from penstock.layers import Placement
from penstock.models import numerics_id
from penstock.spec import KVDtype
from penstock.spec.hf import model_spec
from penstock.spec.sizing import activation_bytes, kv_bytes_per_token, kv_request_bytes, parameters, weight_bytes
from small_model import CONFIG, CPU, SPEC, code_of, load, write_model


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(9))
    assert read_bytes(tmp_path / "x", 9, "tokenizer_invalid") == bytes(9)
    with pytest.raises(ModelFormatError) as error:
        read_bytes(tmp_path / "x", 8, "tokenizer_invalid")
    assert error.value.code == "tokenizer_invalid" and "8 bytes" in error.value.why and "download" in error.value.fix


def test_views_are_the_tensors_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int64), "s": torch.tensor(2.5).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", {"note": "kept"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"note": "kept"}
    assert {name: entry.shape for name, entry in file.tensors.items()} == {"b": (3, 5), "a": (7,), "s": ()}
    for name, tensor in tensors.items():
        assert bytes(file.view(name)) == tensor.view(-1).view(torch.uint8).numpy().tobytes()


def test_shards_and_single_file_load_alike(tmp_path: Path) -> None:
    whole, sharded = write_model(tmp_path), tmp_path / "sharded"
    sharded.mkdir()
    source = open_checkpoint(whole)
    names = sorted(source.names)
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {n: torch.frombuffer(bytearray(source.view(n)), dtype=torch.float32).view(source.entry(n).shape)
                for n in names if weight_map[n] == shard}  # fmt: skip
        save_file(part, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    a, b = load(whole), load(sharded)
    assert torch.equal(a.blocks[1].attention.qkv.weight_NK, b.blocks[1].attention.qkv.weight_NK)
    assert torch.equal(a.blocks[0].ffn.down.weight_NK, b.blocks[0].ffn.down.weight_NK)

    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"model-1\.safetensors") as error:
        open_checkpoint(sharded)
    assert code_of(error) == "weights_missing"


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 7, None])
def test_an_index_cannot_point_outside_the_folder(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(ModelFormatError) as error:
        open_checkpoint(tmp_path)
    assert code_of(error) == "weights_header"


def test_an_index_that_promises_an_absent_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ghost": "one.safetensors"}}))
    with pytest.raises(ModelFormatError, match=r"'ghost' is missing from one\.safetensors"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ModelFormatError, match=r"found pytorch_model\.bin") as error:
        open_checkpoint(tmp_path)
    assert code_of(error) == "weights_missing"


@pytest.mark.parametrize("part", range(64))
def test_every_truncation_is_an_error_with_sizes(tmp_path: Path, part: int) -> None:
    data = (write_model(tmp_path) / "model.safetensors").read_bytes()
    cut = len(data) * part // 64
    (tmp_path / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors") as error:
        open_checkpoint(tmp_path)
    assert code_of(error) == "weights_truncated"
    assert f"the file at byte {cut}" in error.value.why
    expected = int(error.value.why.split("ends at byte ")[1].split(",")[0])
    assert cut < expected <= len(data)


def test_a_truncated_tensor_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    last = max(SafetensorsFile(path).tensors.values(), key=lambda entry: entry.end)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFormatError, match=f"tensor '{last.name}' ends at byte {last.end}"):
        open_checkpoint(tmp_path)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


HUGE = 2**62
MUTATIONS: dict[str, Any] = {
    "offsets beyond the file": lambda t: t["data_offsets"].__setitem__(1, HUGE) or t["shape"].__setitem__(0, HUGE // 4),
    "overlap": lambda t: t.update(data_offsets=[t["data_offsets"][0] - 4, t["data_offsets"][1] - 4]),
    "backwards": lambda t: t["data_offsets"].reverse(),
    "negative": lambda t: t.update(data_offsets=[-8, t["data_offsets"][1]]),
    "shape too large": lambda t: t["shape"].append(2),
    "overflowing shape": lambda t: t.update(shape=[HUGE, HUGE, HUGE]),
    "negative shape": lambda t: t.update(shape=[-1, -24]),
    "boolean shape": lambda t: t.update(shape=[True]),
    "float offsets": lambda t: t.update(data_offsets=[0.0, 4.0]),
    "unknown dtype": lambda t: t.update(dtype="F7"),
    "dtype of another width": lambda t: t.update(dtype="F64"),
    "no dtype": lambda t: t.pop("dtype"),
    "an extra key": lambda t: t.update(extra=1),
    "three offsets": lambda t: t["data_offsets"].append(0),
    "too many dimensions": lambda t: t.update(shape=[1] * 17 + t["shape"]),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_entry_is_an_error_that_names_it(tmp_path: Path, mutation: str) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    header, data = header_and_data(path)
    MUTATIONS[mutation](header["model.norm.weight"])
    rewrite(path, header, data)
    with pytest.raises(ModelFormatError, match=r"model\.norm\.weight") as error:
        open_checkpoint(tmp_path)
    assert code_of(error) in ("weights_header", "weights_truncated")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b'{"a":1}', b'{"a":[]}', b"\xff\xfe", b'{"a":NaN}', b'{"x":1,"x":1}', b"[" * 100_000,
     b'{"__metadata__":3}', b'{"__metadata__":{"a":1}}', b'{"a":' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_headers_that_are_not_headers(tmp_path: Path, header: bytes) -> None:
    rewrite(tmp_path / "model.safetensors", header, b"")
    with pytest.raises(ModelFormatError) as error:
        open_checkpoint(tmp_path)
    assert code_of(error) == "weights_header"


def test_header_length_is_capped_and_bytes_without_owner_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelFormatError, match="exceeds the limit"):
        open_checkpoint(tmp_path)
    rewrite(path, {"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123")
    with pytest.raises(ModelFormatError, match="hole"):
        open_checkpoint(tmp_path)
    rewrite(path, {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123")
    with pytest.raises(ModelFormatError, match="the tensors end at byte"):
        open_checkpoint(tmp_path)


@settings(max_examples=3 * settings.default.max_examples)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 4), cut=st.booleans())
def test_random_damage_raises_nothing_else(seed: int, flips: int, cut: bool, tmp_path_factory: Any) -> None:
    """Bytes of the header are changed at random: the file still reads, or it is a ModelFormatError."""
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    header = {f"t{i}": {"dtype": "F32", "shape": [2, i], "data_offsets": [4 * i * (i - 1), 4 * i * (i + 1)]}
              for i in range(1, 5)}  # fmt: skip
    rewrite(path, header, bytes(160))
    raw = bytearray(path.read_bytes())
    for _ in range(flips):
        raw[rng.randrange(len(raw) - 160)] = rng.choice(b'0123456789{}[]",:-ex\x00\xff')
    path.write_bytes(raw[: rng.randrange(len(raw))] if cut else raw)
    try:
        file = SafetensorsFile(path)
    except ModelFormatError:
        return
    for name, entry in file.tensors.items():
        assert len(file.view(name)) == entry.end - entry.start


def test_json_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFormatError, match="cannot be read") as error:
        read_json_object(tmp_path / "absent.json")
    assert code_of(error) == "file_missing"
    monkeypatch.setattr("penstock.formats.jsonfile.MAX_JSON_BYTES", 10)
    (tmp_path / "large.json").write_text('{"a": "0123456789"}')
    with pytest.raises(ModelFormatError, match="larger than 10 bytes"):
        read_json_object(tmp_path / "large.json")


# Weights against their config


def test_loader_fuses_and_converts(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    source = open_checkpoint(folder)
    decoder = load(folder, dtype=torch.bfloat16)
    attention = decoder.blocks[1].attention
    assert attention.qkv.weight_NK.shape == (24 + 8 + 8, 24)
    k_proj = torch.frombuffer(bytearray(source.view("model.layers.1.self_attn.k_proj.weight")), dtype=torch.float32)
    assert torch.equal(attention.qkv.weight_NK[24:32], k_proj.view(8, 24).bfloat16())
    assert decoder.head.weight_VD is decoder.embedding.table_VD
    assert attention.out.segments == 1 and decoder.blocks[0].ffn.down.segments == 8  # 3 heads; 40 columns


@pytest.mark.parametrize(
    ("replaced", "code", "names"),
    [
        ({"model__norm__weight": None}, "weights_missing", "model.norm.weight"),
        ({"model__norm__weight": torch.zeros(25)}, "weights_shape", r"model.norm.weight is \[25\].*calls for \[24\]"),
        ({"model__norm__weight": torch.zeros(24, dtype=torch.int8)}, "weights_dtype", "model.norm.weight is I8"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.zeros(24)}, "weights_unexpected", "q_proj.bias"),
        ({"model__layers__2__mlp__up_proj__weight": torch.zeros(40, 24)}, "weights_unexpected", "layers.2"),
    ],
)
def test_tensors_must_be_those_of_the_config(tmp_path: Path, replaced: dict[str, Any], code: str, names: str) -> None:
    folder = write_model(tmp_path, **replaced)
    with pytest.raises(ModelFormatError, match=names) as error:
        load(folder)
    assert code_of(error) == code


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    load(
        write_model(
            tmp_path,
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
            lm_head__weight=torch.zeros(50, 24),
        )
    )


def test_numerics_id_follows_all_that_decides_bits(tmp_path: Path) -> None:
    folder, exact = write_model(tmp_path), Placement(torch.float32, CPU)
    ref, fast = make_ops("ref"), make_ops("torch")
    base = numerics_id(folder, SPEC, ref, exact)
    assert len(base) == 16 and base == numerics_id(folder, SPEC, make_ops("ref"), exact)
    ids = {
        base,
        numerics_id(folder, SPEC, fast, exact),
        numerics_id(folder, SPEC, ref, Placement(torch.bfloat16, CPU)),
        numerics_id(folder, SPEC, ref, Placement(torch.float32, CPU, torch.int8)),
        numerics_id(folder, model_spec(CONFIG | {"rope_theta": 5e5}), ref, exact),
    }
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    ids.add(numerics_id(folder, SPEC, ref, exact))
    assert len(ids) == 6
    assert numerics_id(folder, dataclasses.replace(SPEC, max_positions=7), ref, exact) in ids


def test_a_hub_cache_is_not_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    digest = file_digest(tmp_path / "blob")
    assert digest == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / digest).write_bytes(b"not read")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / digest)
    assert file_digest(tmp_path / "model.safetensors") == digest


PEAK = """
import resource, sys, torch
from pathlib import Path
from penstock.kernels import make_ops
from penstock.models import Placement, load_decoder
from penstock.spec.hf import read_model_spec
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, before = Path(sys.argv[1]), peak()
load_decoder(folder, read_model_spec(folder), make_ops("torch"), Placement(torch.float32, torch.device("cpu")))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's units")
def test_loading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 3, "head_dim": 64}
    size = weight_bytes(model_spec(config), "float32")
    folder = str(write_model(tmp_path, config))
    run = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True)
    assert size > 100e6 and int(run.stdout) < 1.25 * size


# Sizes


def test_sizing_agrees_with_what_is_loaded(tmp_path: Path) -> None:
    decoder = load(write_model(tmp_path))
    tensors = [decoder.embedding.table_VD, decoder.norm.weight_D]
    for block in decoder.blocks:
        tensors += [block.attention.qkv.weight_NK, block.attention.out.weight_NK, block.ffn.gate_up.weight_2FD]
        tensors += [block.ffn.down.weight_NK, block.attention_norm.weight_D, block.ffn_norm.weight_D]
    assert parameters(SPEC) == sum(t.numel() for t in tensors)
    rope = decoder.blocks[0].attention.rope_Pd
    assert weight_bytes(SPEC, "float32") == sum(t.nbytes for t in [*tensors, rope])
    stored: tuple[KVDtype, ...] = ("float32", "bfloat16", "int8")
    for dtype in stored:
        layers = make_ops("ref").allocate_kv(2, 3, 16, 1, 8, getattr(torch, dtype), torch.device("cpu"))
        assert 3 * 16 * kv_bytes_per_token(SPEC, dtype) == sum(pool.nbytes for x in layers for pool in x.pools())


def test_window_groups_hold_only_what_they_see() -> None:
    mistral = model_spec(
        CONFIG | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}
    )
    one_block = 16 * kv_bytes_per_token(mistral, "bfloat16")
    assert kv_request_bytes(mistral, 16, 16, "bfloat16") == one_block
    assert kv_request_bytes(mistral, 10_000, 16, "bfloat16") == 3 * one_block
    assert kv_request_bytes(SPEC, 33, 16, "bfloat16") == 3 * 16 * kv_bytes_per_token(SPEC, "bfloat16")
    assert activation_bytes(SPEC, 64, 8, "bfloat16") > 8 * SPEC.vocab_size * 4
