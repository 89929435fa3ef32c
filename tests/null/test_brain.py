"""Properties of the brain under random arrivals, aborts, priorities, pool sizes, depths and failed steps."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from brain import Life, live, lives, replays, verify

COMMON = ("hits", "preemptions", "aborts", "copies", "overlap")
RARER = ("failures", "vectors", "reports")


@pytest.mark.timeout(3600)  # in `make test-all` it has twenty times the examples
def test_random_lives() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=10 * settings.default.max_examples)
    @given(lives())
    def run(life: Life) -> None:
        outcome = live(life)
        verify(life, outcome)
        replays(outcome)
        seen["examples"] += 1
        seen.update(event for event, count in outcome.events.items() if count)

    run()
    shares = {event: seen[event] / seen["examples"] for event in (*COMMON, *RARER)}
    print("share of examples with", {event: f"{share:.0%}" for event, share in shares.items()})
    assert all(shares[event] >= 0.2 for event in COMMON), shares
    assert all(shares[event] >= 0.05 for event in RARER), shares


@pytest.mark.timeout(3600)
def test_lives_that_another_engine_has_begun() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=3 * settings.default.max_examples)
    @given(lives(begun=True))
    def run(life: Life) -> None:
        outcome = live(life)
        verify(life, outcome)
        replays(outcome)
        seen["examples"] += 1
        seen.update(event for event, count in outcome.events.items() if count)

    run()
    assert all(seen[event] >= 0.1 * seen["examples"] for event in ("continued", *COMMON)), seen
