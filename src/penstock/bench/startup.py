"""Time from the start of a process to its first token."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from penstock.base import EngineError

PROMPT = "Once upon a time"


@dataclass(frozen=True, slots=True)
class StartupReport:
    """Seconds, measured from outside, from spawning the process to the first byte of text it prints.

    Attributes:
        median_s, min_s, max_s: of ``runs_s``.
        first_s: the run before them, which also fills the file cache.
        runs_s: in the order they ran.
        exit_s: median time until the process, asked for one token, is gone.
        command: what was run; any reader can run it too.
    """

    median_s: float
    min_s: float
    max_s: float
    first_s: float
    runs_s: tuple[float, ...]
    exit_s: float
    command: tuple[str, ...]
    date: str
    machine: str
    cpus: int
    python: str


def measure_startup(model: str | None, *, runs: int = 5) -> StartupReport:
    """Runs ``penstock run`` once to warm the file cache and then ``runs`` times, one after the other.

    Raises:
        EngineError: (bench_run_failed) a run printed no text or failed; its own message is the cause.
    """
    arguments = ["run", "--max-tokens", "1", "--temperature", "0", *([model] if model else []), PROMPT]
    argv = [sys.executable, "-m", "penstock.cli", *arguments]
    first, _ = _time_one(argv)
    timed = [_time_one(argv) for _ in range(runs)]
    to_first = tuple(round(seconds, 4) for seconds, _ in timed)
    return StartupReport(
        median_s=statistics.median(to_first),
        min_s=min(to_first),
        max_s=max(to_first),
        first_s=round(first, 4),
        runs_s=to_first,
        exit_s=round(statistics.median(exit for _, exit in timed), 4),
        command=("penstock", *arguments),
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=platform.python_version(),
    )


def _time_one(argv: list[str]) -> tuple[float, float]:
    """(seconds to the first byte of output, seconds to the end)."""
    started = time.perf_counter()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as run:
        assert run.stdout is not None
        first_byte = run.stdout.read(1)
        to_first = time.perf_counter() - started
        _, errors = run.communicate()
        to_end = time.perf_counter() - started
    if run.returncode != 0 or not first_byte:
        raise EngineError(
            "bench_run_failed",
            "A measured run did not produce a token",
            why=f"exit code {run.returncode}; {errors.decode(errors='replace').strip()[-2000:]}",
            fix="run the command by itself",
        )
    return to_first, to_end
