"""What else this host does while a process works: time that others take from it, and stalls."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.runtime.host import ROOT, field, groups, text

STALL = 200_000
"""Nanoseconds between two looks at the clock that count as a stall; timer interrupts take a few thousand."""
NAMED = 3
"""Processes that are named, those that took most."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Some seconds of a host, during which one thread of this process did nothing but look at the clock.

    Attributes:
        stolen: share of the processors' time that the hypervisor gave to other machines.
        others: processors that other processes kept busy.
        busiest: (name, pid, processors) of those that took most.
        stalled: share of the time in which the thread was stopped; ``longest`` is the longest stop in seconds.
        throttled: seconds that control groups held their processes back.
        hot: times that a core slowed down because of its heat.
        swapped: pages that went to swap or came from it.
        waited: share of the time in which some process waited for a processor (Linux's pressure stall information).
    """

    seconds: float
    stolen: float
    others: float
    busiest: tuple[tuple[str, int, float], ...]
    stalled: float
    longest: float
    throttled: float
    hot: int
    swapped: int
    waited: float = 0.0

    @classmethod
    def joined(cls, parts: Sequence[Watch]) -> Watch:
        """Of several watches as of one."""
        seconds = sum(part.seconds for part in parts)

        def mean(name: str) -> float:
            return float(sum(getattr(part, name) * part.seconds for part in parts) / seconds)

        taken: dict[tuple[str, int], float] = {}
        for part in parts:
            for name, pid, processors in part.busiest:
                taken[name, pid] = taken.get((name, pid), 0.0) + processors * part.seconds / seconds
        busiest = sorted(((name, pid, round(n, 2)) for (name, pid), n in taken.items()), key=lambda p: -p[2])
        return cls(
            seconds,
            mean("stolen"),
            mean("others"),
            tuple(process for process in busiest[:NAMED] if process[2] > 0),
            mean("stalled"),
            max(part.longest for part in parts),
            sum(part.throttled for part in parts),
            sum(part.hot for part in parts),
            sum(part.swapped for part in parts),
            mean("waited"),
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """What the kernel has counted since it started, in the units of /proc.

    Attributes:
        ticks: of all processors: user, nice, system, idle, iowait, irq, softirq, steal.
        processes: pid to name and ticks.
        waited: seconds.
    """

    ticks: tuple[int, ...]
    processes: dict[int, tuple[str, int]]
    throttled: float
    hot: int
    swapped: int
    waited: float = 0.0


def watch(seconds: float, root: Path = ROOT) -> Watch:
    before = count(root)
    started = time.perf_counter_ns()
    end, last, lost, longest = started + int(seconds * 1e9), started, 0, 0
    while (now := time.perf_counter_ns()) < end:
        if now - last > STALL:
            lost, longest = lost + now - last, max(longest, now - last)
        last = now
    if now - last > STALL:
        lost, longest = lost + now - last, max(longest, now - last)
    return between(before, count(root), (now - started) / 1e9, lost / 1e9, longest / 1e9, os.getpid())


def count(root: Path = ROOT) -> Counters:
    ticks = tuple(int(word) for word in text(root / "proc/stat").partition("\n")[0].split()[1:9])
    processes = {}
    for folder in (root / "proc").glob("[0-9]*"):
        head, _, rest = text(folder / "stat").rpartition(")")
        if rest:
            words = rest.split()
            name = "".join(c if c.isprintable() else "?" for c in head.partition("(")[2])
            processes[int(folder.name)] = (name, int(words[11]) + int(words[12]))
    stats = [group / "cpu.stat" for group in groups(root, "cpu")]
    cores = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return Counters(
        ticks or (0,) * 8,
        processes,
        max((field(s, "throttled_usec") / 1e6 + field(s, "throttled_time") / 1e9 for s in stats), default=0.0),
        sum(int(text(core) or 0) for core in cores),
        field(root / "proc/vmstat", "pswpin") + field(root / "proc/vmstat", "pswpout"),
        int(text(root / "proc/pressure/cpu").partition("\n")[0].rpartition("total=")[2] or 0) / 1e6,
    )


def between(before: Counters, after: Counters, seconds: float, lost: float, longest: float, own: int) -> Watch:
    """``own`` is this process, which is none of the others; ``lost`` are its seconds of stalls."""
    ticks = [b - a for a, b in zip(before.ticks, after.ticks, strict=True)]
    user, nice, system, _, _, irq, softirq, stolen = ticks
    rate = os.sysconf("SC_CLK_TCK") * seconds
    taken = {pid: (name, now - before.processes.get(pid, (name, 0))[1]) for pid, (name, now) in after.processes.items()}
    mine = taken.pop(own, ("", 0))[1]
    busiest = sorted(((name, pid, round(n / rate, 2)) for pid, (name, n) in taken.items()), key=lambda p: -p[2])
    return Watch(
        seconds,
        stolen / max(1, sum(ticks)),
        max(0.0, (user + nice + system + irq + softirq - mine) / rate),
        tuple(process for process in busiest[:NAMED] if process[2] > 0),
        lost / seconds,
        longest,
        after.throttled - before.throttled,
        after.hot - before.hot,
        after.swapped - before.swapped,
        min(1.0, (after.waited - before.waited) / seconds),  # its clock and this one differ by a tick
    )
