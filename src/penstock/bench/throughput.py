"""Tokens a second of a batch of prompts, beside a peer and beside what the machine allows.

Each round runs every contender once, in a process of its own, in an order that turns from round to round; before and
after it the machine's own limits are measured, since they move with whatever else it does.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from penstock.base import EngineError
from penstock.bench.job import Job, Run
from penstock.spec import ModelSpec
from penstock.spec.hf import read_model_spec
from penstock.spec.sizing import active_parameters, kv_bytes_per_token, weight_bytes
from penstock.spec.tensors import checkpoint_tensors

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
"""Shapes of Qwen3-0.6B, from its model card's config.json."""
BLOCK = 16
STREAMED = 1 << 28
"""Bytes read by one measurement of the memory's rate."""
SQUARE = 2048
"""Side of the bf16 matrices multiplied by one measurement of the arithmetic's rate."""

SIDES = {"penstock": "penstock.bench.side_penstock", "transformers": "penstock.bench.side_transformers"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine gave: bytes read a second, and bf16 floating-point operations a second."""

    read_rate: float
    matmul_rate: float


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
                runs[name].append(_run(command(name, job)))
            limits.append(measure_limits(threads))
    return _report(spec, job, runs, limits)


def command(name: str, job: Job) -> tuple[str, ...]:
    return (sys.executable, "-m", SIDES[name], json.dumps(asdict(job)))


def write_checkpoint(folder: Path) -> Path:
    """Random weights, small enough for finite activations, and a tokenizer of bytes and of words without merges."""
    (folder / "config.json").write_text(json.dumps(QWEN3_06B))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(QWEN3_06B["vocab_size"])))
    spec = read_model_spec(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in checkpoint_tensors(spec).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer(size: int) -> dict[str, object]:
    bytes_and_words = [*ByteLevel.alphabet(), *(f"w{id}" for id in range(size))][:size]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {token: id for id, token in enumerate(bytes_and_words)}, "merges": []},
    }


def measure_limits(threads: int) -> Limits:
    """The best of a few tries each, with as many threads as the contenders have."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stream = torch.ones(STREAMED // 4)
        square = torch.ones(SQUARE, SQUARE, dtype=torch.bfloat16)
        reading, multiplying = _best_seconds(stream.sum), _best_seconds(lambda: square @ square)
    finally:
        torch.set_num_threads(before)
    return Limits(STREAMED / reading, 2 * SQUARE**3 / multiplying)


def limit_seconds(spec: ModelSpec, job: Job, limits: Limits) -> float:
    """Least seconds for a job: each step of decoding reads the weights and the KV known by then, and the prompts'
    rows are multiplied with all weights but the head's."""
    table = spec.vocab_size * spec.hidden
    weights = weight_bytes(spec, spec.dtype)
    steps = job.outputs - 1
    seen = steps * job.inputs + steps * (steps + 1) // 2
    kv_read = seen * job.prompts * kv_bytes_per_token(spec, spec.dtype)
    flops = 2 * (active_parameters(spec) - table * (1 if spec.tied else 2)) * job.prompts * job.inputs
    return (steps * weights + kv_read) / limits.read_rate + flops / limits.matmul_rate


def _best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _run(argv: tuple[str, ...]) -> Run:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = f"exit code {done.returncode}; {done.stderr.strip()[-2000:]}"
        fix = f"run it by itself: {shlex.join(argv)}"
        raise EngineError("bench_run_failed", "A measured run failed", why=why, fix=fix)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def _report(spec: ModelSpec, job: Job, runs: dict[str, list[Run]], limits: list[Limits]) -> ThroughputReport:
    weights = weight_bytes(spec, spec.dtype)
    around = [Limits(max(a.read_rate, b.read_rate), max(a.matmul_rate, b.matmul_rate)) for a, b in pairwise(limits)]
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
    reads, rates = ([getattr(x, name) / 1e9 for x in report.limits] for name in ("read_rate", "matmul_rate"))
    lines.append(f"limits       memory {min(reads):.1f} to {max(reads):.1f} GB/s read;")
    lines[-1] += f" bf16 products {min(rates):.0f} to {max(rates):.0f} GFLOP/s"
    lines += [f"command      {shlex.join(('python', *side.command[1:]))}" for side in report.sides]
    lines.append(f"machine      {report.machine}, torch {report.torch}; {report.date}")
    return "\n".join(lines)
