"""One measured run of a batch of prompts, in a process of its own: ``python -m penstock.bench.side_penstock JOB``.

What the sides of a comparison share is here; each has a module of its own, so that it loads nothing of the other.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``prompts`` prompts of ``inputs`` random tokens, each completed greedily by exactly ``outputs`` tokens.

    Attributes:
        kv_bytes: of K and V of all these tokens.
    """

    model: str
    prompts: int
    inputs: int
    outputs: int
    threads: int
    vocab_size: int
    kv_bytes: int

    def tokens(self) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(self.vocab_size) for _ in range(self.inputs)] for _ in range(self.prompts)]


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the first prompt handed over to the last token received, loading and a warm-up before them not
    counted; ``peak_bytes`` is the process's greatest resident memory, loading included."""

    seconds: float
    tokens: int
    peak_bytes: int


def contend(complete: Callable[[Job], Callable[[int, int], int]]) -> None:
    """Carries out the job in argv and prints the Run. ``complete`` loads the model and returns a function that
    completes so many prompts by so many tokens and returns how many tokens came."""
    job = Job(**json.loads(sys.argv[1]))
    go = complete(job)
    go(2, 4)
    started = time.perf_counter()
    tokens = go(job.prompts, job.outputs)
    print(json.dumps(asdict(Run(time.perf_counter() - started, tokens, peak_memory()))))  # noqa: T201


def peak_memory() -> int:
    """Of this process, in bytes. getrusage would count what the parent had when it forked."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
