"""Admission: never over budget, back to zero in the end, and a refusal that says when to come again tells the truth."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import OverLimit, Unavailable
from penstock.fleet import Admission, Allowance, Bucket, Rates, Visit

TENANTS = ("acme", "birch", "cedar")
LIMIT = st.none() | st.integers(1, 50)
RATES = st.builds(
    Rates, requests_per_minute=LIMIT, tokens_per_minute=st.none() | st.integers(1, 2000), concurrency=LIMIT
)


@given(
    budget=st.integers(1, 500),
    rates=st.fixed_dictionaries(dict.fromkeys(TENANTS, RATES)),
    events=st.lists(
        st.tuples(st.floats(0, 30), st.sampled_from(TENANTS), st.integers(0, 400), st.booleans(), st.integers(0, 800)),
        max_size=60,
    ),
)
def test_never_over_budget_and_back_to_zero(
    budget: int, rates: dict[str, Rates], events: list[tuple[float, str, int, bool, int]]
) -> None:
    admission, now = Admission(budget), 0.0
    live: list[Visit] = []
    for pause, tenant, tokens, ends, used in events:
        now += pause
        if ends and live:
            gone = live.pop(0)
            admission.leave(gone, now, used)
            admission.leave(gone, now, used)  # the second time does nothing
        try:
            visit = admission.enter(tenant, rates[tenant], now)
        except OverLimit as error:
            assert error.retry_after > 0
            continue
        before = admission.held
        try:
            admission.reserve(visit, used, now)  # it waits for its model
            assert admission.held <= budget and visit.charged == min(used, budget)
            admission.release(visit)
            assert admission.held == before
            admission.charge(visit, tokens, now)
            live.append(visit)
        except Unavailable as error:
            assert error.retry_after > 0 and admission.held == before
            admission.leave(visit, now)
        assert admission.held == sum(v.charged for v in live) <= budget
        assert admission.running == len(live) == sum(admission.held_by().values())
        for name in TENANTS:
            most = rates[name].concurrency
            assert most is None or admission.held_by().get(name, 0) <= most
    for visit in live:
        admission.leave(visit, now)
    assert (admission.held, admission.running, sum(admission.held_by().values())) == (0, 0, 0)
    admission.forget(set())
    assert admission.held_by() == {}


@given(
    rates=RATES,
    past=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3000), st.integers(0, 3000)), max_size=30),
    tokens=st.integers(0, 3000),
)
def test_what_is_refused_now_is_admitted_when_it_was_told_to_come_again(
    rates: Rates, past: list[tuple[float, int, int]], tokens: int
) -> None:
    """Nothing else comes meanwhile, and nothing runs any more."""
    admission, now = Admission(10**9), 0.0

    def attempt(tokens: int, used: int) -> tuple[str, float] | None:
        try:
            visit = admission.enter("acme", rates, now)
        except OverLimit as error:
            return error.code, error.retry_after
        try:
            admission.charge(visit, tokens, now)
        except OverLimit as error:
            admission.leave(visit, now)
            return error.code, error.retry_after
        admission.leave(visit, now, used)
        return None

    for pause, size, used in past:
        now += pause
        attempt(size, used)
    refused = []
    while (refusal := attempt(tokens, tokens)) is not None:
        code, wait = refusal
        refused.append(code)
        now += wait
    assert refused in ([], ["requests_over_rate"], ["tokens_over_rate"], ["requests_over_rate", "tokens_over_rate"])


@settings(max_examples=3 * settings.default.max_examples)
@given(
    per_minute=st.integers(1, 1000),
    takes=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1500)), min_size=1, max_size=50),
)
def test_a_bucket_gives_no_more_than_its_rate(per_minute: int, takes: list[tuple[float, float]]) -> None:
    bucket, now = Bucket(per_minute, 0.0), 0.0
    given_at: list[tuple[float, float]] = []
    for pause, amount in takes:
        now += pause
        if bucket.wait(amount, now) == 0.0:
            amount = min(amount, per_minute)
            bucket.take(amount, now)
            given_at.append((now, amount))
    for i in range(len(given_at)):
        for j in range(i, len(given_at)):
            window = given_at[j][0] - given_at[i][0]
            given_out = sum(amount for _, amount in given_at[i : j + 1])
            assert given_out <= per_minute * (1 + window / 60) + 1e-6


def test_what_was_estimated_is_settled_by_what_was_used() -> None:
    admission, rates = Admission(10_000), Rates(tokens_per_minute=600)
    visit = admission.enter("acme", rates, 0.0)
    admission.charge(visit, 500, 0.0)
    with pytest.raises(OverLimit, match=r"counts as 200.*600 a minute") as caught:
        admission.charge(admission.enter("acme", rates, 0.0), 200, 0.0)
    assert caught.value.retry_after == pytest.approx(10.0)  # 100 short, at 10 a second
    admission.leave(visit, 0.0, used=100)
    other = admission.enter("acme", rates, 0.0)
    admission.charge(other, 500, 0.0)  # 400 came back
    admission.leave(other, 0.0, used=1200)  # 700 more than was taken
    late = admission.enter("acme", rates, 0.0)
    with pytest.raises(OverLimit) as caught:
        admission.charge(late, 1, 0.0)
    assert caught.value.retry_after == pytest.approx(70.1)


def test_a_request_of_more_than_the_budget_runs_alone() -> None:
    admission, rates = Admission(100), Rates()
    small, large = admission.enter("a", rates, 0.0), admission.enter("b", rates, 0.0)
    admission.charge(small, 1, 0.0)
    with pytest.raises(Unavailable, match="100 tokens, and 99 of 100") as caught:
        admission.charge(large, 10**12, 0.0)
    assert caught.value.status == 503
    admission.leave(small, 1.0)
    admission.charge(large, 10**12, 1.0)
    admission.charge(large, 10**12, 1.0)  # it has everything already
    assert admission.held == 100
    admission.leave(large, 2.0)
    assert admission.held == 0


def test_a_completion_without_a_limit_counts_as_they_have_come_out() -> None:
    admission = Admission(10**6)
    first = admission.size(10, 2, 10**6, None)
    assert first == 10 + 2 * 256 and admission.size(10, 2, 100, None) == 210
    assert admission.size(10, 2, 10**6, 7) == 24 and admission.size(10, 0, 5, None) == 10
    sizes = []
    for _ in range(400):
        admission.completed(20)
        sizes.append(admission.size(0, 1, 10**6, None))
    assert all(b <= a for a, b in pairwise(sizes)) and sizes[-1] in (20, 21)


def test_a_full_queue_is_expected_to_empty_as_it_did_of_late() -> None:
    admission, rates = Admission(1000), Rates()
    for second in range(100):  # 100 tokens a second
        visit = admission.enter("a", rates, float(second))
        admission.charge(visit, 100, float(second))
        admission.leave(visit, second + 1.0)
    admission.charge(admission.enter("a", rates, 100.0), 1000, 100.0)
    with pytest.raises(Unavailable) as caught:
        admission.charge(admission.enter("a", rates, 100.0), 500, 100.0)
    assert caught.value.retry_after == pytest.approx(5.0, rel=0.1)
    waits = []
    for _ in range(9):  # each has a place behind the one before
        with pytest.raises(Unavailable) as caught:
            admission.charge(admission.enter("a", rates, 100.0), 200, 100.0)
        waits.append(caught.value.retry_after)
    assert waits == pytest.approx([7.0, 9.0, 11.0] + 6 * [12.0], rel=0.1)  # and at most a whole budget before it


@pytest.mark.parametrize("idle", [0.0, 3600.0])
def test_a_herd_at_a_server_that_has_just_begun_is_told_how_fast_it_is(idle: float) -> None:
    """100 requests of 10 tokens end in each second; what is asked after one second of work is no guess of the start."""
    admission, rates = Admission(1000), Rates()

    def second(start: float) -> None:
        visits = [admission.enter("a", rates, start) for _ in range(100)]
        for visit in visits:
            admission.charge(visit, 10, start)
        for i, visit in enumerate(visits):
            admission.leave(visit, start + (i + 1) / 100)

    second(0.0)
    if idle:
        second(idle)
    admission.charge(admission.enter("a", rates, idle + 1.0), 1000, idle + 1.0)
    with pytest.raises(Unavailable) as caught:
        admission.charge(admission.enter("a", rates, idle + 1.0), 1000, idle + 1.0)
    assert caught.value.retry_after == pytest.approx(1.0, rel=0.05)
    with pytest.raises(Unavailable) as caught:
        admission.charge(admission.enter("a", rates, idle + 1.0), 1000, idle + 1.0)
    assert caught.value.retry_after == pytest.approx(2.0, rel=0.05)


def test_refusals_tell_a_tenant_of_itself_alone() -> None:
    admission, rates = Admission(1000), Rates(requests_per_minute=2, concurrency=1)
    admission.enter("other", Rates(), 0.0)
    admission.enter("acme", rates, 0.0)
    with pytest.raises(OverLimit, match="at most 1 at a time are yours") as many:
        admission.enter("acme", rates, 0.0)
    with pytest.raises(OverLimit, match="at most 2 a minute are yours") as fast:
        admission.enter("acme", rates, 0.0)
    for error in (many.value, fast.value):
        assert error.status == 429 and "other" not in str(error)
    admission.enter("other", Rates(), 0.0)  # nobody else is slowed down


def test_a_line_of_a_batch_counts_by_its_tokens_alone() -> None:
    admission, rates = Admission(100), Rates(tokens_per_minute=600, requests_per_minute=1, concurrency=1)
    lines = [admission.stand_behind("a", rates, 0.0) for _ in range(3)]
    for line in lines[:2]:
        admission.charge(line, 300, 0.0)
    assert (admission.held, admission.running) == (0, 0)
    with pytest.raises(OverLimit) as refused:
        admission.charge(lines[2], 300, 0.0)
    assert (refused.value.code, refused.value.retry_after) == ("tokens_over_rate", 30.0)
    admission.leave(lines[0], 0.0, used=100)
    assert admission.allowances("a", 0.0) == {"requests": Allowance(1, 1, 0.0), "tokens": Allowance(600, 200, 40.0)}
    admission.forget(set())
    admission.charge(lines[2], 300, 10.0)  # the account was kept
    admission.charge(admission.enter("a", rates, 10.0), 0, 10.0)
    for line in lines:
        admission.leave(line, 10.0, used=300)
    assert admission.held_by() == {"a": 1}


def test_limits_can_change_while_a_tenant_is_known() -> None:
    admission = Admission(10**6)
    for _ in range(3):
        admission.enter("a", Rates(requests_per_minute=3), 0.0)
    with pytest.raises(OverLimit):
        admission.enter("a", Rates(requests_per_minute=3), 0.0)
    for _ in range(7):
        admission.enter("a", Rates(requests_per_minute=10), 0.0)
    with pytest.raises(OverLimit):
        admission.enter("a", Rates(requests_per_minute=10), 0.0)
    admission.enter("a", Rates(), 0.0)


def test_to_come_again_means_to_have_a_request_left_too() -> None:
    admission, rates = Admission(10**6), Rates(requests_per_minute=1, tokens_per_minute=600)
    first = admission.enter("a", rates, 0.0)
    admission.charge(first, 600, 0.0)
    admission.leave(first, 0.0, used=700)
    with pytest.raises(OverLimit, match="try again in 60 s") as caught:  # tokens alone would be there in 10
        admission.charge(admission.enter("a", rates, 60.0), 600, 60.0)
    assert caught.value.retry_after == pytest.approx(60.0)
    admission.charge(admission.enter("a", rates, 120.0), 600, 120.0)


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 60), st.booleans()), max_size=120))
def test_who_holds_nothing_finds_room_whatever_others_do(events: list[tuple[str, int, bool]]) -> None:
    """Requests of at most a sixteenth of the budget: with three tenants a tenth is left to a fourth."""
    admission, live = Admission(1000, shared=True), list[Visit]()
    for now, (tenant, tokens, ends) in enumerate(events):
        if ends and live:
            admission.leave(live.pop(0), now)
        visit = admission.enter(tenant, Rates(), now)
        try:
            admission.charge(visit, tokens, now)
            live.append(visit)
        except Unavailable as error:
            assert error.code == "share_used" and error.retry_after > 0
            assert any(other.tenant == tenant for other in live)
            admission.leave(visit, now)
        newcomer = admission.enter("new", Rates(), now)
        admission.charge(newcomer, 40, now)
        admission.leave(newcomer, now)


def test_a_flood_holds_three_quarters_and_one_large_request_all() -> None:
    admission = Admission(1000, shared=True)
    flood = []
    with pytest.raises(Unavailable, match="share_used"):
        while flood.append(admission.enter("acme", Rates(), 0.0)) is None:
            admission.charge(flood[-1], 10, 0.0)
    assert admission.held == 750
    with pytest.raises(Unavailable, match="queue_full"):
        admission.charge(admission.enter("birch", Rates(), 0.0), 251, 0.0)
    admission.charge(admission.enter("birch", Rates(), 0.0), 250, 0.0)
    for visit in flood:
        admission.leave(visit, 1.0)
    alone = Admission(1000)
    for _ in range(100):
        alone.charge(alone.enter("acme", Rates(), 0.0), 10, 0.0)
    assert alone.held == 1000


def test_waiting_for_a_model_counts_in_the_tenant_s_part_until_it_is_there() -> None:
    admission = Admission(1000, shared=True)
    waiting = [admission.enter("acme", Rates(), 0.0) for _ in range(76)]
    for visit in waiting[:75]:
        admission.reserve(visit, 10, 0.0)
    with pytest.raises(Unavailable, match="share_used"):
        admission.reserve(waiting[75], 10, 0.0)
    for visit in waiting[:75]:
        admission.release(visit)
    admission.charge(waiting[0], 10, 0.0)
    admission.charge(waiting[75], 700, 0.0)
    assert admission.held == 710
    line = admission.stand_behind("acme", Rates(), 0.0)
    admission.reserve(line, 999, 0.0)
    assert admission.held == 710
