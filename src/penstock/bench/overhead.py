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
    """Steady decode, the same with 10,000 waiting, and steady churn. All three take each step in turn, so that what
    the machine does meanwhile happens to all."""
    scenarios = {
        "steady decode": (0, STEPS + WARM_STEPS + 20, False),
        "10,000 waiting": (10_000, STEPS + WARM_STEPS + 20, False),
        "arrivals": (0, 32, True),
    }
    rounds: list[list[_Lane]] = []
    for _ in range(ROUNDS):
        lanes = [_Lane(SteadyState(running, waiting, n, refill=refill)) for waiting, n, refill in scenarios.values()]
        for step in range(WARM_STEPS + STEPS):
            for lane in lanes:
                lane.step(counted=step >= WARM_STEPS)
        rounds.append(lanes)
    return [_summary(name, running, scenarios[name][0], [r[i] for r in rounds]) for i, name in enumerate(scenarios)]


def _summary(name: str, running: int, waiting: int, lanes: list[_Lane]) -> Overhead:
    median = statistics.median
    totals = [median(a + b for a, b in zip(lane.scheduler_ms, lane.inputs_ms, strict=True)) for lane in lanes]
    return Overhead(
        name,
        running,
        waiting,
        arrivals=round(statistics.mean(lane.arrived / STEPS for lane in lanes), 2),
        scheduler_ms=round(median(median(lane.scheduler_ms) for lane in lanes), 4),
        inputs_ms=round(median(median(lane.inputs_ms) for lane in lanes), 4),
        total_ms=round(median(totals), 4),
        worst_round_ms=round(max(totals), 4),
    )


class _Lane:
    """One scenario's scheduler and batch arrays, and the time its steps took."""

    def __init__(self, state: SteadyState) -> None:
        limits = state.setup.limits
        self.state = state
        self.inputs = Inputs(
            limits.max_batch_requests,
            limits.max_model_len,
            state.setup.block_size,
            state.setup.pools,
            torch.device("cpu"),
        )
        self.scheduler_ms: list[float] = []
        self.inputs_ms: list[float] = []
        self.arrived = 0

    def step(self, *, counted: bool) -> None:
        state, inputs = self.state, self.inputs
        started = time.perf_counter()
        plan = state.plan()
        assert plan is not None  # somebody always runs
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
        if counted:
            self.scheduler_ms.append(1e3 * (planned - started + ended - landed))
            self.inputs_ms.append(1e3 * (ready - planned))
            self.arrived += len(plan.new)
