"""Decode behind contexts of many lengths, and what a second thread gives: steps of the real runner over KV that was
written rather than computed, since only its bytes count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from penstock.assemble import find_model, load_executor
from penstock.bench.job import Job
from penstock.bench.limits import Limits, limit_seconds, measure_limits
from penstock.core.plan import NewRequest, StepFailed, StepPlan
from penstock.runtime.local import LocalExecutor
from penstock.runtime.runner import Runner
from penstock.spec import EngineConfig, ModelSpec, SamplingParams, Vocabulary
from penstock.spec.hf import read_model_spec

WARM_STEPS, STEPS = 3, 15
PROMPT = 512
BITS = {"int8": 8, "int4": 4}
Case = tuple[int, int]
"""Tokens of context, and threads."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One request that decodes behind ``context`` tokens.

    Attributes:
        ms: of a step: the median of the rounds' medians, the least and the greatest.
        share: of the machine's bytes a second, the better of before and after a round: what reading weights and KV
            once would take; median.
    """

    context: int
    threads: int
    ms: tuple[float, float, float]
    share: float


@dataclass(frozen=True, slots=True)
class ContextReport:
    """Attributes: prefill_ms: a prompt of PROMPT tokens by threads, median of the rounds."""

    readings: tuple[Reading, ...]
    prefill_ms: dict[int, float]
    limits: tuple[Limits, ...]


def measure_context(
    config: EngineConfig, contexts: Sequence[int], threads: Sequence[int], rounds: int
) -> ContextReport:
    """Every length with the most threads, and the first one with each number of threads, in turn in every round."""
    folder = find_model(config.model)
    spec, most = read_model_spec(folder), max(threads)
    needed = max(*contexts, PROMPT) + WARM_STEPS + STEPS + config.block_size
    config = replace(config, max_model_len=needed, max_num_seqs=1, max_num_batched_tokens=PROMPT, depth=1)
    steps = _Steps(load_executor(folder, config, Vocabulary(size=spec.vocab_size)).executor, config.block_size)
    cases = [*((length, most) for length in contexts), *((contexts[0], n) for n in sorted(set(threads) - {most}))]
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    shares: dict[Case, list[float]] = {case: [] for case in cases}
    prefills: dict[int, list[float]] = {count: [] for count in threads}
    limits = [measure_limits(most)]
    for _ in range(rounds):
        for case in cases:
            torch.set_num_threads(case[1])
            seconds[case].append(steps.decode(case[0]))
        for count in threads:
            torch.set_num_threads(count)
            prefills[count].append(steps.prefill())
        limits.append(measure_limits(most))
        around = limits[-2].at_best(limits[-1])
        for case in cases:
            shares[case].append(step_limit(spec, case[0], around, BITS.get(config.quant, 16)) / seconds[case][-1])
    median = statistics.median
    return ContextReport(
        tuple(
            Reading(*case, _ms(median(each), min(each), max(each)), round(median(shares[case]), 3))
            for case, each in seconds.items()
        ),
        {count: 1e3 * median(each) for count, each in prefills.items()},
        tuple(limits),
    )


def step_limit(spec: ModelSpec, context: int, limits: Limits, bits: int) -> float:
    """Least seconds of the step that decodes behind so many tokens."""

    def job(outputs: int) -> Job:
        return Job(
            model="", prompts=1, inputs=context - 1, outputs=outputs, threads=1, vocab_size=spec.vocab_size, kv_bytes=0
        )

    return limit_seconds(spec, job(2), limits, bits) - limit_seconds(spec, job(1), limits, bits)


def _ms(median: float, least: float, greatest: float) -> tuple[float, float, float]:
    return 1e3 * median, 1e3 * least, 1e3 * greatest


class _Steps:
    """Plans for one request at a time, whose blocks are the first ones of each pool."""

    def __init__(self, executor: object, block_size: int) -> None:
        assert isinstance(executor, LocalExecutor) and isinstance(executor.runner, Runner)
        self.executor, self.block_size = executor, block_size
        self.groups = len(executor.runner.pools)
        self.before: list[int] = []  # the request of the steps before, to be forgotten
        self.numbers = iter(range(1 << 62))
        generator = torch.Generator().manual_seed(0)
        for layer in (layer for pool in executor.runner.pools for layer in pool):
            for tensor in layer.pools():  # a page that was never written is not read from memory
                if tensor.dtype == torch.int8:
                    tensor.random_(-127, 128, generator=generator)
                else:
                    tensor.uniform_(0.001, 0.002, generator=generator)

    def decode(self, context: int) -> float:
        """Median seconds of a step."""
        return statistics.median(list(self._steps(context, context - 1, WARM_STEPS + STEPS, 1))[WARM_STEPS:])

    def prefill(self) -> float:
        [seconds] = self._steps(PROMPT, 0, 1, PROMPT)
        return seconds

    def _steps(self, length: int, start: int, count: int, rows: int) -> Iterator[float]:
        number = next(self.numbers)
        blocks = tuple(range((length + count) // self.block_size + 1))
        new = NewRequest(
            id=number,
            tokens=tuple(31 * i % 251 for i in range(length)),
            prompt_len=length,
            tables=(blocks,) * self.groups,
            params=SamplingParams(temperature=0, max_tokens=count + 1),
            seed=0,
            sample=0,
            stop_ids=(),
            limit=length + count + 1,
        )
        for i in range(count):
            plan = StepPlan(next(self.numbers), slices=[(number, start + i, rows)])
            if i == 0:
                plan.gone, self.before, plan.new = self.before, [number], [new]
            started = time.perf_counter()
            result = self.executor.submit(plan).wait()
            if isinstance(result, StepFailed):
                raise result.error
            yield time.perf_counter() - started


def table(report: ContextReport) -> str:
    lines = []
    for each in report.readings:
        median, least, greatest = each.ms
        lines.append(
            f"decode behind {each.context:6} tokens, {each.threads} threads: {median:7.2f} ms a step"
            f" ({least:.2f} to {greatest:.2f}); {100 * each.share:.0f} % of the bytes a second the machine gave"
        )
    for count, ms in report.prefill_ms.items():
        lines.append(f"a prompt of {PROMPT} tokens, {count} threads: {ms:.0f} ms")
    reads = [limits.read_rate / 1e9 for limits in report.limits]
    return "\n".join([*lines, f"limits: {min(reads):.1f} to {max(reads):.1f} GB/s read"])
