"""What a fixed order of additions costs: the product's kernels beside the same sources with sums in any order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from ctypes import CDLL
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from penstock.base import EngineError
from penstock.base.segments import ffn_segments
from penstock.bench.any_order import BUILDS, DIFFERENCE, build_library, load_library
from penstock.bench.contenders import machine
from penstock.bench.limits import Limits, measure_limits
from penstock.kernels import Batch, KVLayer, make_ops
from penstock.kernels.types import GroupBatch, PackedWeight, plain
from penstock.spec import ModelSpec

FORMATS = {"int8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
COLD = 160 << 20
"""Bytes of weights that one-row products go round in: more than caches hold, as a model's layers are."""
BLOCK, GROUP = 16, 32
SECONDS = 0.4
"""Of a round of one case, all builds together."""
BAR = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """One op in one shape. ``run(build, turn)`` calls it; ``product()`` is what the installed kernels give.

    Attributes:
        bytes, operations: read from memory, and fp32 or int8 operations, in one call.
        bits: of the weights, for the rate that they may be multiplied at.
    """

    name: str
    format: str
    run: Callable[[int, int], None]
    product: Callable[[], Tensor]
    out: Tensor
    bytes: int
    operations: int
    bits: int


@dataclass(frozen=True, slots=True)
class Cost:
    """One case over all rounds, medians.

    Attributes:
        ratio: seconds in any order over seconds in order, the faster of the builds with sums in any order; with
            ``low`` and ``high`` of the rounds.
        share: of the speed that the measured limits allow, in order.
        apart: greatest difference of the results, of the greatest number.
    """

    name: str
    format: str
    seconds: float
    ratio: float
    low: float
    high: float
    build: str
    share: float
    apart: float


@dataclass(frozen=True, slots=True)
class DeterminismReport:
    costs: tuple[Cost, ...]
    limits: tuple[Limits, ...]
    kernels: str
    threads: int
    rounds: int
    context: int
    date: str
    machine: str


def measure_determinism(
    spec: ModelSpec, work: Path, *, prompt: int, context: int, threads: int, rounds: int
) -> DeterminismReport:
    """One layer's products for a decode and for a prompt of so many tokens, and attention at the end of ``context``
    positions, all builds in turn. ``work``: where the kernels with sums in any order are built, and kept.

    Raises:
        ConfigError: (compiler_missing), (native_sources_missing), (backend_not_built).
        EngineError: (bench_build_failed); (bench_kernels_differ) what was built is not the product.
    """
    ops, before = make_ops("cpu"), torch.get_num_threads()
    chosen = ops.numerics.split()[1]
    library = load_library(build_library(work, chosen), threads)
    torch.set_num_threads(threads)
    try:
        cases = list(_cases(spec, library, prompt, context))
        apart = [_compare(case, chosen) for case in cases]
        taken: list[list[list[float]]] = [[] for _ in cases]
        limits = [measure_limits(threads)]
        for _ in range(rounds):
            for case, seconds in zip(cases, taken, strict=True):
                seconds.append(_round(case))
            limits.append(measure_limits(threads))
    finally:
        torch.set_num_threads(before)
    around = [first.at_best(second) for first, second in pairwise(limits)]
    costs = [_cost(*about, around) for about in zip(cases, taken, apart, strict=True)]
    date = datetime.now(UTC).date().isoformat()
    return DeterminismReport(tuple(costs), tuple(limits), chosen, threads, rounds, context, date, machine())


def _cases(spec: ModelSpec, library: CDLL, prompt: int, context: int) -> Iterator[Case]:
    heads, kv_heads, width = spec.heads, spec.kv_groups()[0].kv_heads, spec.kv_groups()[0].head_dim
    matrices = {
        "qkv": ((heads + 2 * kv_heads) * width, spec.hidden, 1, False),
        "gate-up": (2 * spec.ffn, spec.hidden, 1, True),
        "down": (spec.hidden, spec.ffn, ffn_segments(spec.ffn), False),
    }
    for format in FORMATS:
        for name, (outputs, inputs, segments, gated) in matrices.items():
            weights = _weights(outputs, inputs, format)
            for rows in (1, prompt):
                yield _linear(f"{name}, {_rows(rows)}", library, weights, rows, segments, gated, format)
    for rows in (1, prompt):
        yield _attention(library, rows, context, (heads, kv_heads, width))


