"""What this machine can do for a model, measured, and what keeps it from doing more."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.bench.checkpoints import QWEN3_06B
from penstock.bench.job import Job
from penstock.bench.limits import Gauge, Limits, limit_seconds
from penstock.runtime.host import ROOT, available_memory, cpu_count, field, group_limits, text
from penstock.runtime.watch import Watch, watch
from penstock.spec.hf import model_spec
from penstock.spec.quantization import FORMATS
from penstock.spec.sizing import parameters

try:
    from penstock.kernels import _native
except ImportError as error:  # not built, or built for another system
    USABLE: tuple[str, ...] = ()
    NATIVE_ERROR = str(error)
else:
    USABLE, NATIVE_ERROR = tuple(_native.usable()), ""

YARDSTICK = model_spec(QWEN3_06B)
BITS, PROMPT = 8, 512
WEIGHTS = int(parameters(YARDSTICK) * (FORMATS["int8"].bytes(1, 32) / 32 if FORMATS["int8"] else 1))
"""Bytes of Qwen3-0.6B with weights of 8 bits, the model that figures are put into words with."""

NEEDS = {
    "amx": ("amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_vnni"),
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_vnni": ("avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma", "f16c"),
    "i8mm": ("i8mm", "asimddp"),
    "dotprod": ("asimddp",),
}
"""Sets of kernels, best first, and the names that Linux has for what they need."""

UNTESTED = {"amx": "products with small integers"} | dict.fromkeys(("i8mm", "dotprod"), "all of them")
"""What of a set no processor has run yet: emulated, it has the bits of the others (``make emulate``). How macOS is
asked for ``i8mm`` and ``dotprod`` has not been run either."""

WINDOWS = 5
"""Measurements, spread over the watch, whose median is told: what one of them met is not what the machine is."""
BRIEF = (2, 0.15)
"""Least tries and seconds of each rate in one of them."""

STREAM = 128 << 20
PIECE = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """Bytes, seconds, and bytes or operations a second.

    Attributes:
        usable: sets of native kernels that run here, the chosen one first; none if ``native_error`` says why not.
        features: what the processor says it can do, in Linux's words.
        processors: that this process may keep busy, of ``online`` ones; ``threads`` are those it will use.
        quota, memory_limit: processors and bytes that control groups allow; None without a limit.
        windows: the rates in each of WINDOWS measurements.
        clocks: (GHz that the fastest core had after a measurement, GHz it should have, governor); None if not told.
        disk: bytes a second read from ``folder``, None if ``disk_error`` says why not.
        devices: name and bytes of each GPU; ``linked`` if all reach each other's memory.
        nvidia: GPUs that the driver knows of, whether or not torch does.
    """

    processor: str
    usable: tuple[str, ...]
    native_error: str
    features: frozenset[str]
    processors: int
    online: int
    threads: int
    memory: int
    memory_total: int
    swap_used: int
    quota: float | None
    memory_limit: int | None
    windows: tuple[Limits, ...]
    clocks: tuple[float, float, str] | None
    disk: float | None
    disk_error: str
    folder: str
    devices: tuple[tuple[str, int], ...]
    linked: bool
    nvidia: int
    watch: Watch

    @property
    def limits(self) -> Limits:
        return Limits.median(self.windows)


@dataclass(frozen=True, slots=True)
class Concern:
    """Something that is off: what, why with numbers, what to do."""

    what: str
    why: str
    fix: str


def examine(seconds: float, folder: Path, root: Path = ROOT) -> Checkup:
    """Watches the host for so many seconds, and measures before, after and meanwhile. ``folder``: where models lie, and
    a file of 128 MiB is written and read."""
    processors = cpu_count(root)
    threads = min(processors, torch.get_num_threads())  # the latter knows OMP_NUM_THREADS
    gauge = Gauge(threads)
    windows, clocks, seen = [gauge.window(*BRIEF)], [_clocks(root)], []
    for _ in range(WINDOWS - 1):
        seen.append(watch(seconds / (WINDOWS - 1), root))
        windows.append(gauge.window(*BRIEF))
        clocks.append(_clocks(root))
    disk, disk_error = _measure_disk(folder)
    quota, memory_limit = group_limits(root)
    memory, about = root / "proc/meminfo", _processor(root)
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return Checkup(
        processor=about.get("model name", about.get("CPU part", "unknown processor")),
        usable=USABLE,
        native_error=NATIVE_ERROR,
        features=frozenset(about.get("flags", about.get("Features", "")).split()),
        processors=processors,
        online=os.cpu_count() or 1,
        threads=threads,
        memory=available_memory(root),
        memory_total=1024 * field(memory, "MemTotal:"),
        swap_used=1024 * (field(memory, "SwapTotal:") - field(memory, "SwapFree:")),
        quota=quota,
        memory_limit=memory_limit,
        windows=tuple(windows),
        clocks=max(filter(None, clocks), default=None),
        disk=disk,
        disk_error=disk_error,
        folder=str(folder),
        devices=tuple((p.name, p.total_memory) for p in properties),
        linked=all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs),
        nvidia=len(list((root / "proc/driver/nvidia/gpus").glob("*"))),
        watch=Watch.joined(seen),
    )


def _clocks(root: Path) -> tuple[float, float, str] | None:
    """Of the fastest core now; what it should have is its base, or its most where no base is told."""
    found = []
    for core in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        now, base, most = (
            int(text(core / name) or 0) for name in ("scaling_cur_freq", "base_frequency", "cpuinfo_max_freq")
        )
        if now and (base or most):
            found.append((now / 1e6, (base or most) / 1e6, text(core / "scaling_governor").strip()))
    return max(found, default=None)


def _processor(root: Path) -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    first = text(root / "proc/cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _measure_disk(folder: Path) -> tuple[float | None, str]:
    """The better of two reads of a new file that the page cache was asked to forget; or why there is none."""
    rates = []
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(STREAM // PIECE):
                file.write(os.urandom(PIECE))
            os.fsync(file.fileno())
            piece = bytearray(PIECE)
            for _ in range(2):
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                started = time.perf_counter()
                while file.readinto(piece):
                    pass
                rates.append(STREAM / (time.perf_counter() - started))
    except OSError as error:
        return None, (error.strerror or str(error)).lower()
    return max(rates), ""


def decode_limit(limits: Limits) -> float:
    """Most tokens a second of one request: each reads all weights."""
    return limits.read_rate / WEIGHTS


def prompt_limit(limits: Limits) -> float:
    """Least seconds for a prompt of PROMPT tokens."""
    job = Job(model="", prompts=1, inputs=PROMPT, outputs=1, threads=1, vocab_size=0, kv_bytes=0)
    return limit_seconds(YARDSTICK, job, limits, BITS)


def best_set(features: frozenset[str]) -> str:
    """The best kernels that a processor with these features could run."""
    return next((name for name, needs in NEEDS.items() if features.issuperset(needs)), "portable")


def folder_for_models(cache: str) -> Path:
    """The folder of the hub's cache, or the nearest one around it that exists."""
    path = Path(cache).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
