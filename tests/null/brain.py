"""Random lives of an engine over the toy model, for property tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan
from penstock.core.service import Abort, Submission, Task, Update
from penstock.core.setup import EngineSetup
from penstock.sim.replay import Recorder, replay
from penstock.sim.toy import ToyExecutor, toy_completion, toy_reports, toy_vector
from penstock.spec import FinishReason, SamplingParams, TokenLogprobs, Vocabulary

VOCAB, EOS, POISON = 64, 0, 64  # the toy draws ids below 64, so that poison comes only with a prompt
STEM = [2 + (7 * i) % 61 for i in range(64)]


@dataclass(frozen=True)
class Arrival:
    step: int
    submission: Submission
    aborts: tuple[tuple[int, int | None], ...]  # (step, sample or all)
    poisoned: bool


@dataclass(frozen=True)
class Life:
    setup: EngineSetup
    arrivals: list[Arrival]
    failing: frozenset[int]  # numbers of plans whose step fails whoever is in it
    bad_rows: frozenset[tuple[int, int]]  # plan and slice whose row fails alone


@dataclass
class Outcome:
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    reports: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    last: dict[tuple[str, int], Update] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    recording: list[str] = field(default_factory=list)


@st.composite
def lives(draw: st.DrawFn, begun: bool = False) -> Life:
    """``begun``: an engine before this one was lost, and its requests go on."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    whole = draw(st.integers(0, 24)) == 24  # an encoder
    windows = () if whole else draw(st.sampled_from([(None,), (None, 5), (None, 9), (3,), (7,), (2, 6)]))
    longest = draw(st.sampled_from([24, 40, 64]))
    most = draw(st.sampled_from([7, 1 + 3 * longest // size]))
    blocks = [draw(st.integers(2, max(2, most))) for _ in windows]
    rows = draw(st.integers(1, 6))
    setup = EngineSetup(
        pools=tuple(PoolSpec(b, w) for b, w in zip(blocks, windows, strict=True)),
        block_size=size,
        numerics_id=b"toy",
        limits=Limits(
            max_batch_tokens=draw(st.integers(rows, 80 if whole else 32)),
            max_batch_requests=rows,
            max_model_len=longest,
            max_mixed_prefill=(None, 1, 3)[rows % 3],  # no draw of its own: another would change what the others find
            max_prefix_waits=draw(st.sampled_from([0, 2, 32])),
            whole=whole,
        ),
        vocabulary=Vocabulary(size=VOCAB + 1, eos_ids=frozenset([EOS])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        age_seconds=3.0,
        prefix_cache=not whole and draw(st.sampled_from([True, True, True, False])),
        depth=draw(st.sampled_from([1, 2, 2, 3, 4])),
    )
    faulty = draw(st.sampled_from(["none", "none", "poison", "steps", "many steps", "rows"]))
    tasks = (
        ["mean", "cls"] if whole else draw(st.sampled_from([["generate"], ["generate", "generate", "mean", "last"]]))
    )
    arrivals = [
        draw(_arrival(i, longest, faulty == "poison", tasks, windows if begun else None))
        for i in range(draw(st.integers(1, 9)))
    ]
    failing = {
        "steps": st.frozensets(st.integers(0, 40), max_size=4),
        "many steps": st.frozensets(st.integers(0, 30), min_size=5, max_size=15),
    }
    bad_rows = st.frozensets(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=6)
    nothing: frozenset[Any] = frozenset()
    return Life(
        setup,
        arrivals,
        draw(failing[faulty]) if faulty in failing else nothing,
        draw(bad_rows) if faulty == "rows" else nothing,
    )


@st.composite
def _arrival(
    draw: st.DrawFn,
    index: int,
    longest: int,
    poison: bool,
    tasks: list[Task],
    windows: tuple[int | None, ...] | None,
) -> Arrival:
    shared = draw(st.one_of(st.integers(0, 10), st.integers(0, longest)))
    own = draw(st.lists(st.integers(2, VOCAB - 1), min_size=0 if shared else 1, max_size=6))
    prompt = STEM[:shared] + own
    poisoned = poison and draw(st.integers(0, 3)) == 0
    if poisoned:
        prompt[draw(st.integers(0, len(prompt) - 1))] = POISON
    step = draw(st.integers(0, 12))
    task = draw(st.sampled_from(tasks))
    params = SamplingParams(
        n=draw(st.sampled_from([1, 2, 3, 4, 6])) if task == "generate" else 1,
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])) if task == "generate" else None,
        max_tokens=draw(st.sampled_from([1, 3, 8, 20, None])),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 1])),
        stop_token_ids=draw(st.sampled_from([(), (), (3, 9, 27)])),
    )
    submission = Submission(
        id=f"r{index}",
        tokens=tuple(prompt),
        params=params,
        seed=draw(st.integers(0, 3)),
        priority=draw(st.integers(-2, 2)),
        task=task,
        tenant=draw(st.sampled_from(["", "", "other"])),
    )
    if task == "generate" and windows is not None:
        submission = draw(_begun(submission, longest, windows))
    one_abort = st.tuples(st.integers(step, step + 20), st.sampled_from([None, None, 0, 1]))
    aborts = draw(st.one_of(st.just([]), st.just([]), st.lists(one_abort, min_size=1, max_size=3)))
    return Arrival(step, submission, tuple(aborts), poisoned)


