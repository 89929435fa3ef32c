"""``penstock models`` and ``penstock show``: what there is, and what fits."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from commands import argv, penstock
from penstock.cli.show import architecture
from penstock.kernels import native
from penstock.spec import ModelSpec, MoESpec, RopeSpec


@pytest.fixture
def cache(stories: Path, tmp_path: Path) -> Path:
    """A hub cache with one good model, one of an unknown family, and a folder that is no model."""
    for name, family in (("good--stories", None), ("odd--one", "MambaForCausalLM")):
        folder = tmp_path / f"models--{name}"
        snapshot = folder / "snapshots" / "abc"
        shutil.copytree(stories, snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        if family:
            config = json.loads((snapshot / "config.json").read_text())
            (snapshot / "config.json").write_text(json.dumps(config | {"architectures": [family]}))
    (tmp_path / "models--empty--one").mkdir()
    (tmp_path / "datasets--some--thing").mkdir()
    return tmp_path


def test_models(cache: Path) -> None:
    done = penstock("models", "--json", HF_HUB_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    tiny, nano, good, odd = [json.loads(line) for line in done.stdout.splitlines()]
    assert tiny["name"] == "penstock-tiny" and tiny["runs"] and tiny["parameters"] == 11_015_040
    assert nano["name"] == "penstock-nano" and nano["runs"] and nano["parameters"] == 2_819_840
    assert (good["name"], good["family"], good["context"]) == ("good/stories", "llama", 512) and good["runs"]
    assert (odd["name"], odd["runs"], odd["problem"]) == ("odd/one", False, "unknown_architecture")
    table = penstock("models", HF_HUB_CACHE=str(cache)).stdout.decode()
    assert "no: unknown_architecture" in table and "11.02M" in table and table.startswith("MODEL")
    for folder in cache.glob("models--good--stories/snapshots/*"):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")  # a part of the model, as sentence-transformers has it
    listed = penstock("models", cache, "--json").stdout.splitlines()
    assert [json.loads(line)["family"] for line in listed] == ["llama", None]
    assert b"code: model_not_found" in penstock("models", cache / "nowhere").stderr


def test_show(stories: Path) -> None:
    done = penstock("show", "--json", "--max-model-len", "256", "--kv-memory", "4M", stories)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["family"] == "llama" and facts["context"] == 512 and facts["chat_template"] is False
    assert facts["parameters"]["total"] == facts["parameters"]["active"] > 250_000
    assert facts["weights"]["bytes"] == sum(facts["weights"]["bytes_by_dtype"].values())
    here = facts["here"]
    assert here["fits"] and here["context"] == 256 and here["kv_pool_bytes"] <= 4 << 20
    per_request = facts["kv_bytes_per_token"] * 256
    assert here["requests"] == (4 << 20) // per_request and here["requests_in_all_memory"] > here["requests"]
    int8 = penstock("show", "--json", "--max-model-len", "256", "--kv-memory", "4M", "--kv-dtype", "int8", stories)
    more = json.loads(int8.stdout)["here"]
    assert (here["kv_dtype"], more["kv_dtype"]) == (here["dtype"], "int8") and more["kv_pool_bytes"] <= 4 << 20
    assert more["requests"] == (4 << 20) // (2 * 5 * 4 * (8 + 2) * 256) > here["requests"]
    text = penstock("show", stories).stdout.decode()
    assert "llama" in text and "per token" in text and "requests of 512 tokens" in text


def test_what_a_spec_says_beyond_its_defaults() -> None:
    sizes = {"vocab_size": 512, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
    moe = MoESpec(experts=8, active=2, ffn=32, layers=(True, False))
    spec = ModelSpec(family="x", **sizes, windows=(64, None), max_positions=512, moe=moe, rope=RopeSpec(theta=1e6))
    assert architecture(spec) == sizes | {
        "layers": 2,
        "windows": {"64": 1, "all": 1},
        "rope": {"theta": 1e6},
        "moe": {"experts": 8, "active": 2, "ffn": 32, "layers": (True, False)},
    }


def test_show_says_what_does_not_fit(stories: Path, tmp_path: Path) -> None:
    small = penstock("show", "--json", "--kv-memory", "1K", "--max-model-len", "256", stories)
    facts = json.loads(small.stdout)
    assert facts["here"]["fits"] is False and facts["here"]["why"]["code"] == "kv_memory_too_small"
    assert (
        b"fits          no: it needs" in penstock("show", "--kv-memory", "1K", "--max-model-len", "256", stories).stdout
    )


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("config.json", "json_invalid"),
        ("model.safetensors", "weights_truncated"),
        ("tokenizer.json", "tokenizer_invalid"),
        ("shape", "weights_shape"),
    ],
)
def test_show_refuses_a_broken_folder(stories: Path, tmp_path: Path, damage: str, code: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(stories, folder)
    if damage == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    else:
        path = folder / damage
        path.write_bytes(path.read_bytes()[:-100])
    done = penstock("show", "--json", folder)
    assert done.returncode == 3 and done.stdout == b""
    assert json.loads(done.stderr)["error"]["code"] in (
        "json_invalid",
        "weights_truncated",
        "weights_shape",
        "tokenizer_invalid",
    )


def test_facts_come_before_torch_does(stories: Path) -> None:
    """What is read from the files is on the screen while torch is still being imported."""
    started = time.perf_counter()
    with subprocess.Popen(argv("show", stories), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(b"family")
        first = time.perf_counter() - started
        process.communicate()
    assert first < (time.perf_counter() - started) / 2 + 0.2


def test_cache(tmp_path: Path) -> None:
    """What a first start leaves behind can be seen and removed; asking leaves nothing."""
    folder = tmp_path / "new"

    def cache(*arguments: str) -> str:
        done = penstock("cache", *arguments, PENSTOCK_CACHE=str(folder), PENSTOCK_CACHE_SIZE="1G")
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    assert cache() == f"0.0 KiB of at most 1.00 GiB in {folder}\n" and cache("--json") == "" and not folder.exists()
    for options in ((), ("--no-weight-cache", "--quant", "int4"), ("--quant", "int8")):
        run = penstock("run", "--max-tokens", "1", *options, "x", PENSTOCK_CACHE=str(folder))
        assert run.returncode == 0, run.stderr
    kept = [json.loads(line) for line in cache("--json").splitlines()]
    if native():
        assert [Path(one["model"]).name for one in kept] == ["bundled", "bundled"]
        assert {one["weights"] for one in kept} == {"int8", "bfloat16"}
        assert all(Path(one["path"]).stat().st_size == one["bytes"] for one in kept)
        assert "int8" in cache()
    assert f"removed from {folder}" in cache("--clear")
    assert not list(folder.iterdir()) and cache("--json") == ""
    wrong = penstock("cache", PENSTOCK_CACHE=str(folder), PENSTOCK_CACHE_SIZE="much")
    assert wrong.returncode == 3 and b"size_invalid" in wrong.stderr
