"""Tokens a second of a batch of prompts, beside a peer and beside what the machine allows.

Each round runs every contender once, in a process of its own, in an order that turns from round to round; before and
after it the machine's own limits are measured, since they move with whatever else it does.
"""

from __future__ import annotations

import platform
import shlex
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from penstock.bench.checkpoints import write_checkpoint
from penstock.bench.job import Job, Run
from penstock.bench.limits import Limits, limit_seconds, measure_limits
from penstock.bench.sides import command, run_side
from penstock.spec import ModelSpec
from penstock.spec.hf import read_model_spec
from penstock.spec.sizing import kv_bytes_per_token, weight_bytes

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Side:
    """One contender over all rounds.

    Attributes:
        tokens_per_s: median; ``each`` has the rounds in order.
        share: of the speed that the measured limits allow: seconds to read the weights and the KV seen for each step of
            decoding, and to multiply the prompts' rows, over the seconds taken; median.
        excess_bytes: greatest resident memory of all rounds, beyond weights and KV.
    """

    name: str
    tokens_per_s: float
    each: tuple[float, ...]
    share: float
    peak_bytes: int
    excess_bytes: int
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """``ratio``: median over the rounds of the first side's speed over the second's, None without a peer."""

    sides: tuple[Side, ...]
    ratio: float | None
    limits: tuple[Limits, ...]
    weight_bytes: int
    kv_bytes: int
    prompts: int
    inputs: int
    outputs: int
    threads: int
    date: str
    machine: str
    torch: str


def measure_throughput(
    model: Path | None, *, peer: str | None, prompts: int, inputs: int, outputs: int, threads: int, rounds: int
) -> ThroughputReport:
    """``model``: a folder; without one, random weights in the shapes of Qwen3-0.6B, written for the occasion.

    Raises:
        EngineError: (bench_run_failed) a run failed; its own message is the cause.
    """
    with TemporaryDirectory(prefix="penstock-bench-") as temporary:
        folder = model or write_checkpoint(Path(temporary))
        spec = read_model_spec(folder)
        padded = -(-(inputs + outputs) // BLOCK) * BLOCK
        job = Job(
            model=str(folder),
            prompts=prompts,
            inputs=inputs,
            outputs=outputs,
            threads=threads,
            vocab_size=spec.vocab_size,
            kv_bytes=prompts * padded * kv_bytes_per_token(spec, spec.dtype),
        )
        names = ["penstock", *([peer] if peer else [])]
        runs: dict[str, list[Run]] = {name: [] for name in names}
        limits = [measure_limits(threads)]
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                runs[name].append(run_side(command(name, job)))
            limits.append(measure_limits(threads))
    return _report(spec, job, runs, limits)


def _report(spec: ModelSpec, job: Job, runs: dict[str, list[Run]], limits: list[Limits]) -> ThroughputReport:
    weights = weight_bytes(spec, spec.dtype)
    around = [before.at_best(after) for before, after in pairwise(limits)]
    sides = []
    for name, each in runs.items():
        speeds = tuple(round(run.tokens / run.seconds, 2) for run in each)
        shares = [limit_seconds(spec, job, limit) / run.seconds for run, limit in zip(each, around, strict=True)]
        peak = max(run.peak_bytes for run in each)
        sides.append(
            Side(
                name,
                tokens_per_s=statistics.median(speeds),
                each=speeds,
                share=round(statistics.median(shares), 3),
                peak_bytes=peak,
                excess_bytes=peak - weights - job.kv_bytes,
                command=command(name, job),
            )
        )
    ratios = [a / b for a, b in zip(sides[0].each, sides[-1].each, strict=True)]
    return ThroughputReport(
        sides=tuple(sides),
        ratio=round(statistics.median(ratios), 3) if len(sides) > 1 else None,
        limits=tuple(limits),
        weight_bytes=weights,
        kv_bytes=job.kv_bytes,
        prompts=job.prompts,
        inputs=job.inputs,
        outputs=job.outputs,
        threads=job.threads,
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        torch=torch.__version__,
    )


def table(report: ThroughputReport) -> str:
    mib = 1 << 20
    lines = [
        f"{report.prompts} prompts of {report.inputs} tokens, {report.outputs} tokens each, {report.threads} threads;"
        f" weights {report.weight_bytes / mib:.0f} MiB, KV {report.kv_bytes / mib:.0f} MiB"
    ]
    for side in report.sides:
        lines.append(
            f"{side.name:12} {side.tokens_per_s:8.1f} tokens/s (median of {', '.join(f'{x:.1f}' for x in side.each)});"
            f" {100 * side.share:.0f} % of the measured limit;"
            f" peak {side.peak_bytes / mib:.0f} MiB, {side.excess_bytes / mib:.0f} beyond weights and KV"
        )
    if report.ratio is not None:
        lines.append(f"ratio        {report.ratio:.2f} (median of rounds)")
    reads, rates = [x.read_rate / 1e9 for x in report.limits], [x.matmul_rate(16) / 1e9 for x in report.limits]
    lines.append(f"limits       memory {min(reads):.1f} to {max(reads):.1f} GB/s read;")
    lines[-1] += f" bf16 or fp32 products {min(rates):.0f} to {max(rates):.0f} GFLOP/s"
    lines += [f"command      {shlex.join(('python', *side.command[1:]))}" for side in report.sides]
    lines.append(f"machine      {report.machine}, torch {report.torch}; {report.date}")
    return "\n".join(lines)