@st.composite
def _begun(draw: st.DrawFn, submission: Submission, longest: int, windows: Sequence[int | None]) -> Submission:
    """The same request as another engine left it, some samples of it ended."""
    if len(submission.tokens) >= longest:
        return submission
    n = submission.params.n
    alive, emitted = draw(st.integers(0, n - 1)), list[tuple[int, ...] | None]()
    for sample in range(n):
        whole = expected(submission, sample, longest, windows)[0]
        ended = sample != alive and draw(st.integers(0, 3)) == 0
        emitted.append(None if ended else tuple(whole[: draw(st.integers(0, len(whole) - 1))]))
    return replace(submission, emitted=tuple(emitted))


def expected(
    submission: Submission, sample: int, longest: int, windows: Sequence[int | None]
) -> tuple[list[int], FinishReason]:
    """Tokens and end of a sample that runs alone and undisturbed."""
    params = submission.params
    room = longest - len(submission.tokens)
    tokens = toy_completion(
        submission.tokens, min(room, params.max_tokens or room), windows, submission.seed, sample, VOCAB
    )
    stops = {*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids}
    if ends := [i for i, token in enumerate(tokens) if token in stops and i >= params.min_tokens]:
        return tokens[: ends[0] + 1], "stop"
    return tokens, "length"


def live(life: Life, max_launches: int = 4000) -> Outcome:
    """Runs a life to its end; checks the books after every launch and landing."""
    setup = life.setup
    outcome = Outcome()

    prompts = {arrival.submission.id: len(arrival.submission.tokens) for arrival in life.arrivals}

    def deliver(updates: list[Update]) -> None:
        for update in updates:
            key = (update.id, update.sample)
            assert key not in outcome.last, f"{key} heard something after its end"
            outcome.tokens.setdefault(key, []).extend(update.tokens)
            if update.prompt_logprobs:
                assert update.sample == 0 and not outcome.tokens[key], "the prompt is reported before the first token"
                outcome.reports.setdefault(update.id, []).extend(update.prompt_logprobs)
            assert update.cached_tokens <= prompts[update.id], "more was found than there is"
            if update.finish_reason:
                outcome.last[key] = update

    def fault(plan: StepPlan) -> bool:
        failed = plan.number in life.failing
        return failed or any(POISON in executor.rows[id].tokens[: start + count] for id, start, count in plan.slices)

    def bad_row(plan: StepPlan, index: int) -> bool:
        return (plan.number, index) in life.bad_rows

    executor = ToyExecutor(setup.pools, setup.block_size, VOCAB, fault, bad_row, setup.limits.max_batch_requests)
    scheduler = setup.scheduler()
    engine = Engine(scheduler, executor, deliver, setup.depth, Recorder(setup, outcome.recording.append))

    def check() -> None:
        holders = {r.id: r for r in scheduler.running}
        for record in scheduler.inflight:
            holders.update((r.id, r) for r in record.requests)
        scheduler.kv.check(holders.values())

    last = max(step for arrival in life.arrivals for step in (arrival.step, *(step for step, _ in arrival.aborts)))
    for step in range(max_launches):
        for arrival in life.arrivals:
            if arrival.step == step:
                engine.post(arrival.submission)
            for abort_step, sample in arrival.aborts:
                if abort_step == step:
                    engine.post(Abort(arrival.submission.id, sample))
        engine.launch(float(step))
        check()
        outcome.events["overlap"] += len(engine.inflight) > 1
        engine.land()
        check()
        if not engine.busy and step >= last:
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
        vectors=sum(u.vector is not None for u in outcome.last.values()),
        reports=len(outcome.reports),
        continued=sum(any(arrival.submission.emitted) for arrival in life.arrivals),
    )
    return outcome


def verify(life: Life, outcome: Outcome) -> None:
    """Every sample got the tokens it gets alone, ended once, and for the right reason."""
    windows = [spec.window for spec in life.setup.pools]
    for arrival in life.arrivals:
        submission, params = arrival.submission, arrival.submission.params
        prompt = submission.tokens
        for sample, emitted in submission.unfinished:
            last = outcome.last[submission.id, sample]
            got = outcome.tokens.get((submission.id, sample), [])
            if last.error is not None and last.error.code in ("prompt_too_long", "kv_too_small"):
                assert not got
                continue
            if submission.task != "generate":
                _verify_vector(life, arrival, last)
                continue
            if sample == 0 and params.prompt_logprobs is not None:
                all_reports = toy_reports(prompt, windows)
                reports = outcome.reports.get(submission.id, [])
                assert reports == (all_reports if got else all_reports[: len(reports)])
            whole, reason = expected(submission, sample, life.setup.limits.max_model_len, windows)
            wanted = whole[len(emitted) :]
            if last.finish_reason == "error":
                code = last.error.code if last.error else None
                guilty = arrival.poisoned or life.failing if code == "injected_fault" else life.bad_rows
                assert guilty and code in ("injected_fault", "numerical_error"), "an innocent request failed"
                assert got == wanted[: len(got)]
            elif last.finish_reason == "abort":
                assert arrival.aborts and got == wanted[: len(got)]
            else:
                assert not arrival.poisoned and (got, last.finish_reason) == (wanted, reason)


def _verify_vector(life: Life, arrival: Arrival, last: Update) -> None:
    if last.finish_reason == "stop":
        windows = [spec.window for spec in life.setup.pools]
        submission = arrival.submission
        assert not arrival.poisoned and last.vector == toy_vector(submission.tokens, windows, submission.task)
    elif last.finish_reason == "abort":
        assert arrival.aborts
    else:
        assert last.finish_reason == "error" and last.error is not None
        guilty = arrival.poisoned or life.failing if last.error.code == "injected_fault" else life.bad_rows
        assert guilty, "an innocent request failed"


def replays(outcome: Outcome) -> None:
    replayed = replay(outcome.recording)
    assert replayed.differs_at is None
