"""What fits where: sizes, control groups, and the division of a budget into KV pools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from penstock.base import ConfigError, parse_size
from penstock.core.kv.groups import KVCache
from penstock.core.kv.prefix import BlockNames
from penstock.runtime import available_memory, cpu_count, fit, memory, plan_pools
from penstock.runtime.host import group_limits
from penstock.spec import EngineConfig, ModelSpec
from penstock.spec.sizing import activation_bytes, kv_block_bytes, weight_bytes

CPU = torch.device("cpu")
MIB, GIB = 1 << 20, 1 << 30
FULL = ModelSpec(
    family="llama",
    vocab_size=100,
    hidden=64,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    windows=(None,) * 4,
    max_positions=1000,
)
MIXED = replace(FULL, windows=(None, 64, 64, 64))
CONFIG = EngineConfig(max_model_len=1000, max_num_batched_tokens=128, block_size=16)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: size)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * GIB),
        ("512M", 512 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("64kb", 65536),
        ("1000000", 1000000),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "2X", "0", "0.0001K", "1e9", "nan", "2 G B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="size_invalid"):
        parse_size(text)


def pool_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    pools = plan_pools(spec, config, "bfloat16", CPU)
    groups = spec.kv_groups()
    return sum(p.blocks * kv_block_bytes(g, config.block_size, "bfloat16") for p, g in zip(pools, groups, strict=True))


def test_the_default_pool_holds_32_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 64 * GIB)
    assert [p.blocks for p in plan_pools(FULL, CONFIG, "bfloat16", CPU)] == [32 * 63]
    full, windowed = plan_pools(MIXED, CONFIG, "bfloat16", CPU)
    assert (full.blocks, full.window) == (32 * 63, None)
    assert (windowed.blocks, windowed.window) == (32 * 5 + 8, 64)  # and one step's chunk


@pytest.mark.parametrize("spec", [FULL, MIXED])
def test_the_default_pool_is_capped_at_a_quarter_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, spec: ModelSpec
) -> None:
    free(monkeypatch, 16 * MIB)
    largest = max(kv_block_bytes(group, 16, "bfloat16") for group in spec.kv_groups())
    assert 4 * MIB - 2 * largest < pool_bytes(spec, CONFIG) <= 4 * MIB


def test_kv_memory_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, GIB)
    assert 300 * MIB - 8192 < pool_bytes(FULL, replace(CONFIG, kv_memory="300M")) <= 300 * MIB
    with pytest.raises(ConfigError, match=r"2\.00 GiB and 1\.00 GiB are free.*kv_memory_too_large"):
        plan_pools(FULL, replace(CONFIG, kv_memory="2G"), "bfloat16", CPU)
    with pytest.raises(ConfigError, match="kv_memory_too_large"):
        plan_pools(FULL, replace(CONFIG, kv_memory="300M"), "bfloat16", CPU, reserved=800 * MIB)


@pytest.mark.parametrize("spec", [FULL, MIXED])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_smallest_pool_serves_one_request(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: Literal["auto", "int8"], spec: ModelSpec
) -> None:
    """One byte less is refused with both numbers; exactly enough is what the ledger calls enough."""
    free(monkeypatch, GIB)
    config = replace(CONFIG, kv_dtype=kv_dtype)
    request, chunk = memory._demand(spec, config, "float32")
    pools = plan_pools(spec, replace(config, kv_memory=str(request + chunk)), "float32", CPU)
    assert KVCache(pools, BlockNames(b"", CONFIG.block_size)).shortage(CONFIG.max_model_len or 0) is None
    stored = "int8" if kv_dtype == "int8" else "float32"
    with pytest.raises(ConfigError, match=rf"needs .* [MK]iB in {stored} .*max_model_len.*kv_memory_too_small"):
        plan_pools(spec, replace(config, kv_memory=str(request + chunk - 1)), "float32", CPU)


def test_int8_holds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16: 32 bytes against 16 and a scale of 2."""
    free(monkeypatch, GIB)
    plain, int8 = (
        plan_pools(FULL, replace(CONFIG, kv_dtype=kv, kv_memory="100M"), "bfloat16", CPU)[0].blocks
        for kv in ("auto", "int8")
    )
    assert abs(int8 / plain - 32 / 18) < 1e-3


WIDE = replace(FULL, hidden=1024, ffn=4096, heads=16, head_dim=64, max_positions=4096)


