"""What the scheduler promises, one promise at a time. Random lives are in test_brain.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from penstock.base import EngineError, InvalidRequest
from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepFailed, StepPlan, StepResult
from penstock.core.scheduler import Scheduler
from penstock.core.service import Submission, Update
from penstock.core.setup import EngineSetup
from penstock.sim.toy import ToyExecutor, toy_completion
from penstock.spec import SamplingParams, Timing, Vocabulary

PROMPT = tuple(range(1, 33))


def setup(
    blocks: int = 64,
    window: int | None = None,
    tokens: int = 16,
    rows: int = 4,
    depth: int = 1,
    policy: str = "fcfs",
    waits: int = 32,
    mixed: int | None = None,
) -> EngineSetup:
    limits = Limits(
        max_batch_tokens=tokens,
        max_batch_requests=rows,
        max_model_len=64,
        max_mixed_prefill=mixed,
        max_prefix_waits=waits,
    )
    return EngineSetup(
        pools=(PoolSpec(blocks, window),),
        block_size=4,
        numerics_id=b"t",
        limits=limits,
        vocabulary=Vocabulary(size=100, eos_ids=frozenset([0])),
        policy=policy,
        depth=depth,
    )


def job(
    id: str, tokens: tuple[int, ...] = PROMPT, *, n: int = 1, max_tokens: int = 8, priority: int = 0, tenant: str = ""
) -> Submission:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True)
    return Submission(id=id, tokens=tokens, params=params, seed=0, priority=priority, tenant=tenant)


def step(scheduler: Scheduler, executor: ToyExecutor, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now)
    assert plan is not None
    scheduler.commit(plan, executor.submit(plan).wait())
    return plan


def toy(s: EngineSetup) -> ToyExecutor:
    return ToyExecutor(s.pools, s.block_size, 50)


@pytest.mark.parametrize(
    ("submission", "blocks", "code"),
    [
        (job("a", ()), 64, "empty_prompt"),
        (job("a", (1, 100)), 64, "token_out_of_range"),
        (job("a", (1, -1)), 64, "token_out_of_range"),
        (job("a", (1,) * 64), 64, "prompt_too_long"),
        (job("a", max_tokens=30), 15, "kv_too_small"),
    ],
)
def test_what_can_never_run_is_refused(submission: Submission, blocks: int, code: str) -> None:
    scheduler = setup(blocks).scheduler()
    with pytest.raises(InvalidRequest) as refused:
        scheduler.add(submission, 0.0)
    assert refused.value.code == code
    assert scheduler.idle


def test_a_request_that_needs_the_whole_pool_runs() -> None:
    s = setup(blocks=16)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a", max_tokens=32), 0.0)  # 64 tokens, of which the last is never computed
    while not scheduler.idle:
        step(scheduler, executor)
    assert scheduler.counters.preemptions == 0


def test_a_long_prompt_does_not_hold_up_decodes() -> None:
    s = setup(tokens=8)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("decoding", (1, 2, 3)), 0.0)
    step(scheduler, executor)
    scheduler.add(job("long"), 1.0)
    scheduler.add(job("late", (7, 8, 9)), 2.0)
    for _ in range(4):
        plan = step(scheduler, executor)
        assert plan.slices[0][2] == 1  # the decode goes on
        assert sum(count for _, _, count in plan.slices) == 8  # beside chunks that fill the budget


def test_prompts_get_less_of_a_step_in_which_somebody_waits_for_a_token() -> None:
    own = setup(tokens=16, mixed=4)
    scheduler, executor = own.scheduler(), toy(own)
    scheduler.add(job("a", tuple(range(1, 25)), max_tokens=4), 0.0)
    sizes = [[count for _, _, count in step(scheduler, executor).slices] for _ in range(2)]
    assert sizes == [[16], [8]]  # nobody waits: all of the budget
    scheduler.add(job("b", tuple(range(31, 51))), 0.0)
    scheduler.add(job("c", tuple(range(61, 71))), 0.0)
    sizes = [[count for _, _, count in step(scheduler, executor).slices] for _ in range(4)]
    assert sizes == [[1, 4], [1, 4], [1, 4], [8, 8]]  # a ends with its fourth token


def test_running_requests_behind_a_long_prompt_are_promised_a_token_each() -> None:
    s = setup(tokens=8, policy="priority")
    scheduler, executor = s.scheduler(), toy(s)
    for id in ("x", "y"):
        scheduler.add(job(id, (5, 6)), 0.0)
    step(scheduler, executor)
    scheduler.add(job("urgent", priority=-9), 1.0)
    plan = step(scheduler, executor)
    assert [count for _, _, count in plan.slices] == [6, 1, 1]


def test_equal_prompts_are_computed_once() -> None:
    s = setup(tokens=64)
    scheduler, executor = s.scheduler(), toy(s)
    for i in range(4):
        scheduler.add(job(f"r{i}", (*PROMPT, 40 + i)), 0.0)
    computed = 0
    while not scheduler.idle:
        computed += sum(count for _, _, count in step(scheduler, executor).slices)
    assert computed == 32 + 4 + 4 * 7  # the shared prefix once, each one's last prompt token, and the decodes
    assert scheduler.counters.prefix_hit_tokens == 3 * 32


def test_the_wait_for_a_shared_prefix_is_bounded() -> None:
    s = setup(tokens=64, waits=0)
    scheduler, executor = s.scheduler(), toy(s)
    for i in range(2):
        scheduler.add(job(f"r{i}"), 0.0)
    assert len(step(scheduler, executor).slices) == 2


def test_tenants_and_adapters_share_nothing() -> None:
    s = setup(tokens=64)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a"), 0.0)
    while not scheduler.idle:
        step(scheduler, executor)
    scheduler.add(job("b", tenant="other"), 0.0)
    while not scheduler.idle:
        step(scheduler, executor)
    assert scheduler.counters.prefix_hit_tokens == 0


def test_samples_share_the_prompt_and_copy_the_block_they_write() -> None:
    s = setup(tokens=64)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a", PROMPT[:30], n=3), 0.0)
    step(scheduler, executor)
    plan = step(scheduler, executor)
    assert [copy.src for copy in plan.copies] == [plan.copies[0].src] * 2
    assert [count for _, _, count in plan.slices] == [1, 1, 1]
    assert scheduler.kv.used == 8 + 2  # eight blocks of prompt, and a tail of its own for each other sample


def test_priority_ages_into_service() -> None:
    s = setup(rows=1, policy="priority")
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("low", priority=2), 0.0)
    order = []
    for second in range(1, 400):
        if second % 8 == 0 and second < 200:
            scheduler.add(job(f"high{second}", (second % 90, 3), priority=0), float(second))
        if scheduler.idle:
            break
        step(scheduler, executor, float(second))
        order += [u.id for u in scheduler.outbox if u.finish_reason]
        scheduler.outbox.clear()
    # Two levels are worth twenty seconds: whoever came later than that finds "low" in front.
    assert order.index("low") <= 4


def test_preemption_takes_the_last_in_line_and_loses_no_token() -> None:
    s = setup(blocks=12)
    scheduler, executor = s.scheduler(), toy(s)
    got: dict[str, list[int]] = {}
    engine = Engine(scheduler, executor, lambda us: [got.setdefault(u.id, []).extend(u.tokens) for u in us] and None)
    for i in range(3):
        engine.post(job(f"r{i}", PROMPT[i : i + 8], max_tokens=24))
    while engine.busy:
        engine.launch(0.0)
        engine.land()
    assert scheduler.counters.preemptions > 0
    assert [len(tokens) for tokens in got.values()] == [24] * 3


def test_updates_say_what_their_sample_waited_for() -> None:
    """In the queue until its first step, and for memory after a preemption."""
    s = setup(blocks=8, rows=2)
    scheduler, executor = s.scheduler(), toy(s)
    for i, id in enumerate("abc"):
        scheduler.add(job(id, (i,) * 5, max_tokens=20), float(i))
    now = 10.0
    while not scheduler.idle:
        step(scheduler, executor, now := now + 1)
    assert scheduler.counters.preemptions
    told: dict[str, list[Timing]] = {}
    for update in scheduler.outbox:
        told.setdefault(update.id, []).extend([update.timing] if update.timing else [])
    assert {id: {timing.queued for timing in told[id]} for id in "ab"} == {"a": {11.0}, "b": {10.0}}
    (first, *_, last) = told["b"]
    assert first == (10.0, 0, 0.0) and told["a"][-1].starved == 0  # nobody is before it
    assert last.preempted == scheduler.counters.preemptions and last.starved > 0
    assert told["c"][0].queued > 19  # it had to wait for one of them to end


def test_blocks_of_an_aborted_request_wait_for_its_step() -> None:
    scheduler = setup(depth=2).scheduler()
    scheduler.add(job("a"), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.abort("a")
    assert [u.finish_reason for u in scheduler.outbox] == ["abort"]
    assert scheduler.kv.used == 4
    scheduler.commit(plan, StepResult([()]))
    assert scheduler.kv.used == 0
    assert scheduler.idle


def test_a_failed_step_fails_only_the_guilty() -> None:
    s = setup(depth=2, tokens=64)
    guilty = 77
    executor = ToyExecutor(
        s.pools, s.block_size, 50, lambda plan: any(guilty in executor.rows[id].tokens for id, _, _ in plan.slices)
    )
    last: dict[str, Update] = {}
    engine = Engine(s.scheduler(), executor, lambda us: last.update((u.id, u) for u in us if u.finish_reason), depth=2)
    for i, token in enumerate((5, guilty, 6)):
        engine.post(job(f"r{i}", (1, 2, token)))
    while engine.busy:
        engine.launch(0.0)
        engine.land()
    assert [last[f"r{i}"].finish_reason for i in range(3)] == ["length", "error", "length"]


def test_a_lone_request_whose_step_fails_ends_with_its_error() -> None:
    scheduler = setup().scheduler()
    scheduler.add(job("a"), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    error = EngineError("step_failed", "no luck")
    scheduler.commit(plan, StepFailed(error))
    assert [u.error for u in scheduler.outbox] == [error]
    assert scheduler.idle and scheduler.kv.used == 0


def test_a_window_gives_back_what_it_no_longer_sees() -> None:
    s = setup(blocks=4, window=6)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a", max_tokens=32), 0.0)  # 63 positions in a pool of 16
    while not scheduler.idle:
        step(scheduler, executor)
        assert scheduler.kv.used <= 4


def test_nothing_enters_while_somebody_is_short_of_blocks() -> None:
    s = setup(blocks=10, tokens=64)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a", PROMPT, max_tokens=8), 0.0)
    step(scheduler, executor)
    scheduler.add(job("b", tuple(range(40, 60)), max_tokens=8), 1.0)
    plan = step(scheduler, executor)
    assert scheduler.running[0].submission.id == "a"
    assert plan.slices[0][2] == 1


def test_ten_thousand_waiting_requests_do_not_slow_a_plan_down() -> None:
    """Counted, not timed: planning touches the heap of waiting requests only when there is room."""
    s = setup(rows=4)
    scheduler, executor = s.scheduler(), toy(s)
    for i in range(4):
        scheduler.add(job(f"r{i}", (i + 1, 2), max_tokens=8), 0.0)
    step(scheduler, executor)

    class Counted(list[object]):
        touched = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override]
            Counted.touched += 1
            return super().__getitem__(index)  # type: ignore[index]

    for i in range(10_000):
        scheduler.add(job(f"w{i}", (9, 9)), 1.0)
    scheduler.waiting = Counted(scheduler.waiting)  # type: ignore[assignment]
    step(scheduler, executor)
    assert Counted.touched <= 3 * 5


def test_a_hit_moves_the_window_too() -> None:
    """A request that waits for a block while another seals what comes next must not keep what it slid past."""
    s = setup(blocks=7, window=7, tokens=2, rows=2, waits=0)
    s = replace(s, block_size=1)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("a", PROMPT[:7], max_tokens=1), 0.0)
    scheduler.add(job("b", PROMPT[:8], max_tokens=1), 0.0)
    while not scheduler.idle:
        step(scheduler, executor)


def test_nobody_finds_what_a_failed_row_computed() -> None:
    s = setup(tokens=64)
    executor = ToyExecutor(s.pools, s.block_size, 50, bad_row=lambda plan, index: plan.number == 0)
    scheduler = s.scheduler()
    scheduler.add(job("bad"), 0.0)
    step(scheduler, executor)
    assert [u.finish_reason for u in scheduler.outbox] == ["error"]
    scheduler.outbox.clear()
    scheduler.add(job("good"), 1.0)
    while not scheduler.idle:
        step(scheduler, executor)
    assert scheduler.counters.prefix_hit_tokens == 0
    tokens = [token for update in scheduler.outbox for token in update.tokens]
    assert tokens == toy_completion(PROMPT, 8, [None], 0, 0, 50)


@pytest.mark.parametrize("guilty", [frozenset([0]), frozenset([21]), frozenset([63]), frozenset([5, 40])])
def test_a_step_that_fails_is_bisected(guilty: frozenset[int]) -> None:
    """64 requests decode side by side. Each guilty one is alone after log2 64 lineups, not after one for each mate."""
    s = setup(blocks=1024, tokens=256, rows=64)
    scheduler, executor = s.scheduler(), toy(s)
    executor.fault = lambda plan: plan.number >= 3 and any(id in guilty for id, _, _ in plan.slices)
    for i in range(64):
        scheduler.add(job(str(i), (i, 9), max_tokens=8), 0.0)
    while not scheduler.idle:
        step(scheduler, executor)
    assert {u.id for u in scheduler.outbox if u.finish_reason == "error"} == set(map(str, guilty))
    for i in set(range(64)) - guilty:
        tokens = [token for update in scheduler.outbox if update.id == str(i) for token in update.tokens]
        assert tokens == toy_completion((i, 9), 8, [None], 0, 0, 50)
    assert scheduler.counters.failed_steps <= 7 * len(guilty) and scheduler.counters.steps <= 9 + 8 * len(guilty)


def test_steps_that_fail_only_together_end_all_the_same() -> None:
    """No request is guilty alone, so none may fail, and none may keep the others from going on."""
    s = setup(tokens=64)
    scheduler, executor = s.scheduler(), toy(s)
    executor.fault = lambda plan: len(plan.slices) > 1
    for i in range(4):
        scheduler.add(job(str(i), (i + 1, 9)), 0.0)
    while not scheduler.idle:
        step(scheduler, executor)
    assert [u.finish_reason for u in scheduler.outbox if u.finish_reason] == ["length"] * 4


@pytest.mark.parametrize(
    ("emitted", "why"),
    [
        (((),), "1 samples"),
        ((None, None), "0 of them unfinished"),
        (((1,), (1,) * 8), "sample 1 has 8 tokens and may have 8"),
        (((1, 100), None), "sample 0 is not in the vocabulary"),
    ],
)
def test_what_cannot_go_on_is_refused(emitted: tuple[tuple[int, ...] | None, ...], why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{why}.*cannot_continue"):
        setup().scheduler().add(replace(job("a", n=2), emitted=emitted), 0.0)


def test_ended_requests_do_not_pile_up_behind_a_waiting_one() -> None:
    s = setup(rows=1)
    scheduler, executor = s.scheduler(), toy(s)
    scheduler.add(job("running"), 0.0)
    step(scheduler, executor)
    scheduler.add(job("head"), 1.0)
    for i in range(1000):
        scheduler.add(job(f"r{i}"), 2.0)
        scheduler.abort(f"r{i}")
    assert len(scheduler.waiting) < 100 and scheduler.status().waiting == 1


@pytest.mark.parametrize(
    "odd", [{"priority": 10**400}, {"tenant": "\ud800"}, {"tokens": (1.5,)}, {"tokens": ("a",)}, {"tokens": 5}]
)
def test_an_odd_submission_never_ends_the_loop(odd: dict[str, Any]) -> None:
    s = setup(policy="priority")
    last: dict[str, Update] = {}
    engine = Engine(s.scheduler(), toy(s), lambda us: last.update((u.id, u) for u in us if u.finish_reason))
    engine.post(job("good"))
    engine.post(replace(job("odd"), **odd))
    while engine.busy:
        engine.launch(0.0)
        engine.land()
    assert last["good"].finish_reason == "length"
    assert last["odd"].finish_reason in ("length", "error")
