"""What the brain and the batch arrays cost per step, beside the model."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from penstock.runtime.inputs import Inputs
from penstock.sim.steady import SteadyState

WARM_STEPS, STEPS, ROUNDS = 40, 300, 5


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds per step: median over rounds of a round's median, and its worst round.

    Attributes:
        scheduler_ms: plan and commit.
        inputs_ms: applying the plan's deltas and building the batch.
        arrivals: requests that entered per step, on average.
    """

    scenario: str
    running: int
    waiting: int
    arrivals: float
    scheduler_ms: float
    inputs_ms: float
    total_ms: float
    worst_round_ms: float


def measure_overhead(running: int = 64) -> list[Overhead]:
    """Steady decode, the same with 10,000 waiting, and steady churn, their rounds in turn."""
    scenarios = {
        "steady decode": (0, STEPS + WARM_STEPS + 20, False),
        "10,000 waiting": (10_000, STEPS + WARM_STEPS + 20, False),
        "arrivals": (0, 32, True),
    }
    rounds: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in scenarios}
    for _ in range(ROUNDS):
        for name, (waiting, max_tokens, refill) in scenarios.items():
            rounds[name].append(_round(SteadyState(running, waiting, max_tokens, refill=refill), running))
    return [
        Overhead(
            name,
            running,
            scenarios[name][0],
            arrivals=round(statistics.mean(r[3] for r in measured), 2),
            scheduler_ms=round(statistics.median(r[0] for r in measured), 4),
            inputs_ms=round(statistics.median(r[1] for r in measured), 4),
            total_ms=round(statistics.median(r[2] for r in measured), 4),
            worst_round_ms=round(max(r[2] for r in measured), 4),
        )
        for name, measured in rounds.items()
    ]


def _round(state: SteadyState, running: int) -> tuple[float, float, float, float]:
    limits = state.setup.limits
    inputs = Inputs(running, limits.max_model_len, state.setup.block_size, 1, torch.device("cpu"))
    scheduler_ms: list[float] = []
    inputs_ms: list[float] = []
    arrived = 0
    for step in range(WARM_STEPS + STEPS):
        started = time.perf_counter()
        plan = state.plan()
        assert plan is not None
        planned = time.perf_counter()
        for request in plan.gone:
            inputs.forget(request)
        for new in plan.new:
            inputs.place(new)
        for change in plan.blocks:
            inputs.write(change)
        built = inputs.build(plan.slices)
        ready = time.perf_counter()
        inputs.append(built, torch.full((len(built.draws),), 7))
        result = state.result(plan)
        landed = time.perf_counter()
        state.commit(plan, result)
        ended = time.perf_counter()
        state.next()
        if step >= WARM_STEPS:
            scheduler_ms.append(1e3 * (planned - started + ended - landed))
            inputs_ms.append(1e3 * (ready - planned))
            arrived += len(plan.new)
    total = [a + b for a, b in zip(scheduler_ms, inputs_ms, strict=True)]
    median = statistics.median
    return median(scheduler_ms), median(inputs_ms), median(total), arrived / STEPS
