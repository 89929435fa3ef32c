"""Random lives of an engine over the toy model, for property tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan
from penstock.core.service import Abort, Submission, Update
from penstock.core.setup import EngineSetup
from penstock.sim.replay import Recorder, replay
from penstock.sim.toy import ToyExecutor, toy_completion
from penstock.spec import SamplingParams, Vocabulary

VOCAB, EOS, POISON = 64, 0, 64  # the toy draws ids below 64, so that poison comes only with a prompt
STEM = [2 + (7 * i) % 61 for i in range(64)]


@dataclass(frozen=True)
class Arrival:
    step: int
    submission: Submission
    abort_step: int | None
    abort_sample: int | None
    poisoned: bool


@dataclass(frozen=True)
class Life:
    setup: EngineSetup
    arrivals: list[Arrival]
    failing: frozenset[int]  # numbers of plans whose step fails whoever is in it


@dataclass
class Outcome:
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    last: dict[tuple[str, int], Update] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    recorder: Recorder | None = None


@st.composite
def lives(draw: st.DrawFn) -> Life:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    windows = draw(st.sampled_from([(None,), (None, 5), (None, 9), (3,), (7,), (2, 6)]))
    longest = draw(st.sampled_from([24, 40, 64]))
    blocks = [draw(st.integers(2, 1 + 3 * longest // size)) for _ in windows]
    rows = draw(st.integers(1, 6))
    setup = EngineSetup(
        pools=tuple(PoolSpec(b, w) for b, w in zip(blocks, windows, strict=True)),
        block_size=size,
        numerics_id=b"toy",
        limits=Limits(
            max_batch_tokens=draw(st.integers(rows, 32)),
            max_batch_requests=rows,
            max_model_len=longest,
            max_prefix_waits=draw(st.sampled_from([0, 2, 32])),
        ),
        vocabulary=Vocabulary(size=VOCAB + 1, eos_ids=frozenset([EOS])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        age_seconds=3.0,
        prefix_cache=draw(st.sampled_from([True, True, True, False])),
        depth=draw(st.sampled_from([1, 2, 2, 3])),
    )
    faulty = draw(st.sampled_from(["none", "none", "poison", "steps"]))
    arrivals = [draw(_arrival(i, longest, faulty == "poison")) for i in range(draw(st.integers(1, 9)))]
    failing = draw(st.frozensets(st.integers(0, 40), max_size=4)) if faulty == "steps" else frozenset()
    return Life(setup, arrivals, frozenset(failing))


@st.composite
def _arrival(draw: st.DrawFn, index: int, longest: int, poison: bool) -> Arrival:
    shared = draw(st.integers(0, longest))
    own = draw(st.lists(st.integers(2, VOCAB - 1), min_size=0 if shared else 1, max_size=6))
    prompt = STEM[:shared] + own
    poisoned = poison and draw(st.integers(0, 3)) == 0
    if poisoned:
        prompt[draw(st.integers(0, len(prompt) - 1))] = POISON
    step = draw(st.integers(0, 12))
    params = SamplingParams(
        n=draw(st.sampled_from([1, 2, 3])),
        max_tokens=draw(st.sampled_from([1, 3, 8, 20, None])),
        ignore_eos=draw(st.booleans()),
        min_tokens=0,
    )
    submission = Submission(
        id=f"r{index}",
        tokens=tuple(prompt),
        params=params,
        seed=draw(st.integers(0, 3)),
        priority=draw(st.integers(-2, 2)),
        tenant=draw(st.sampled_from(["", "", "other"])),
    )
    abort = draw(st.one_of(st.none(), st.none(), st.integers(step, step + 20)))
    return Arrival(step, submission, abort, draw(st.sampled_from([None, None, 0, 1])), poisoned)


def live(life: Life, max_launches: int = 4000) -> Outcome:
    """Runs a life to its end; checks the books after every launch and landing."""
    setup = life.setup
    outcome = Outcome(recorder=Recorder(setup))

    def deliver(updates: list[Update]) -> None:
        for update in updates:
            key = (update.id, update.sample)
            assert key not in outcome.last, f"{key} heard something after its end"
            outcome.tokens.setdefault(key, []).extend(update.tokens)
            if update.finish_reason:
                outcome.last[key] = update

    def fault(plan: StepPlan) -> bool:
        failed = plan.number in life.failing
        return failed or any(POISON in executor.rows[id].tokens[: start + count] for id, start, count in plan.slices)

    executor = ToyExecutor(setup.pools, setup.block_size, VOCAB, fault, setup.limits.max_batch_requests)
    scheduler = setup.scheduler()
    engine = Engine(scheduler, executor, deliver, setup.depth, outcome.recorder)

    def check() -> None:
        holders = {r.id: r for r in scheduler.running}
        for record in scheduler.inflight:
            holders.update((r.id, r) for r in record.requests)
        scheduler.kv.check(holders.values())

    for step in range(max_launches):
        for arrival in life.arrivals:
            if arrival.step == step:
                engine.post(arrival.submission)
            if arrival.abort_step == step:
                engine.post(Abort(arrival.submission.id, arrival.abort_sample))
        engine.launch(float(step))
        check()
        outcome.events["overlap"] += len(engine.inflight) > 1
        engine.land()
        check()
        if not engine.busy and step > 40:
            break
    assert not engine.busy, "somebody starves"
    assert all(pool.available == pool.total for pool in scheduler.kv.pools), "blocks leaked"
    assert not scheduler.kv.pending and not scheduler.suspects and not scheduler.running
    assert scheduler.status().waiting == 0
    counters = scheduler.counters
    outcome.events.update(
        hits=counters.prefix_hit_tokens,
        preemptions=counters.preemptions,
        copies=counters.copies,
        failures=counters.failed_steps,
        aborts=sum(u.finish_reason == "abort" for u in outcome.last.values()),
    )
    return outcome


def verify(life: Life, outcome: Outcome) -> None:
    """Every sample got the tokens it gets alone, ended once, and for the right reason."""
    windows = [spec.window for spec in life.setup.pools]
    for arrival in life.arrivals:
        submission, params = arrival.submission, arrival.submission.params
        prompt = submission.tokens
        for sample in range(params.n):
            last = outcome.last[submission.id, sample]
            got = outcome.tokens.get((submission.id, sample), [])
            if last.error is not None and last.error.code in ("prompt_too_long", "kv_too_small"):
                assert not got
                continue
            room = life.setup.limits.max_model_len - len(prompt)
            count = min(room, params.max_tokens or room)
            expected = toy_completion(prompt, count, windows, submission.seed, sample, VOCAB)
            reason = "length"
            if not params.ignore_eos and EOS in expected:
                expected, reason = expected[: expected.index(EOS) + 1], "stop"
            if last.finish_reason == "error":
                assert last.error is not None and last.error.code == "injected_fault"
                assert arrival.poisoned or life.failing, "an innocent request failed"
                assert got == expected[: len(got)]
            elif last.finish_reason == "abort":
                assert arrival.abort_step is not None and got == expected[: len(got)]
            else:
                assert not arrival.poisoned and (got, last.finish_reason) == (expected, reason)


def replays(outcome: Outcome) -> None:
    assert outcome.recorder is not None
    replayed = replay(outcome.recorder.lines)
    assert replayed.differs_at is None
