"""LocalService: whatever callers do, each sample hears one last update and the others go on."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from penstock.base import PenstockError
from penstock.core.admission import Limits
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan
from penstock.core.service import Submission, Update
from penstock.core.setup import EngineSetup
from penstock.runtime.local import LocalExecutor, Pending
from penstock.runtime.service import LocalService
from penstock.sim.toy import Done, ToyExecutor, toy_completion
from penstock.spec import SamplingParams, Vocabulary

SETUP = EngineSetup(
    pools=(PoolSpec(256),),
    block_size=8,
    numerics_id=b"service",
    limits=Limits(max_batch_tokens=64, max_batch_requests=8, max_model_len=1024),
    vocabulary=Vocabulary(size=64),
)


def job(id: str, max_tokens: int = 8, n: int = 1) -> Submission:
    return Submission(id=id, tokens=(5, 6, 7), params=SamplingParams(n=n, max_tokens=max_tokens), seed=0)


class Slow(ToyExecutor):
    """A toy that takes its time, so that requests are running when the test acts."""

    def submit(self, plan: StepPlan) -> Done:
        time.sleep(0.002)
        return super().submit(plan)


@pytest.fixture
def service() -> LocalService:
    return LocalService(SETUP.scheduler(), Slow(SETUP.pools, SETUP.block_size, 64))


def last_of(news: queue.SimpleQueue[Update]) -> Update:
    while not (update := news.get(timeout=30)).finish_reason:
        pass
    return update


def test_requests_from_many_threads(service: LocalService) -> None:
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=lambda t=t: [service.submit(job(f"{t}.{i}"), news.put) for i in range(20)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    tokens: dict[str, list[int]] = {}
    ended = 0
    while ended < 80:
        update = news.get(timeout=30)
        tokens.setdefault(update.id, []).extend(update.tokens)
        ended += update.finish_reason is not None
    expected = toy_completion((5, 6, 7), 8, [None], 0, 0, 64)
    assert len(tokens) == 80 and all(got == expected for got in tokens.values())
    service.close()


def test_an_id_is_used_once_at_a_time(service: LocalService) -> None:
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    service.submit(job("a", max_tokens=500), news.put)
    with pytest.raises(PenstockError, match="duplicate_request_id"):
        service.submit(job("a"), news.put)
    service.abort("a")
    assert last_of(news).finish_reason == "abort"
    service.submit(job("a"), news.put)
    assert last_of(news).finish_reason == "length"
    service.close()


def test_a_sink_that_raises_ends_its_own_sample_alone(service: LocalService) -> None:
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    calls: list[Update] = []

    def bad(update: Update) -> None:
        calls.append(update)
        raise RuntimeError("Event loop is closed")

    service.submit(job("bad", max_tokens=500), bad)
    service.submit(job("good", max_tokens=100), news.put)
    assert last_of(news).finish_reason == "length"
    assert len(calls) < 20 and calls[-1].finish_reason == "abort"
    service.close()


def test_closing_tells_everybody_even_if_one_does_not_listen(service: LocalService) -> None:
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()

    def bad(update: Update) -> None:
        if update.finish_reason:
            raise RuntimeError("Event loop is closed")

    service.submit(job("bad", max_tokens=900), bad)
    service.submit(job("two", max_tokens=900, n=2), news.put)
    news.get(timeout=30)
    service.close()
    ends = []
    while len(ends) < 2:
        if (update := news.get(timeout=30)).finish_reason:
            ends.append((update.sample, update.error.code if update.error else None))
    assert sorted(ends) == [(0, "engine_closed"), (1, "engine_closed")]
    with pytest.raises(PenstockError, match="engine_closed"):
        service.submit(job("late"), news.put)


class Panic(BaseException):
    """As what compiled code raises: no Exception."""


@pytest.mark.parametrize("overlap", [False, True])
def test_a_panic_fails_its_step_and_leaves_nobody_waiting(overlap: bool) -> None:
    class Runner:
        def launch(self, plan: StepPlan) -> Pending:
            raise Panic("!")

    service = LocalService(SETUP.scheduler(), LocalExecutor(Runner(), overlap=overlap), depth=1 + overlap)
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    service.submit(job("a"), news.put)
    last = last_of(news)
    assert last.error is not None and last.error.code == "step_failed" and "Panic: !" in str(last.error)
    assert service.alive
    service.close()


@pytest.mark.parametrize("fault", [ZeroDivisionError, Panic])
def test_a_fault_of_the_loop_reaches_every_caller(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    def fail(plan: StepPlan, result: object) -> None:
        raise fault

    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    service.submit(job("a", max_tokens=900), news.put)
    news.get(timeout=30)
    monkeypatch.setattr(service._engine.scheduler, "commit", fail)
    last = last_of(news)
    assert last.error is not None and last.error.code == "engine_dead" and not service.alive
    with pytest.raises(PenstockError, match="engine_dead"):
        service.submit(job("b"), news.put)
    service.close()
