"""What processes of this machine take: processor time, memory, energy."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
ZONES = "sys/class/powercap"


def family(pid: int, root: Path = ROOT) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        words = _text(folder / "stat").rpartition(")")[2].split()
        if words:
            parents.setdefault(int(words[1]), []).append(int(folder.name))
    found, at = [pid], 0
    while at < len(found):
        found += parents.get(found[at], [])
        at += 1
    return found


def cpu_seconds(pid: int, root: Path = ROOT) -> float:
    """Of a process and its descendants since they began."""
    ticks = 0
    for member in family(pid, root):
        words = _text(root / f"proc/{member}/stat").rpartition(")")[2].split()
        ticks += sum(map(int, words[11:13])) if words else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int, root: Path = ROOT) -> int:
    """Of a process and its descendants, now. Pages that they share count for each."""
    words = [_text(root / f"proc/{member}/statm").split() for member in family(pid, root)]
    return sum(int(each[1]) for each in words if each) * os.sysconf("SC_PAGESIZE")


def growth(sizes: Sequence[int]) -> float | None:
    """From the mean of the second tenth of the readings to that of the last: 0.05 is 5 %."""
    tenth = len(sizes) // 10
    if tenth < 1:
        return None
    return sum(sizes[-tenth:]) / max(1, sum(sizes[tenth : 2 * tenth])) - 1


def peak_bytes(pid: int, root: Path = ROOT) -> int:
    """Greatest resident memory of each, summed: never less than what they had together at a time."""
    total = 0
    for member in family(pid, root):
        found = re.search(r"VmHWM:\s+(\d+) kB", _text(root / f"proc/{member}/status"))
        total += 1024 * int(found[1]) if found else 0
    return total


def allow_many_connections() -> None:
    """Raises this process's limit of open files as far as it may be: a stream takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True, slots=True)
class Energy:
    """Counters of the packages of this machine (RAPL), in microjoules, each with where it starts over.

    Attributes:
        why: they cannot be read; "" if they can.
    """

    counters: tuple[tuple[int, int], ...]
    why: str = ""

    def joules_since(self, before: Energy) -> float | None:
        if self.why or before.why or len(self.counters) != len(before.counters):
            return None
        pairs = zip(self.counters, before.counters, strict=True)
        return sum((now - was) % (span + 1) for (now, span), (was, _) in pairs) / 1e6


def read_energy(root: Path = ROOT) -> Energy:
    zones = sorted(p for p in (root / ZONES).glob("*") if re.fullmatch(r"intel-rapl:\d+", p.name))
    if not zones:
        return Energy((), "this machine has no counters of energy (powercap)")
    try:
        counters = [[int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")] for zone in zones]
    except (OSError, ValueError):
        return Energy((), "counters of energy are for root to read")
    return Energy(tuple((now, span) for now, span in counters))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
