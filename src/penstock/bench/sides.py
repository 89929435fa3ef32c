"""Contenders as processes: each gets a job as JSON in argv and answers with its run as the last line of JSON."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import asdict

from penstock.base import EngineError
from penstock.bench.job import Job, Run

SIDES = {
    "penstock": "penstock.bench.side_penstock",
    "transformers": "penstock.bench.side_transformers",
    "llama.cpp": "penstock.bench.side_llama",
    "openvino": "penstock.bench.side_openvino",
    "vllm": "penstock.bench.side_vllm",
}
HERE = ("penstock", "transformers")
"""Those that run in this process's own environment; the others have venvs of their own."""


def command(name: str, job: Job, head: tuple[str, ...] = (sys.executable,)) -> tuple[str, ...]:
    """``head``: the interpreter, and what is put before it."""
    return (*head, "-m", SIDES[name], json.dumps(asdict(job)))


def run_side(argv: tuple[str, ...], timeout: float | None = None) -> Run:
    """Raises EngineError: (bench_run_failed) its own message is the cause."""
    output = run_program(argv, timeout, said='{"seconds"')
    answers = [line for line in output.splitlines() if line.startswith('{"seconds"')]
    return Run(**json.loads(answers[-1]))


def run_program(argv: tuple[str, ...], timeout: float | None = None, said: str = "") -> str:
    """What it printed, in which a line begins with ``said``. Raises EngineError: (bench_run_failed)."""
    fix = f"run it by itself: {shlex.join(argv)}"
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        why = f"it took longer than {timeout:.0f} s"
        raise EngineError("bench_run_failed", "A measured run failed", why=why, fix=fix) from None
    if done.returncode != 0 or (said and f"\n{said}" not in f"\n{done.stdout}"):
        why = f"exit code {done.returncode}; {done.stderr.strip()[-2000:]}"
        raise EngineError("bench_run_failed", "A measured run failed", why=why, fix=fix)
    return done.stdout
