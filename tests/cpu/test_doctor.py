"""``penstock doctor``: what it reads of a host, what it says of it, and that it runs on this one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from penstock.bench import doctor
from penstock.bench.doctor import Checkup, best_set, decode_limit, examine, folder_for_models, prompt_limit
from penstock.bench.doctor_report import concerns, table
from penstock.bench.limits import Limits
from penstock.cli.app import app
from penstock.runtime.watch import Watch, between, count, watch

GIB = 1 << 30
AVX2 = frozenset({"avx", "avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
RATES = Limits(42e9, 100e9, 1e9, 400e9)
STILL = Watch(10.0, 0.0, 0.0, (), 0.0, 0.0, 0.0, 0, 0)
SOUND = Checkup(
    processor="Some CPU", usable=("avx2", "portable"), native_error="", features=AVX2, processors=2, online=2,
    threads=2, memory=20 * GIB, memory_total=24 * GIB, swap_used=0, windows=(RATES,) * 5, clocks=None,
    disk=1e9, disk_error="", folder="/models", devices=(), linked=True, nvidia=0, watch=STILL,
    quota=None, memory_limit=None,
)  # fmt: skip


def host(root: Path, stat: str, processes: dict[int, str], more: dict[str, str] | None = None) -> Path:
    texts = {"proc/stat": stat, "proc/self/cgroup": "0::/box\n"} | (more or {})
    texts |= {f"proc/{pid}/stat": line for pid, line in processes.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def process(pid: int, name: str, user: int, system: int) -> str:
    return f"{pid} ({name}) R 1 1 1 0 -1 0 0 0 0 0 {user} {system} 0 0 20 0 1 0 5\n"


def test_a_watch_is_what_the_kernel_counted(tmp_path: Path) -> None:
    """Ten seconds of two processors at 100 ticks: 100 stolen, 500 ours, 400 of a compiler, 200 of processes gone."""
    cores = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    before = count(
        host(
            tmp_path / "before",
            "cpu  1000 0 0 5000 0 0 0 10 0 0\ncpu0 1 2 3\n",
            {7: process(7, "us", 100, 0), 8: process(8, "c) c\n", 40, 10)},
            {
                cores: "3\n",
                "proc/vmstat": "pswpin 5\npswpout 1\n",
                "proc/pressure/cpu": "some avg10=1.00 total=1000000\nfull avg10=0.00 total=7\n",
                "sys/fs/cgroup/box/cpu.stat": "throttled_usec 500000\n",
            },
        )
    )
    after = count(
        host(
            tmp_path / "after",
            "cpu  1900 150 50 5800 0 0 0 110 0 0\ncpu0 1 2 3\n",
            {7: process(7, "us", 500, 100), 8: process(8, "c) c\n", 340, 110), 9: process(9, "idle", 0, 0)},
            {
                cores: "5\n",
                "proc/vmstat": "pswpin 6\npswpout 11\n",
                "proc/pressure/cpu": "some avg10=1.00 total=4000000\nfull avg10=0.00 total=7\n",
                "sys/fs/cgroup/box/cpu.stat": "throttled_usec 2500000\n",
            },
        )
    )
    seconds = 1000 / os.sysconf("SC_CLK_TCK")
    seen = between(before, after, seconds, 0.2, 0.05, own=7)
    assert (seen.stolen, seen.others, seen.stalled) == (100 / 2000, 0.6, 0.2 / seconds)
    assert seen.busiest == (("c) c?", 8, 0.4),)
    assert (seen.longest, seen.throttled, seen.hot, seen.swapped) == (0.05, 2.0, 2, 11)
    assert seen.waited == pytest.approx(3.0 / seconds)
    again = replace(seen, longest=0.01, stolen=0.0, busiest=(("c) c?", 8, 0.2), ("us", 7, 0.3)))
    joined = Watch.joined([seen, again])
    assert joined.seconds == pytest.approx(2 * seconds) and joined.stolen == pytest.approx(seen.stolen / 2)
    assert joined.busiest == (("c) c?", 8, 0.3), ("us", 7, 0.15)) and joined.longest == 0.05
    assert (joined.hot, joined.throttled, joined.waited) == (4, 4.0, pytest.approx(seen.waited))


def test_clocks_are_those_of_the_fastest_core(tmp_path: Path) -> None:
    assert doctor._clocks(tmp_path) is None
    for core, now in ((0, 800_000), (1, 2_100_000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        for name, value in (("scaling_cur_freq", now), ("cpuinfo_max_freq", 4_800_000), ("scaling_governor", "x\n")):
            (folder / name).write_text(str(value))
    assert doctor._clocks(tmp_path) == (2.1, 4.8, "x")
    (tmp_path / "sys/devices/system/cpu/cpu1/cpufreq/base_frequency").write_text("2500000")
    assert doctor._clocks(tmp_path) == (2.1, 2.5, "x")


def test_what_one_measurement_met_is_not_what_the_machine_is() -> None:
    met = replace(RATES, read_rate=9e9, fp32=10e9)
    assert Limits.median([RATES, met, RATES]) == RATES and concerns(replace(SOUND, windows=(RATES,) * 4 + (met,))) == []


def test_a_watch_sees_what_takes_its_time(tmp_path: Path) -> None:
    """Without a /proc nothing is known but the clock, which shows every stop."""
    seen = watch(0.05, tmp_path)
    assert 0.05 <= seen.seconds < 5 and seen.stolen == seen.others == 0 and 0 <= seen.longest <= seen.seconds
    assert seen.stalled <= 1 and watch(0.05).stolen <= 1


def test_a_sound_machine() -> None:
    assert concerns(SOUND) == []
    text = table(SOUND)
    assert "nothing is off" in text and "avx2, of avx2, portable" in text
    assert f"0.63 GB of weights (Qwen3-0.6B, 8 bits) decodes at most {42 / 0.6333:.0f} tokens/s" in text
    assert 42e9 / decode_limit(RATES) == pytest.approx(0.633e9, rel=1e-3)
    assert "no quota, no limit of memory" in text
    assert "1.5 processors, 4.0 GiB  ->  more threads" in table(replace(SOUND, quota=1.5, memory_limit=4 * GIB))
    assert prompt_limit(RATES) == pytest.approx(2 * 0.44e9 * 512 / 400e9, rel=0.1)


OFF = {
    "native kernels are missing": {"usable": (), "native_error": "No module named _native"},
    "not the processor's best": {"features": AVX512},
    "processor is old": {"features": frozenset({"avx"}), "usable": ("portable",)},
    "GPU is not used": {"nvidia": 1},
    "was not measured": {"disk": None, "disk_error": "permission denied"},
    "out of reach": {"online": 8},
    "Fewer threads": {"threads": 1},
    "Little memory": {"memory": GIB},
    "swapping": {"watch": replace(STILL, swapped=9)},
    "hypervisor": {"watch": replace(STILL, stolen=0.05)},
    "Other processes": {"watch": replace(STILL, others=0.4, busiest=(("cc1plus", 8, 0.4),))},
    "quota": {"watch": replace(STILL, throttled=1.0)},
    "too hot": {"watch": replace(STILL, hot=1)},
    "interrupted": {"watch": replace(STILL, stalled=0.02, longest=0.1)},
    "more to do than processors": {"watch": replace(STILL, waited=0.3)},
    "clocked low": {"clocks": (1.2, 3.5, "powersave")},
    "reading is not steady": {"windows": (RATES,) * 3 + (replace(RATES, read_rate=30e9),) * 2},
    "int8 products is not steady": {"windows": (RATES,) * 3 + (replace(RATES, int8=500e9),) * 2},
}


@pytest.mark.parametrize("what", OFF)
def test_what_is_off_is_named(what: str) -> None:
    sick = replace(SOUND, **OFF[what])  # type: ignore[arg-type]
    (concern,) = concerns(sick)
    assert what in concern.what and concern.why and concern.fix
    assert concern.what in table(sick) and "nothing is off" not in table(sick)


@pytest.mark.parametrize("name", ["amx", "avx512_vnni", "i8mm", "avx512", "avx2"])
def test_what_no_processor_has_run_is_said(name: str) -> None:
    report = table(replace(SOUND, usable=(name, "portable")))
    assert ("untested on hardware" in report) == (name in ("amx", "i8mm"))
    assert name in doctor.NEEDS


def test_the_kernels_that_a_processor_could_run() -> None:
    every = frozenset(name for needs in doctor.NEEDS.values() for name in needs)
    found = [best_set(f) for f in (every, AVX512 | {"avx512_vnni"}, AVX512, AVX2, frozenset({"sse2"}))]
    assert found == ["amx", "avx512_vnni", "avx512", "avx2", "portable"]
    flags = doctor._processor(Path("/")).get("flags", "")
    assert not (doctor.USABLE and flags) or best_set(frozenset(flags.split())) == doctor.USABLE[0]


def test_gpus_and_their_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two cards, of which one cannot read the other's memory."""
    monkeypatch.setattr(doctor, "Gauge", lambda threads: SimpleNamespace(window=lambda *_: RATES))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="A card", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: i < j)
    found = examine(0.01, tmp_path)
    assert found.devices == (("A card", 80 * GIB),) * 2 and not found.linked
    assert "A card 80 GiB, A card 80 GiB  ->  they do not reach each other's memory" in table(found)


def test_folders(tmp_path: Path) -> None:
    assert folder_for_models(str(tmp_path / "a" / "b")) == tmp_path
    rate, why = doctor._measure_disk(tmp_path)
    assert rate is not None and rate > 1e6 and not why and not list(tmp_path.iterdir())
    assert doctor._measure_disk(tmp_path / "nowhere") == (None, "no such file or directory")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WINDOWS", 2)
    done = CliRunner().invoke(app, ["doctor", "--seconds", "0.3", "--json", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["watch"]["seconds"] >= 0.3 and found["threads"] == 1 and found["disk"] > 1e6
    assert min(found["limits"].values()) > 1e7 and found["memory"] > GIB // 4
    assert found["usable"] == list(doctor.USABLE) and {c["what"] for c in found["off"]} >= (
        {"Fewer threads than processors"} if found["processors"] > 1 else set()
    )