def _rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def _weights(outputs: int, inputs: int, format: str) -> list[PackedWeight | Tensor]:
    ops, weight_NK = make_ops("cpu"), (torch.randn(outputs, inputs) / inputs**0.5).to(FORMATS[format])
    packed = ops.pack(ops.quantize(weight_NK, 8, GROUP) if format == "int8" and ops.quantize else weight_NK)
    data = packed.data if isinstance(packed, PackedWeight) else plain(packed)
    copies = [data] + [data.clone() for _ in range(COLD // data.nbytes)]
    if isinstance(packed, PackedWeight):
        return [PackedWeight(copy, packed.shape, packed.bits, packed.group) for copy in copies]
    return list(copies)


def _linear(
    name: str, library: CDLL, weights: list[PackedWeight | Tensor], rows: int, segments: int, gated: bool, format: str
) -> Case:
    first, (outputs, inputs) = weights[0], weights[0].shape
    grouped = isinstance(first, PackedWeight)
    data = [weight.data if isinstance(weight, PackedWeight) else weight for weight in weights]
    x_TK = torch.randn(rows, inputs).to(FORMATS[format])
    out_TN = torch.empty(rows, outputs // 2 if gated else outputs, dtype=x_TK.dtype)
    numbers = (rows, outputs, inputs, segments, int(gated), gated, *((8, GROUP) if grouped else (0, 0)))

    def run(build: int, turn: int) -> None:
        weight = data[turn % len(data)].data_ptr()
        library.linear(build, x_TK.data_ptr(), weight, out_TN.data_ptr(), *numbers, DTYPES[x_TK.dtype])

    def product() -> Tensor:
        ops = make_ops("cpu")
        return ops.gate_up(x_TK, first, None, "silu") if gated else ops.linear(x_TK, first, None, segments)

    size, bits = data[0].nbytes, 8 if grouped else 8 * x_TK.itemsize
    return Case(name, format, run, product, out_TN, size, 2 * rows * outputs * inputs, bits)


def _attention(library: CDLL, rows: int, context: int, sizes: tuple[int, int, int]) -> Case:
    heads, kv_heads, width = sizes
    blocks, dtype, scale = -(-context // BLOCK), torch.bfloat16, width**-0.5
    kv: KVLayer
    (kv,) = make_ops("cpu").allocate_kv(1, blocks, BLOCK, kv_heads, width, dtype, torch.device("cpu"))
    for pool in kv.pools():
        pool.copy_(torch.randn(pool.shape))
    q_TNd = torch.randn(rows, heads, width).to(dtype)
    out_TC = torch.empty(rows, heads * width, dtype=dtype)
    tables_RM = torch.arange(blocks, dtype=torch.int32)[None]
    starts_R1, contexts_R = torch.tensor([0, rows]), torch.tensor([context])
    batch = Batch(
        torch.arange(context - rows, context), [0, rows], starts_R1, [context], contexts_R, BLOCK,
        [GroupBatch(torch.arange(context - rows, context), tables_RM)],
    )  # fmt: skip
    places = (q_TNd, *kv.pools(), out_TC, tables_RM)

    def run(build: int, turn: int) -> None:
        pointers = [tensor.data_ptr() for tensor in places]
        about = (blocks, BLOCK, starts_R1.data_ptr(), contexts_R.data_ptr())
        library.attention(build, *pointers, *about, heads, kv_heads, width, scale, DTYPES[dtype])

    def product() -> Tensor:
        return make_ops("cpu").attention(q_TNd, kv, batch, 0, None, scale)

    keys = sum(range(context - rows + 1, context + 1))
    size = sum(pool.nbytes for pool in kv.pools())
    name = f"attention to {context}, {_rows(rows)}"
    return Case(name, "bf16", run, product, out_TC, size, 4 * heads * width * keys, 16)


def _compare(case: Case, chosen: str) -> float:
    """How far the results are apart; all builds have run once then."""
    results = []
    for build in range(len(BUILDS)):
        case.out.fill_(float("nan"))
        case.run(build, 0)
        results.append(case.out.clone())
    if not torch.equal(results[0], case.product()):
        why = f"{case.name}, {case.format}: other bytes than the installed kernels {chosen}"
        fix = "install penstock again from this checkout (pip install -e .), or with this compiler"
        raise EngineError("bench_kernels_differ", "The kernels just built are not the product's", why=why, fix=fix)
    for result in results:
        if not result.isfinite().all():  # it was NaN before: a build that computes nothing would be the fastest
            why = f"{case.name}, {case.format}: a sum in any order is not finite, or was not written"
            raise EngineError("bench_kernels_differ", "A build with sums in any order computes something else", why=why)
    greatest = results[0].abs().max().item()
    return max((result.float() - results[0].float()).abs().max().item() for result in results) / greatest


def _round(case: Case) -> list[float]:
    """Median seconds of a call of each build, a call of each in turn; who begins changes, and weights are cold."""
    taken: list[list[float]] = [[] for _ in BUILDS]
    turn, began = 0, time.perf_counter()
    while turn < 3 * len(BUILDS) or time.perf_counter() - began < SECONDS:
        for place in range(len(BUILDS)):
            build = (turn + place) % len(BUILDS)
            started = time.perf_counter()
            case.run(build, turn * len(BUILDS) + place)
            taken[build].append(time.perf_counter() - started)
        turn += 1
    return [statistics.median(each) for each in taken]


def _cost(case: Case, rounds: list[list[float]], apart: float, around: list[Limits]) -> Cost:
    median = statistics.median
    ratios = [[seconds[build] / seconds[0] for seconds in rounds] for build in range(1, len(BUILDS))]
    best = min(range(len(ratios)), key=lambda build: median(ratios[build]))
    floors = [max(case.bytes / x.read_rate, case.operations / x.matmul_rate(case.bits)) for x in around]
    return Cost(
        case.name,
        case.format,
        seconds=median(seconds[0] for seconds in rounds),
        ratio=median(ratios[best]),
        low=min(ratios[best]),
        high=max(ratios[best]),
        build=list(BUILDS)[best + 1],
        share=median(floor / seconds[0] for floor, seconds in zip(floors, rounds, strict=True)),
        apart=apart,
    )


def table(report: DeterminismReport) -> str:
    lines = [f"{'':26} {'':5} {'in order':>12} {'of limit':>9}   any order / in order"]
    for cost in report.costs:
        lines.append(
            f"{cost.name:26} {cost.format:5} {1e6 * cost.seconds:9.0f} us {100 * cost.share:7.0f} %  "
            f" {cost.ratio:.3f} ({cost.low:.3f} to {cost.high:.3f}) {cost.build}{' *' * (cost.ratio < 1 - BAR)}"
        )
    reads, rates = [x.read_rate / 1e9 for x in report.limits], [x.int8 / 1e9 for x in report.limits]
    floats = [max(x.fp32, x.bf16) / 1e9 for x in report.limits]
    missed = sum(cost.ratio < 1 - BAR for cost in report.costs)
    return "\n".join(
        [
            *lines,
            f"* any order is more than {100 * BAR:.0f} % faster: {missed} of {len(lines) - 1}",
            DIFFERENCE,
            f"limits    {min(reads):.1f} to {max(reads):.1f} GB/s read; {min(floats):.0f} to {max(floats):.0f} GFLOP/s,"
            f" {min(rates):.0f} to {max(rates):.0f} GOP/s of int8 products",
            f"machine   {report.machine}; kernels {report.kernels}, {report.threads} threads;"
            f" median of {report.rounds} rounds; {report.date}",
        ]
    )
