"""The log of steps: what it tells is what happened, it is bounded, and its cost does not depend on the batch."""

from __future__ import annotations

import itertools
import time
import timeit
from collections.abc import Iterator

import pytest

from penstock.base import Unavailable
from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan, StepResult
from penstock.core.service import Submission
from penstock.core.setup import EngineSetup
from penstock.core.steplog import MAX_ENDED, MAX_SLICES, MAX_STEPS, StepLog
from penstock.core.trace import Trace
from penstock.sim.toy import ToyExecutor
from penstock.spec import EngineConfig, SamplingParams, Vocabulary
from penstock.wire import RemoteService
from test_remote import ARGV, Heard
from test_remote import job as remote_job


def engine(blocks: int = 64, rows: int = 4, depth: int = 1, executor: type[ToyExecutor] = ToyExecutor) -> Engine:
    """On a clock that goes on by a second each time that it is read."""
    setup = EngineSetup(
        pools=(PoolSpec(blocks),),
        block_size=4,
        numerics_id=b"t",
        limits=Limits(max_batch_tokens=16, max_batch_requests=rows, max_model_len=64),
        vocabulary=Vocabulary(size=50),
        depth=depth,
    )
    ticks = itertools.count(1)
    toy = executor(setup.pools, setup.block_size, 50)
    return Engine(setup.scheduler(), toy, lambda news: None, depth, log=StepLog(lambda: float(next(ticks))))


def job(id: str, length: int = 9, max_tokens: int = 12, first: int = 1) -> Submission:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Submission(id=id, tokens=(first, *range(2, length + 1)), params=params, seed=0)


def run(loop: Engine, *jobs: Submission) -> Trace:
    for each in jobs:
        loop.post(each)
    assert loop._log is not None
    while loop.busy:
        loop.launch(loop._log.clock())
        loop.land()
    return loop.look(1e9, 8)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_position_is_told_of_once(depth: int) -> None:
    seen = run(engine(depth=depth), job("a"), job("b", first=7), job("c", first=9))
    assert [step.number for step in seen.steps] == list(range(len(seen.steps)))
    for step in seen.steps:
        moments = (step.now, step.began, step.planned, step.landed, step.committed, step.published)
        assert list(moments) == sorted(moments) and not step.failed
    for request in seen.requests:
        parts = [part for step in seen.steps for part in step.slices if part[0] == request.number]
        positions = [start + i for _, start, count in parts for i in range(count)]
        assert positions[:20] == list(range(20))  # 9 of the prompt, and the 11 tokens that others follow
        assert (request.prompt, request.known, request.state) == (9, 21, "length")
        first = next(step for step in seen.steps if any(part[0] == request.number for part in step.slices))
        assert request.queued is not None and request.arrived + request.queued == first.now
        assert request.ended is not None and request.ended > first.published
    (pool,) = seen.pools
    assert pool.total == pool.free + pool.open + pool.sealed + pool.idle == 64
    assert (pool.open, pool.sealed, pool.stride, len(pool.map)) == (0, 0, 8, 8)


def test_preempted_requests_and_the_blocks_they_share_are_told() -> None:
    loop = engine(blocks=8)
    assert loop._log is not None
    for id in "abc":
        loop.post(job(id, max_tokens=20))
    while not loop.scheduler.counters.preemptions:
        loop.launch(loop._log.clock())
        loop.land()
    seen = loop.look(1e9, 1000)
    assert sum(request.preempted for request in seen.requests) == loop.scheduler.counters.preemptions
    assert {request.state for request in seen.requests} <= {"running", "waiting"}  # it may be the next to go on
    assert seen.inflight == ()
    assert all(request.starved == 0 and request.ended is None for request in seen.requests)  # told when it goes on
    (pool,) = seen.pools
    assert (pool.stride, len(pool.map)) == (1, 8)
    kinds = [cell & 3 for cell in pool.map]
    assert [kinds.count(kind) for kind in range(4)] == [pool.free, pool.idle, pool.open, pool.sealed]
    assert max(cell >> 2 for cell in pool.map) > 1, "the first two blocks of the prompt are the same"
    seen = run(loop)
    victims = [request for request in seen.requests if request.preempted]
    assert victims and all(request.starved > 0 for request in victims)
    departed = {number for step in seen.steps for number in step.gone}
    assert departed >= {request.number for request in victims}


def test_a_failed_step_is_told_as_such_and_done_again() -> None:
    class Fails(ToyExecutor):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.fault = lambda plan: plan.number == 2

    seen = run(engine(depth=2, executor=Fails), job("a"), job("b", first=7))
    failed = [step for step in seen.steps if step.failed]
    assert 2 in [step.number for step in failed] and len(failed) <= 2
    assert all(step.published and not step.forward for step in failed)
    assert {request.state for request in seen.requests} == {"length"}


def test_what_is_kept_and_what_is_told_are_bounded() -> None:
    loop = engine(rows=1)
    for _ in range(3):
        for i in range(MAX_ENDED // 2):
            loop.post(job(f"r{i}", length=2, max_tokens=3))
        seen = run(loop)
    assert len(seen.steps) == MAX_STEPS and len(seen.requests) == MAX_ENDED
    assert seen.steps[-1].number == loop.scheduler.counters.steps - 1
    latest = loop.look(seen.now - seen.steps[-5].published + 1)
    assert len(latest.steps) == 5 and len(latest.requests) < 5 and latest.pools[0].map == b""

    log, large = StepLog(lambda: 0.0), StepPlan(0, slices=[(0, 0, 1)] * 1000)
    for _ in range(100):
        log.planned(large, 0.0, 0.0, loop.scheduler)
        log.landed(StepResult([]), 0.0, 0.0)
    assert sum(len(step.slices) for step in log.look(loop.scheduler, 1).steps) == MAX_SLICES // 1000 * 1000


@pytest.mark.parametrize("rows", [1, 256])
def test_a_step_costs_a_few_microseconds_whatever_its_batch(rows: int) -> None:
    """Ten times what was measured; a loop over 256 rows would be seen."""
    loop, log = engine(), StepLog(time.monotonic)
    plan, result = StepPlan(0, slices=[(i, 0, 1) for i in range(rows)]), StepResult([])

    def step() -> None:
        log.planned(plan, 0.0, log.clock(), loop.scheduler)
        log.landed(result, log.clock(), log.clock())

    assert min(timeit.repeat(step, number=100, repeat=20)) / 100 < 50e-6


@pytest.fixture
def remote() -> Iterator[RemoteService]:
    service = RemoteService(ARGV, EngineConfig())
    service.ready()
    yield service
    service.close()


def test_an_engine_in_another_process_is_looked_at_from_here(remote: RemoteService) -> None:
    heard = Heard(remote)
    heard.submit(remote_job("a", 24))
    seen = remote.look(60, 16).result(30)  # while it runs
    assert all(step.planned and not step.published for step in seen.inflight)
    assert seen.pools[0].total == 512 and len(seen.pools[0].map) == 16
    heard.all()
    seen = remote.look(60).result(30)
    (request,) = (request for request in seen.requests if request.id == "a")
    assert (request.prompt, request.known, request.state) == (3, 27, "length")
    assert sum(count for step in seen.steps for number, _, count in step.slices if number == request.number) >= 26
    assert remote.look(0).result(30).steps == ()
    remote.close()
    with pytest.raises(Unavailable, match="engine is not running"):
        remote.look(1).result(30)
    assert remote._looks == {}
