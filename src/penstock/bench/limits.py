"""What the machine allows: bytes read and products made in a second, and the least time a job can take with them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from statistics import median

import torch

from penstock.bench.job import Job
from penstock.spec import ModelSpec
from penstock.spec.sizing import active_parameters, kv_bytes_per_token, parameters

STREAMED = 1 << 28
"""Bytes read by one measurement of the memory's rate."""
SQUARE = 2048
"""Largest side of the matrices multiplied by one measurement of the arithmetic's rate."""
TRIES, PATIENCE = 5, 0.3
"""Least tries, and seconds of them, of which the best counts: others who run here take turns of some milliseconds."""
LONG_ENOUGH = 0.05
"""Seconds of a product, by one thread, that need no larger matrices: bf16 without instructions of its own is a hundred
times slower."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine gave: bytes read a second, and operations a second of square products of each type.

    Attributes:
        int8: unsigned by signed bytes.
    """

    read_rate: float
    fp32: float
    bf16: float
    int8: float

    def matmul_rate(self, bits: int) -> float:
        """The fastest type that weights of so many bits may be multiplied in."""
        return max(self.fp32, self.bf16, self.int8 if bits <= 8 else 0.0)

    @classmethod
    def median(cls, several: Iterable[Limits]) -> Limits:
        return cls(*(median(rates) for rates in zip(*map(astuple, several), strict=True)))

    def at_best(self, other: Limits) -> Limits:
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__slots__]
        return Limits(*(max(pair) for pair in pairs))


class Gauge:
    """One measurement, to be made again and again: memory is taken and matrices are sized once, on the way to which the
    processor warms up.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        with _threads(1):
            self._memory = torch.ones(STREAMED // 4)
            self._products = [_sized(kind) for kind in (_of_type(torch.float32), _of_type(torch.bfloat16), _of_bytes)]

    def window(self, tries: int = TRIES, patience: float = PATIENCE) -> Limits:
        """The best of a few tries each: at least so many, and for so many seconds."""
        with _threads(self.threads):
            reading = STREAMED / _best_seconds(self._memory.sum, tries, patience)
            products = [2 * side**3 / _best_seconds(work, tries, patience) for side, work in self._products]
        return Limits(reading, *products)


def measure_limits(threads: int) -> Limits:
    """With as many threads as the contenders have."""
    return Gauge(threads).window()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limit_seconds(spec: ModelSpec, job: Job, limits: Limits, bits: int = 16) -> float:
    """Least seconds for a job with weights of ``bits`` bits, and K and V of as many but 8 at least.

    The prompts' rows are multiplied with all weights but the head's. Each step of decoding reads the weights and the KV
    known by then, those of a shared prefix once, and multiplies its rows, whichever takes longer. Causal attention
    counts; scales of weights, norms and rope tables do not. Of experts, those are read that a step can expect to need.
    """
    table = spec.vocab_size * spec.hidden
    active, everything = active_parameters(spec), parameters(spec)
    idle = 0.0
    if spec.moe is not None:
        idle = (everything - active) * (1 - spec.moe.active / spec.moe.experts) ** (job.prompts - 1)
    untied = 0 if spec.tied else table
    weights = (everything - untied - idle) * bits / 8
    kv = kv_bytes_per_token(spec, spec.dtype) * min(1.0, max(bits, 8) / 16)
    rate = limits.matmul_rate(bits)

    rows = job.shared + job.prompts * (job.inputs - job.shared)
    seen = _attended(spec, 0, job.shared) + job.prompts * _attended(spec, job.shared, job.inputs)
    seconds = (2 * (active - table - untied) * rows + seen) / rate
    for length in range(job.inputs + 1, job.inputs + job.outputs):
        known = job.shared + job.prompts * (length - job.shared)
        flops = job.prompts * (2 * (active - untied) + _attended(spec, length - 1, length))
        seconds += max((weights + known * kv) / limits.read_rate, flops / rate)
    return seconds


def _attended(spec: ModelSpec, start: int, end: int) -> int:
    """Operations of causal attention for the rows of these positions, windows included."""
    total = 0
    for group in spec.kv_groups():
        keys = sum(min(n, group.window or n) for n in range(start + 1, end + 1))
        total += 4 * spec.heads * group.head_dim * len(group.layers) * keys
    return total


def _of_type(dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    def product(side: int) -> Callable[[], object]:
        square = torch.ones(side, side, dtype=dtype)
        return lambda: square @ square

    return product


def _of_bytes(side: int) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, and without another fast product of bytes
        weight = torch.quantize_per_tensor(torch.ones(side, side), 0.1, 0, torch.qint8)
        square = torch.quantize_per_tensor(torch.ones(side, side), 0.1, 64, torch.quint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(square, packed, 1.0, 64)


def _sized(product: Callable[[int], Callable[[], object]]) -> tuple[int, Callable[[], object]]:
    """The side of its matrices, and the work. One thread sizes them: where others run, several wait for each other, and
    a small matrix would pass for a large one.
    """
    side = 128
    work = product(side)
    while side < SQUARE and _best_seconds(work, TRIES, 0.0) < LONG_ENOUGH:
        side *= 2
        work = product(side)
    return side, work


def _best_seconds(work: Callable[[], object], tries: int, patience: float) -> float:
    seconds: list[float] = []
    while len(seconds) < tries or sum(seconds) < patience:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
