"""One measured run of a batch of prompts, in a process of its own: ``python -m penstock.bench.side_penstock JOB``.

What the sides of a comparison share is here; each has a module of its own, so that it loads nothing of the other.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

Prompts = list[list[int]]
Complete = Callable[[Prompts, int], int]
"""Completes prompts by so many tokens each, and says how many came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``prompts`` prompts of ``inputs`` random tokens, each completed greedily by exactly ``outputs`` tokens.

    Attributes:
        kv_bytes: of K and V of all these tokens.
        shared: tokens at the head of each prompt that all have in common. If any, a cache of prefixes is on.
        options: what one side alone understands, by its own names.
    """

    model: str
    prompts: int
    inputs: int
    outputs: int
    threads: int
    vocab_size: int
    kv_bytes: int
    shared: int = 0
    options: dict[str, str] = field(default_factory=dict)

    def tokens(self, seed: int = 0) -> Prompts:
        rng = random.Random(seed)
        head = [rng.randrange(self.vocab_size) for _ in range(self.shared)]
        own = range(self.inputs - self.shared)
        return [head + [rng.randrange(self.vocab_size) for _ in own] for _ in range(self.prompts)]


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the first prompt handed over to the last token received, loading and a warm-up before them not
    counted.

    Attributes:
        peak_bytes: the process's greatest resident memory, loading included.
        ready_s: from the start of the process to the end of the warm-up: two other prompts and four tokens of each, or
            as many as there are.
        loaded_s: the same from where loading began, imports not counted; 0 in results of before it was measured.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    ready_s: float
    loaded_s: float = 0.0


def contend(load: Callable[[Job], Complete]) -> None:
    """Carries out the job in argv and prints the Run."""
    job = Job(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    complete = load(job)
    complete(job.tokens(seed=1)[:2], min(4, job.outputs))
    loaded, ready, prompts = time.perf_counter() - began, age(), job.tokens()
    started = time.perf_counter()
    tokens = complete(prompts, job.outputs)
    run = Run(time.perf_counter() - started, tokens, peak_memory(), ready, loaded)
    print(json.dumps(asdict(run)), flush=True)  # noqa: T201


def age() -> float:
    """Seconds since this process was started, which was a while before its first line of Python."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """Of this process, in bytes. getrusage would count what the parent had when it forked."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
