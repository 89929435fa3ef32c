"""What this host lets the process use: processors and memory, control groups (v2 and v1) included."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NO_LIMIT = 1 << 60
"""Bytes from which control groups (v1) mean that there is no limit."""
KEPT = 128 << 20
MAX_MMAP_THRESHOLD = 32 << 20  # glibc accepts no more


def cpu_count(root: Path = ROOT) -> int:
    """Processors this process may keep busy: its affinity mask, capped by the quota of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups(root, "cpu"):
        quota, period = _quota(group)
        if quota > 0 and period > 0:
            allowed = min(allowed, max(1, math.ceil(quota / period)))
    return allowed


def group_limits(root: Path = ROOT) -> tuple[float | None, int | None]:
    """(processors, bytes) that the tightest of the control groups allow; None where none says."""
    quotas = [quota / period for quota, period in map(_quota, groups(root, "cpu")) if quota > 0 and period > 0]
    named = (group / name for group in groups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes"))
    sizes = [size for path in named if (size := _number(path)) is not None and size < NO_LIMIT]
    return min(quotas, default=None), min(sizes, default=None)


def keep_freed_memory() -> None:
    """Lets glibc keep what large tensors free, instead of handing it back to the kernel after each operation.

    Otherwise every step faults the same pages in again, which takes longer than many an operation on them. At most KEPT
    bytes stay with the process. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be taken without swapping: the least of MemAvailable and what each control group has left."""
    available = _mem_available(root)
    for group in groups(root, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number(group / limit_name), _number(group / usage_name)
            if limit is not None and usage is not None:
                # Pages of files that nobody used lately count as usage and are given up on demand.
                available = min(available, limit - usage + min(usage, field(group / "memory.stat", cache_name)))
    return max(0, available)


def _mem_available(root: Path) -> int:
    kilobytes = field(root / "proc/meminfo", "MemAvailable:")
    if kilobytes:
        return kilobytes * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's control group and of all groups around it."""
    mount = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        inner = base / path.lstrip("/")
        # In a container the path may be the host's, which is not there; the mount point itself always counts.
        yield base
        while inner != base and base in inner.parents:
            yield inner
            inner = inner.parent


def _quota(group: Path) -> tuple[float, float]:
    words = text(group / "cpu.max").split()
    if not words:
        words = [text(group / "cpu.cfs_quota_us").strip() or "max", text(group / "cpu.cfs_period_us").strip() or "0"]
    return (-1.0, 0.0) if words[0] == "max" else (float(words[0]), float(words[1]))


def _number(path: Path) -> int | None:
    word = text(path).strip()
    return int(word) if word.isdecimal() else None


def field(path: Path, name: str) -> int:
    """The number after a name at the head of a line; 0 without one."""
    for line in text(path).splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0


def text(path: Path) -> str:
    """Nothing of a file that cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
