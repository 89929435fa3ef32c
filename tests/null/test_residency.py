"""Residency under virtual time: room is kept, nobody waits for ever, nobody is overtaken more often than promised."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import ConfigError, EngineError, PenstockError, Unavailable
from penstock.fleet import Residency, Stay, Ticket
from penstock.fleet.residency import FIRST_PAUSE, LAST_PAUSE, LONGEST_STAY, LONGEST_WAIT, STAY_LOADS

TOO_LARGE = ConfigError("model_too_large", "The model does not fit", why="needs 9.1 GB, 8.0 GB free")
DEAD = EngineError("engine_dead", "The engine stopped")
BROKEN = ConfigError("weights_missing", "The file /secret is damaged", why="it is")


class World:
    """Carries out turns: loads and unloads take a while, and requests run for as long as they like."""

    def __init__(
        self,
        stays: dict[str, Stay],
        room: int,
        *,
        sizes: dict[str, int],
        memory: int,
        seed: int,
        least_stay: float | None = 0.0,
        bad: frozenset[str] = frozenset(),
        worse: frozenset[str] = frozenset(),
    ) -> None:
        self.policy, self.dice, self.now = Residency(stays, room, least_stay), Random(seed), 0.0
        self.sizes, self.memory = sizes, memory
        self.bad, self.worse = bad, worse  # what looking at them shows, and what only their load does
        self.checks: list[tuple[str, float]] = []
        self.made_room: list[tuple[str, float]] = []  # for whom one had to leave
        self.running: list[Ticket] = []
        self.ended: dict[Ticket, PenstockError | None] = {}
        self.loads: list[tuple[str, float]] = []
        self.stays: list[tuple[float, float, int]] = []  # of models that left, how long their load took, who waited
        self.under_way: list[tuple[float, str, str]] = []  # when it is done, of which model, and what
        self.order: list[Ticket] = []

    @property
    def waiting(self) -> list[Ticket]:
        return [ticket for resident in self.policy.models.values() for ticket in resident.waiting]

    def act(self) -> None:
        turn = self.policy.turn(self.now)
        states = {name: resident.state for name, resident in self.policy.models.items()}
        for ticket in turn.granted:
            assert ticket.granted and states[ticket.model] == "loaded" and ticket not in self.ended
            self.running.append(ticket)
            self.order.append(ticket)
            self.ended[ticket] = None
        for ticket, error in turn.refused:
            assert not ticket.granted and ticket not in self.ended and isinstance(error, Unavailable)
            self.ended[ticket] = error
        running = Counter(ticket.model for ticket in self.running)
        for name in turn.unload:
            assert states[name] == "unloading" and not running[name]
            resident, others = self.policy.models[name], {ticket.model for ticket in self.waiting} - {name}
            self.stays.append((self.now - resident.came, resident.took, max(1, len(others))))
            self.under_way.append((self.now + self.dice.random(), name, "unload"))
            self.made_room.append((str(self.policy._following()), self.now))
        if turn.check is not None:
            assert turn.load is None and states[turn.check] == "unloaded" and not self.policy.models[turn.check].sound
            self.checks.append((turn.check, self.now))
            self.under_way.append((self.now + self.dice.random() * 3, turn.check, "check"))
        if turn.load is not None:
            assert not any(state == "unloading" for state in states.values())
            assert not any(what == "check" for *_, what in self.under_way)
            self.loads.append((turn.load, self.now))
            self.under_way.append((self.now + self.dice.random() * 10, turn.load, "load"))
        assert sum(state != "unloaded" for state in states.values()) <= self.policy.room
        assert sum(state == "loading" for state in states.values()) <= 1
        assert running == Counter({n: r.running for n, r in self.policy.models.items() if r.running})

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            wake = self.policy.wake(self.now)
            times = [at for at, *_ in self.under_way] + ([] if wake is None else [self.now + wake])
            if not times or min(times) > end:
                self.now = end
                self.act()
                return
            self.now = max(self.now, min(times))
            for item in [item for item in self.under_way if item[0] <= self.now]:
                self.under_way.remove(item)
                self.done(*item[1:])
            self.act()
            assert self.policy.wake(self.now) != 0.0, "it has just been woken"

    def done(self, name: str, what: str) -> None:
        if what == "unload":
            self.policy.unloaded(name)
        elif what == "check":
            stay = sum(self.sizes[n] for n, r in self.policy.models.items() if r.state != "unloaded" and r.stay.pinned)
            fits = self.sizes[name] + stay <= self.memory
            self.policy.checked(name, BROKEN if name in self.bad else None if fits else TOO_LARGE, self.now)
        elif name in self.bad | self.worse:
            self.policy.failed(name, BROKEN, self.now)
        elif sum(self.sizes[n] for n, r in self.policy.models.items() if r.state != "unloaded") > self.memory:
            self.policy.failed(name, TOO_LARGE, self.now)
        else:
            self.policy.loaded(name, self.now)

    def ask(self, name: str) -> Ticket | None:
        try:
            ticket = self.policy.ask(name, self.now)
        except Unavailable as error:
            assert error.retry_after > 0
            return None
        self.act()
        return ticket

    def end(self, index: int) -> None:
        if self.running:
            self.policy.leave(self.running.pop(index % len(self.running)), self.now)
            self.act()


NAMES = "abcde"
STAYS = st.builds(
    Stay,
    keep_alive=st.none() | st.sampled_from([0.0, 1.0, 30.0]),
    pinned=st.sampled_from([False, False, False, True]),
)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "end", "pass", "give up", "want", "unwant", "die"]), st.integers(0, 99)),
    max_size=80,
)


@settings(max_examples=3 * settings.default.max_examples)
@given(
    stays=st.lists(STAYS, min_size=1, max_size=5), room=st.integers(1, 5), memory=st.integers(2, 12),
    sizes=st.lists(st.integers(1, 6), min_size=5, max_size=5), events=EVENTS, seed=st.integers(0, 99),
    least_stay=st.sampled_from([None, 0.0, 7.0]),
    bad=st.frozensets(st.sampled_from(NAMES), max_size=2), worse=st.frozensets(st.sampled_from(NAMES), max_size=2),
)  # fmt: skip
def test_everybody_is_served_or_told(
    stays: list[Stay],
    room: int,
    memory: int,
    sizes: list[int],
    events: list[tuple[str, int]],
    seed: int,
    least_stay: float | None,
    bad: frozenset[str],
    worse: frozenset[str],
) -> None:
    """Whatever operators do and whatever does not fit. ``act`` checks that room is kept; here: every ticket ends."""
    named, pinned = dict(zip(NAMES, stays, strict=False)), sum(stay.pinned for stay in stays)
    if pinned > room or pinned == room < len(stays):
        with pytest.raises(ConfigError, match="too_many_pinned"):
            Residency(named, room)
        return
    own = dict(zip(NAMES, sizes, strict=True))
    world = World(named, room, sizes=own, memory=memory, seed=seed, least_stay=least_stay, bad=bad, worse=worse)
    tickets = []
    for kind, number in events:
        name = NAMES[number % len(stays)]
        if kind == "ask" and (ticket := world.ask(name)) is not None:
            tickets.append(ticket)
        elif kind == "end":
            world.end(number)
        elif kind == "pass":
            world.pass_time(number / 5)
        elif kind == "give up" and (waiting := world.waiting):
            gone = waiting[number % len(waiting)]
            world.policy.leave(gone, world.now)
            world.ended[gone] = None
            world.act()
        elif kind in ("want", "unwant"):
            getattr(world.policy, kind)(name)
            world.act()
        elif kind == "die" and world.policy.models[name].state == "loaded":
            world.policy.failed(name, DEAD, world.now)
            for ticket in [ticket for ticket in world.running if ticket.model == name]:
                world.end(world.running.index(ticket))
            world.act()
    for _ in range(len(tickets) + 1):
        while world.running:
            world.end(0)
        world.pass_time(LONGEST_WAIT / 2)
    assert not world.waiting and set(tickets) == set(world.ended)
    assert not any(resident.running for resident in world.policy.models.values())


@settings(max_examples=3 * settings.default.max_examples)
@given(
    bad=st.frozensets(st.sampled_from("bcde")), worse=st.frozensets(st.sampled_from("bcde")),
    large=st.frozensets(st.sampled_from("bcde")), room=st.integers(1, 3), seed=st.integers(0, 99),
    asks=st.lists(st.integers(0, 99), max_size=60),
)  # fmt: skip
def test_what_cannot_be_loaded_costs_the_others_little(
    bad: frozenset[str], worse: frozenset[str], large: frozenset[str], room: int, asks: list[int], seed: int
) -> None:
    """Nobody leaves for what is seen to be wrong; for what fails all the same, one in LAST_PAUSE."""
    sizes = {name: 9 if name in large else 1 for name in NAMES}
    world = World(dict.fromkeys(NAMES, Stay()), room, sizes=sizes, memory=6, seed=seed, bad=bad, worse=worse)
    for number in asks:
        ticket = world.ask(NAMES[number % 5])
        world.pass_time(number / 3)
        assert ticket is None or ticket.model in bad | worse | large or world.ended.get(ticket) is None
        while world.running:
            world.end(0)
    costs = [(name, at) for name, at in world.made_room if name in bad | worse | large]
    assert not [name for name, _ in costs if name in bad | large]
    for name in worse:
        times = [at for other, at in costs if other == name]
        assert all(later - earlier >= LAST_PAUSE for earlier, later in pairwise(times)), (name, times)


@settings(max_examples=3 * settings.default.max_examples)
@given(
    models=st.integers(2, 5),
    room=st.integers(1, 3),
    asks=st.lists(st.integers(0, 99), max_size=60),
    seed=st.integers(0, 99),
)
def test_nobody_is_overtaken_more_often_than_promised(models: int, room: int, asks: list[int], seed: int) -> None:
    """Whoever asks without a pause keeps no other model out: at most N - 1 others come in first."""
    world = World(dict.fromkeys(NAMES[:models], Stay()), room, sizes=dict.fromkeys(NAMES, 1), memory=99, seed=seed)
    tickets = []
    for number in asks:
        if (ticket := world.ask(NAMES[number % models])) is not None:
            tickets.append(ticket)
        if number % 3 == 0:
            world.pass_time(number / 20)
        if number % 2 and len(world.running) > 3:  # there is always something running
            world.end(number)
    while world.running or world.waiting:
        world.end(0)
        world.pass_time(0.5)
    for ticket in tickets:
        since = [name for name, at in world.loads if at >= ticket.asked]
        before = since[: since.index(ticket.model)] if ticket.model in since else []
        assert world.ended[ticket] is None and len(before) <= models - 1, (ticket, since)
    for name in NAMES:
        asked = [ticket for ticket in tickets if ticket.model == name]
        assert [ticket for ticket in world.order if ticket.model == name] == asked


def test_two_models_in_turn() -> None:
    world = World({"a": Stay(), "b": Stay()}, 1, sizes={"a": 1, "b": 1}, memory=9, seed=0)
    first = world.ask("a")
    world.pass_time(20)
    waits = world.ask("b")
    world.pass_time(4)  # it is looked at
    late = world.ask("a")
    assert first is not None and waits is not None and late is not None
    assert (first.granted, waits.granted, late.granted) == (True, False, False), "a takes no more: b waits for its room"
    world.end(0)
    world.pass_time(20)
    assert waits.granted and not late.granted
    world.end(0)
    world.pass_time(20)
    assert late.granted and [name for name, _ in world.loads] == ["a", "b", "a"]


def test_a_request_may_say_how_long_its_model_stays() -> None:
    world = World({"a": Stay(keep_alive=30.0), "p": Stay(pinned=True)}, 2, sizes={"a": 1, "p": 1}, memory=9, seed=0)

    def asked(stays: float | None, **after: str) -> None:
        ticket = world.ask("a")
        world.pass_time(10)
        assert ticket is not None and ticket.granted
        world.policy.keep("a", stays)
        world.pass_time(100)
        assert world.policy.models["a"].state == "loaded", "it is in use"
        world.end(0)
        for seconds, state in after.items():
            world.pass_time(float(seconds.removeprefix("s")))
            assert world.policy.models["a"].state == state, (stays, seconds)

    asked(None, s1e6="loaded")
    asked(0.0, s2="unloaded")
    assert world.policy.models["a"].keep_alive == 30.0, "what was said goes with it"
    asked(60.0, s59="loaded", s3="unloaded")
    world.policy.keep("a", 0.0)
    assert world.policy.models["a"].keep_alive == 30.0
    ticket = world.ask("p")
    world.pass_time(10)
    world.policy.keep("p", 0.0)
    assert ticket is not None and world.running
    world.end(0)
    world.pass_time(1e6)
    assert world.policy.models["p"].state == "loaded", "whoever runs the server pinned it"


@settings(max_examples=settings.default.max_examples // 2)
@given(
    models=st.integers(2, 5), least_stay=st.sampled_from([None, 8.0]), seed=st.integers(0, 99),
    length=st.floats(0.1, 3.0),
)  # fmt: skip
def test_busy_models_switch_seldom_and_nobody_starves(
    models: int, least_stay: float | None, seed: int, length: float
) -> None:
    """Room for one, and for each model two clients that ask again as soon as they are answered."""
    names, ends, waits = NAMES[:models], dict[Ticket, float](), list[float]()
    own = dict.fromkeys(names, 1)
    world = World(dict.fromkeys(names, Stay()), 1, sizes=own, memory=9, seed=seed, least_stay=least_stay)
    for name in names * 2:
        assert world.ask(name) is not None
    while world.now < 600:
        for ticket in world.running:
            if ticket not in ends:
                ends[ticket] = world.now + length
                waits.append(world.now - ticket.asked)
        due = [ticket for ticket in world.running if ends[ticket] <= world.now]
        for ticket in due:
            assert world.ask(ticket.model) is not None  # before it ends: the model is never idle
            world.end(world.running.index(ticket))
        world.pass_time(0.25)
    waits += [world.now - ticket.asked for ticket in world.waiting]
    assert len(world.loads) > models, "each comes in again and again"
    for stay, took, others in world.stays:
        least = min(STAY_LOADS * took, LONGEST_STAY / others) if least_stay is None else least_stay
        assert least <= stay <= least + 2 * length + 1, "and not much longer than that"
    longest = LONGEST_STAY if least_stay is None else least_stay
    assert max(waits) <= models * (longest + 2 * length + 12), "a stay, a drain, a load and an unload of each other"


def test_one_that_is_idle_keeps_its_room_for_as_long_as_its_load_took() -> None:
    policy = Residency({"a": Stay(), "b": Stay()}, 1)
    first = policy.ask("a", 0.0)
    assert policy.turn(0.0).load == "a"
    policy.loaded("a", 3.0)
    assert policy.turn(3.0).granted == [first]
    policy.leave(first, 4.0)
    waits = policy.ask("b", 4.5)
    assert policy.turn(4.5).check == "b" and policy.turn(4.5).check is None
    policy.checked("b", None, 4.5)
    assert not policy.turn(4.5).unload and policy.wake(4.5) == 2.5
    again = policy.ask("a", 6.0)
    assert policy.turn(6.0).granted == [again], "it takes requests meanwhile"
    policy.leave(again, 6.5)
    assert not policy.turn(9.4).unload
    assert policy.turn(9.5).unload == ["a"] and not waits.granted
    policy.unloaded("a")
    assert policy.turn(10.0).load == "b"
    policy.loaded("b", 11.0)
    policy.want("a")  # an operator need not wait
    (ticket,) = policy.turn(11.0).granted
    policy.leave(ticket, 11.1)
    assert policy.turn(11.1).unload == ["b"]


def test_the_least_recently_used_makes_room() -> None:
    world = World(
        dict.fromkeys("abc", Stay()) | {"p": Stay(pinned=True)}, 3, sizes=dict.fromkeys("abcp", 1), memory=9, seed=0
    )
    for name in "pabac":
        world.ask(name)
        world.pass_time(20)
        world.end(0)
    assert {n for n, r in world.policy.models.items() if r.state == "loaded"} == {"p", "a", "c"}


def test_an_idle_model_leaves_in_time() -> None:
    world = World({"a": Stay(keep_alive=60.0), "b": Stay()}, 2, sizes={"a": 1, "b": 1}, memory=9, seed=0)
    for name in "ab":
        world.ask(name)
        world.pass_time(20)
    world.pass_time(100)
    world.end(0)  # a's
    world.pass_time(59)
    assert world.policy.models["a"].state == "loaded"
    world.pass_time(3)
    assert [world.policy.models[name].state for name in "ab"] == ["unloaded", "loaded"]


def test_what_does_not_fit_beside_another_waits_for_it() -> None:
    """And what does not fit at all is refused with the numbers; later with what is left of the pause."""
    world = World(dict.fromkeys("abc", Stay()), 3, sizes={"a": 4, "b": 4, "c": 9}, memory=6, seed=0)
    world.ask("a")
    world.pass_time(20)
    waits = world.ask("b")
    world.pass_time(20)
    assert waits is not None and not waits.granted and not world.ended.get(waits)
    world.end(0)
    world.pass_time(40)
    assert waits.granted and world.policy.models["a"].state == "unloaded"
    world.end(0)
    refused = world.ask("c")
    world.pass_time(25)
    assert refused is not None
    error = world.ended[refused]
    assert error is not None and (error.code, error.why) == ("model_too_large", TOO_LARGE.why)
    with pytest.raises(Unavailable, match=r"9\.1 GB"):
        world.policy.ask("c", world.policy.models["c"].again - 1)
    world.pass_time(300)
    world.ask("a")
    world.pass_time(20)
    world.end(0)
    for _ in range(3):  # nobody has to leave a second time for what cannot fit
        world.ask("c")
        world.pass_time(200)
        assert world.policy.models["a"].state == "loaded"


def test_failures_are_tried_again_less_and_less_often() -> None:
    policy, now = Residency({"a": Stay(), "b": Stay()}, 1), 100.0
    pauses = []
    for _ in range(9):
        ticket = policy.ask("a", now)
        assert policy.turn(now).load == "a"
        policy.failed("a", BROKEN, now)
        ((refused, error),) = policy.turn(now).refused
        assert refused is ticket and error.code == "model_not_loaded" and "secret" not in str(error)
        with pytest.raises(Unavailable) as again:
            policy.ask("a", now + 1)
        assert again.value.retry_after == pytest.approx(policy.models["a"].again - now - 1)
        assert policy.ask("b", now) and policy.turn(now).load == "b"  # the other is none the worse
        policy.loaded("b", now)
        policy.leave(policy.turn(now).granted[0], now)
        assert policy.turn(now).load is None
        pauses.append(policy.models["a"].again - now)
        now = policy.models["a"].again
        policy.unwant("b")
        assert policy.turn(now).unload == ["b"]
        policy.unloaded("b")
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE] and pauses[-1] == LAST_PAUSE
    policy.want("a")  # an operator need not wait
    policy.loaded("a", now) if policy.turn(now).load == "a" else pytest.fail("it is not tried")
    assert policy.ask("a", now).model == "a"


def test_a_turn_costs_no_more_when_many_wait() -> None:
    """Of 3,000 requests that arrive, and of one of them that goes away, in executed lines: no list is walked."""

    def lines(waiting: int) -> int:
        policy, executed = Residency({"a": Stay(), "b": Stay()}, 1), 0
        policy.ask("a", 0.0)
        policy.turn(0.0)
        policy.loaded("a", 0.0)
        policy.turn(0.0)
        tickets = [policy.ask("b", 1.0) for _ in range(waiting)]

        def count(*_: object) -> object:
            nonlocal executed
            executed += 1
            return count

        sys.settrace(count)  # type: ignore[arg-type]
        try:
            policy.leave(tickets[waiting // 2], 1.0)
            policy.turn(1.0)
            policy.wake(1.0)
        finally:
            sys.settrace(None)
        return executed

    assert lines(3000) == lines(3)


def test_a_model_that_has_died_is_loaded_again() -> None:
    policy = Residency({"a": Stay()}, 1)
    policy.ask("a", 0.0)
    policy.turn(0.0)
    policy.loaded("a", 1.0)
    (running,) = policy.turn(1.0).granted
    policy.failed("a", DEAD, 2.0)
    policy.leave(running, 2.0)
    assert policy.turn(2.0).load is None
    policy.ask("a", 2.0 + FIRST_PAUSE)
    assert policy.turn(2.0 + FIRST_PAUSE).load == "a"


@pytest.mark.parametrize("leaves", ["by its death", "for it was idle"])
def test_room_is_also_what_others_leave_behind(leaves: str) -> None:
    """b did not fit beside a, which then leaves for a reason of its own: b is tried again, and holds up nobody."""
    policy = Residency({"a": Stay(keep_alive=10.0), "b": Stay(), "c": Stay()}, 3)
    policy.ask("a", 0.0)
    assert policy.turn(0.0).load == "a"
    policy.loaded("a", 0.0)
    (running,) = policy.turn(0.0).granted
    if leaves == "by its death":
        waits = policy.ask("b", 1.0)
        assert policy.turn(1.0).load == "b"
        policy.failed("b", TOO_LARGE, 2.0)
        policy.failed("a", DEAD, 3.0)
        policy.leave(running, 3.0)
    else:
        policy.leave(running, 1.0)
        waits = policy.ask("b", 9.0)
        assert policy.turn(9.0).load == "b"
        assert policy.turn(11.0).unload == ["a"], "while b is being loaded"
        policy.failed("b", TOO_LARGE, 12.0)
        assert not policy.turn(12.0).refused, "a is still there, but not for long"
        policy.unloaded("a")
    assert policy.turn(12.0).load == "b"
    policy.loaded("b", 13.0)
    assert policy.turn(13.0).granted == [waits]