def test_a_model_fits_with_its_kv_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte; and what runs is what was counted."""
    config = replace(CONFIG, backend="torch", max_model_len=None)
    kv = memory.least_kv(WIDE, config, "float32")
    needed = weight_bytes(WIDE, "float32") + kv + activation_bytes(WIDE, 128, 64, "float32")
    free(monkeypatch, needed)
    fit(WIDE, replace(config, kv_memory=str(kv)), "float32", CPU)
    free(monkeypatch, needed - 1)
    with pytest.raises(ConfigError, match=r"weights .*iB, KV of one request .*model_too_large") as refused:
        fit(WIDE, replace(config, kv_memory=str(kv)), "float32", CPU)
    assert "use a smaller model" in refused.value.fix, "this backend has no smaller integers, and KV is least already"


def test_what_other_models_will_need_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, backend="cpu")
    free(monkeypatch, 4 * GIB)
    alone = fit(WIDE, replace(config, max_model_len=None), "float32", CPU)
    beside = fit(WIDE, replace(config, max_model_len=None), "float32", CPU, taken=4 * GIB - 260 * MIB)
    assert alone.max_model_len == 4096 > (beside.max_model_len or 0)
    with pytest.raises(ConfigError, match=r"beside 3\.9\d GiB that other models may need"):
        fit(WIDE, config, "float32", CPU, taken=4 * GIB - 100 * MIB)


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.3, 0.2, 0.1])
@pytest.mark.parametrize("kv_memory", [None, "64M"])
@pytest.mark.parametrize("length", [None, 2048])
def test_only_what_is_enough_is_proposed(
    monkeypatch: pytest.MonkeyPatch, share: float, kv_memory: str | None, length: int | None
) -> None:
    config = replace(CONFIG, backend="cpu", max_model_len=length, max_num_batched_tokens=1024, kv_memory=kv_memory)
    free(monkeypatch, int(share * weight_bytes(WIDE, "float32")))
    with pytest.raises(ConfigError) as refused:
        fit(WIDE, config, "float32", CPU)
    if refused.value.fix.startswith("use"):
        assert share <= 0.2
        return
    for proposal in refused.value.fix.removeprefix("try ").split(", or "):
        words = iter(proposal.split())
        options = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words, words, strict=True)}
        changed = {name: int(value) if value.isdecimal() else value for name, value in options.items()}
        fit(WIDE, replace(config, **changed), "float32", CPU)  # type: ignore[arg-type]


class Accelerator:
    type = "cuda"


def test_a_device_pool_leaves_room_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the memory minus what is taken (the weights) and what a step's activations will take."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    config = replace(CONFIG, gpu_memory_utilization=0.5)
    budget = memory.kv_budget(FULL, config, "bfloat16", Accelerator())  # type: ignore[arg-type]
    assert 29.9 * GIB < budget < 30 * GIB
    tight = replace(CONFIG, gpu_memory_utilization=0.1)
    with pytest.raises(ConfigError, match="kv_memory_too_small"):
        plan_pools(FULL, tight, "bfloat16", Accelerator())  # type: ignore[arg-type]


# -- control groups ------------------------------------------------------------------------------------------------


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 32000000 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n"}
V2 = MEMINFO | {"proc/self/cgroup": "0::/box/job\n"}


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert available_memory(files(tmp_path, MEMINFO)) == 16 * GIB


def test_memory_of_the_tightest_group_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/box/"
    texts = {group + "memory.max": f"{4 * GIB}\n", group + "memory.current": f"{3 * GIB}\n"}
    texts |= {group + "memory.stat": f"anon 1\ninactive_file {GIB}\n", group + "job/memory.max": "max\n"}
    texts |= {group + "job/memory.current": f"{3 * GIB}\n"}
    assert available_memory(files(tmp_path, V2 | texts)) == 2 * GIB


def test_memory_inside_a_container(tmp_path: Path) -> None:
    """The path is the host's and is not there; the limits are at the mount point, which v1 names by controller."""
    texts = {"proc/self/cgroup": "7:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n"}
    texts |= {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n"}
    texts |= {"sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    root = files(tmp_path, MEMINFO | texts)
    assert available_memory(root) == GIB
    assert cpu_count(root) == 1
    assert group_limits(root) == (0.5, GIB)


@pytest.mark.parametrize(("quota", "most"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 10**6)])
def test_processors_are_capped_by_the_quota(tmp_path: Path, quota: str, most: int) -> None:
    root = files(tmp_path, V2 | {"sys/fs/cgroup/box/cpu.max": quota + "\n"})
    assert 1 <= cpu_count(root) <= most
    assert cpu_count(root) == min(most, cpu_count(tmp_path / "nothing"))
    assert group_limits(root) == (None if quota.startswith("max") else int(quota.split()[0]) / 100000, None)
