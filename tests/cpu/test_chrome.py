"""Traces for Perfetto: valid by the Trace Event Format, and times that add up."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import pytest

from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan, StepResult
from penstock.core.service import Abort, Submission
from penstock.core.setup import EngineSetup
from penstock.core.steplog import StepLog
from penstock.core.trace import Trace
from penstock.serving.chrome import REQUESTS, SAMPLES, chrome_trace
from penstock.serving.history import Visit
from penstock.serving.requestlog import Line
from penstock.serving.steps import Composition
from penstock.sim.toy import ToyExecutor
from penstock.spec import SamplingParams, Vocabulary


class Clock:
    """Goes on by a millisecond each time that it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Timed:
    """The toy with times of its own, which fails at one step."""

    def __init__(self, setup: EngineSetup, clock: Clock, bad: int) -> None:
        self.clock, self.toy = clock, ToyExecutor(setup.pools, setup.block_size, 50)
        self.toy.fault = lambda plan: plan.number == bad

    def submit(self, plan: StepPlan) -> Any:
        started = self.clock()
        done = self.toy.submit(plan)
        if isinstance(done.result, StepResult):
            done.result.started, done.result.forward, done.result.sample = started, 0.0004, 0.0002
        return done

    def close(self) -> None:
        pass


def job(id: str, length: int, max_tokens: int) -> Submission:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    tokens = tuple(sum(map(ord, id)) % 40 + i % 5 for i in range(length))
    return Submission(id=id, tokens=tokens, params=params, seed=0)


def lived(blocks: int, depth: int, bad: int = -1, until: int = 10**9) -> Trace:
    """An engine whose requests are chunked, queued, preempted, aborted and done again."""
    setup = EngineSetup(
        pools=(PoolSpec(blocks),),
        block_size=4,
        numerics_id=b"t",
        limits=Limits(max_batch_tokens=8, max_batch_requests=3, max_model_len=64),
        vocabulary=Vocabulary(size=50),
        depth=depth,
    )
    clock = Clock()
    loop = Engine(setup.scheduler(), Timed(setup, clock, bad), lambda news: None, depth, log=StepLog(clock))
    for number, (length, tokens) in enumerate([(20, 12), (5, 20), (9, 17), (3, 3), (14, 6)]):
        loop.post(job(f"r{number}", length, tokens))
    steps = 0
    while loop.busy and steps < until:
        steps += 1
        if steps == 15:
            loop.post(Abort("r1"))
        loop.launch(clock())
        loop.land()
    return loop.look(1e9)


def valid(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Its events, once they are what the format asks for: slices of a track are apart or one within the other."""
    events: list[dict[str, Any]] = json.loads(json.dumps(trace))["traceEvents"]
    assert {event["ph"] for event in events} <= {"X", "C", "M"}
    moments = [event["ts"] for event in events if event["ph"] != "M"]
    assert moments == sorted(moments) and (not moments or moments[0] == 0)
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
        elif event["ph"] == "C":
            assert event["args"] and all(type(value) is int and value >= 0 for value in event["args"].values())
        else:
            start, end = round(1000 * event["ts"]), round(1000 * (event["ts"] + event["dur"]))
            stack = open_until[event["pid"], event["tid"]]
            while stack and stack[-1] <= start:
                stack.pop()
            assert end >= start and (not stack or end <= stack[-1]), event
            stack.append(end)
    return events


@pytest.mark.parametrize(
    ("blocks", "depth", "bad", "until"), [(64, 1, -1, 10**9), (9, 1, -1, 10**9), (9, 2, 7, 10**9), (9, 2, -1, 12)]
)
def test_slices_of_a_sample_add_up_to_its_life(blocks: int, depth: int, bad: int, until: int) -> None:
    trace = lived(blocks, depth, bad, until)
    events = valid(chrome_trace(trace))
    named = [event for event in events if event["name"] == "thread_name" and event["pid"] == SAMPLES]
    names = {event["tid"]: event["args"]["name"] for event in named}
    met = set()
    for tid, request in enumerate(trace.requests, 1):
        assert names[tid] == f"{request.id} #0"
        pieces = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (SAMPLES, tid)]
        met |= {event["name"] for event in pieces}
        end = trace.now if request.ended is None else request.ended
        assert sum(event["dur"] for event in pieces) == pytest.approx(1e6 * (end - request.arrived), abs=1)
        ends = [event["ts"] + event["dur"] for event in pieces]
        assert [event["ts"] for event in pieces[1:]] == pytest.approx(ends[:-1], abs=0.002)  # one after the other
        if request.preempted and request.known > request.prompt and request.ended:
            assert "preempted" in {event["name"] for event in pieces}
    assert met >= {"queue", "prefill", "decode"} and "earlier" not in met
    assert len(trace.inflight) == (until < 100)
    assert ("in flight" in str(events)) == (until < 100)
    assert ("preempted" in met) == (blocks == 9) and ("failed step" in met) == (bad >= 0)


def test_every_position_is_in_one_count() -> None:
    for trace in (lived(64, 1), lived(9, 2, bad=7)):
        composition = Composition(trace.requests)
        made = [composition.of(step) for step in trace.steps]
        assert [sum(tokens) for tokens in made] == [sum(c for *_, c in step.slices) for step in trace.steps]
        firsts = {(number, start + i) for step in trace.steps for number, start, c in step.slices for i in range(c)}
        prompts = {request.number: request.prompt for request in trace.requests}
        assert sum(tokens.prompt for tokens in made) == sum(position < prompts[n] for n, position in firsts)
        assert sum(tokens.decode for tokens in made) == sum(position >= prompts[n] for n, position in firsts)


def test_what_was_computed_before_the_trace_began_is_not_taken_for_new() -> None:
    """After a preemption 11 positions in one step: the prompt's last, and 10 tokens that follow it."""
    step = lived(64, 1).steps[0]
    step.slices = [(0, 8, 11)]
    (request, *_) = lived(64, 1).requests
    assert Composition([request._replace(number=0, prompt=9)]).of(step) == (0, 1, 10)


def test_an_old_life_is_told_as_far_as_it_is_known() -> None:
    trace = lived(64, 1)
    late = Trace(now=trace.now, steps=trace.steps[6:], requests=trace.requests, pools=trace.pools)
    events = valid(chrome_trace(late))
    assert "earlier" in {event["name"] for event in events}
    assert valid(chrome_trace(Trace(now=5.0)))


def test_phases_of_a_request_of_the_server_add_up_to_its_time() -> None:
    line = Line(
        time=datetime.now(UTC), id="a", tenant=None, key=None, path="/v1/completions", status=200, model="m",
        prompt_tokens=9, cached_tokens=4, completion_tokens=3, finish="length", admitted_s=0.25, started_s=0.5,
        first_token_s=1.0, total_s=4.0, ahead=0, longest_gap_s=0.1, client_s=1.5,
    )  # fmt: skip
    events = valid(chrome_trace(Trace(now=20.0), [Visit(line, 10.0, ((11.5, 1.0), (13.9, 0.5)), "cmpl-1")]))
    pieces = {event["name"]: event for event in events if event["ph"] == "X" and event["pid"] == REQUESTS}
    assert pieces["request"]["dur"] == 4e6 and pieces["request"]["args"]["answer"] == "cmpl-1"
    assert [pieces[name]["dur"] for name in ("read", "queue", "prefill", "decode")] == [25e4, 25e4, 5e5, 3e6]
    assert pieces["waiting for its client"]["ts"] > pieces["decode"]["ts"]
