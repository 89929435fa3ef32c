"""Which models are in memory, and which request waits for one: several models, and room for only some of them.

A request asks for a model and gets a ticket; it may go on once the ticket is granted, and leaves when it has ended. A
ticket is granted when its model is in memory and is not about to leave. Models are brought in one at a time, in the
order of their oldest waiting ticket. What makes room is an idle model, the least recently used one first; if none is
idle, the one that came in first takes no more requests and leaves when its last one has ended; neither before it has
been there for a while (STAY_LOADS), so that loads are worth their time.

Nobody leaves for a model that has not come in since it last failed, or ever, before it was looked at: what can be known
without loading it. One that fails although others have left for it is not tried again for LAST_PAUSE.

So nobody starves: a model that has come in serves all who waited for it before it can be chosen to leave, and then
whoever asks for it stands behind those who wait for others. Of N models at most N - 1 come in before the one that a
ticket waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from penstock.base import ConfigError, PenstockError, Unavailable

LONGEST_WAIT = 600.0
"""Seconds after which a request that still waits for its model is refused."""
FIRST_PAUSE, LAST_PAUSE = 5.0, 300.0
"""Seconds before a model that could not be loaded is tried again; twice as long after each failure."""

STAY_LOADS = 4.0
"""A model that is in use keeps its room for so many times as long as its load took, although others wait: of two that
are always busy at most a fifth of the time goes into loads. One that is idle keeps it for as long as the load took."""
LONGEST_STAY = 60.0
"""Seconds that it keeps it at most; divided by the number of models that wait."""

MEMORY_CODES = ("model_too_large", "kv_memory_too_large", "kv_memory_too_small")
"""Of errors that say in numbers how much memory there is too little of."""

State = Literal["unloaded", "loading", "loaded", "unloading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """How long a model stays in memory.

    Attributes:
        keep_alive: seconds after its last request; None for ever.
        pinned: it makes no room for others.
    """

    keep_alive: float | None = None
    pinned: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """One request for a model. ``number``: by the order of asking. ``granted``: it may use it, until it leaves."""

    model: str
    asked: float
    number: int
    granted: bool = False


@dataclass(slots=True, kw_only=True)
class Resident:
    """A model as the books have it.

    Attributes:
        waiting: tickets not granted, the oldest first: a dict without values, since those in the middle may leave.
        running: tickets granted that have not left.
        came, used: when it came in, and when it was last asked for or left.
        began, took: when its load began, and how many seconds the last one needed.
        wanted, unwanted: an operator said so.
        crowded: the last try failed for lack of memory, with others in it.
        hopeless: it did not fit although all others had left, so that none leaves for it again.
        sound: it has been in memory since it last failed, or was looked at and nothing is wrong.
        checking: it is being looked at.
        dear: another had to leave for it, and it has not come in since.
        keep_alive: as of ``stay``, until ``keep`` says otherwise.
        failures: in a row; until ``again`` it is not tried.
    """

    stay: Stay
    state: State = "unloaded"
    waiting: dict[Ticket, None] = field(default_factory=dict)
    running: int = 0
    came: float = 0.0
    used: float = 0.0
    began: float = 0.0
    took: float = 0.0
    wanted: bool = False
    unwanted: bool = False
    crowded: bool = False
    hopeless: bool = False
    sound: bool = False
    checking: bool = False
    dear: bool = False
    failures: int = 0
    again: float = 0.0
    error: PenstockError | None = None
    keep_alive: float | None = None

    @property
    def first(self) -> Ticket | None:
        """That waits for longest."""
        return next(iter(self.waiting), None)


@dataclass(slots=True)
class Turn:
    """What to do now: tickets that may go on or are refused; a model to look at or to load, models to unload."""

    granted: list[Ticket] = field(default_factory=list)
    refused: list[tuple[Ticket, PenstockError]] = field(default_factory=list)
    check: str | None = None
    load: str | None = None
    unload: list[str] = field(default_factory=list)


class Residency:
    """Tell it what happens, then ask for a ``turn``, which costs by the number of models and of tickets that it ends,
    not of those that wait. Not for several threads at a time.

    Args:
        stays: by the name of the model.
        room: models that may be in memory at a time, those that come and go included.
        least_stay: seconds, in place of STAY_LOADS and LONGEST_STAY; 0: a model never keeps its room from others.

    Raises:
        ConfigError: (too_many_pinned) there is no room left for the others.
    """

    def __init__(self, stays: Mapping[str, Stay], room: int, least_stay: float | None = None) -> None:
        pinned = sum(stay.pinned for stay in stays.values())
        if pinned > room or pinned == room < len(stays):
            raise ConfigError(
                "too_many_pinned",
                "Some models could never be loaded",
                why=f"{pinned} of {len(stays)} are pinned, and max_loaded is {room}",
                fix="pin fewer, or raise --max-loaded",
            )
        self.models = {name: Resident(stay=stay, keep_alive=stay.keep_alive) for name, stay in stays.items()}
        self.room, self._least_stay = room, least_stay
        self._room_at: float | None = None  # when one that keeps its room may be chosen to leave
        self._asked = count()
        self._leaving: str | None = None  # takes no more requests, so that there will be room for another

    # -- what happens --------------------------------------------------------------------------------

    def ask(self, model: str, now: float) -> Ticket:
        """Raises what the model failed with, until it is time for another try."""
        resident = self.models[model]
        if resident.error is not None and now < resident.again:
            raise refusal(resident.error, resident.again - now)
        ticket = Ticket(model, now, next(self._asked))
        resident.used = now
        resident.waiting[ticket] = None
        return ticket

    def leave(self, ticket: Ticket, now: float) -> None:
        """A request has ended, or waits no longer."""
        resident = self.models[ticket.model]
        resident.waiting.pop(ticket, None)
        if ticket.granted:
            ticket.granted = False
            resident.running -= 1
            resident.used = now

    def keep(self, model: str, seconds: float | None) -> None:
        """One in memory stays for so long after its last request, None for ever, until it leaves or is told again."""
        if self.models[model].state == "loaded":
            self.models[model].keep_alive = seconds

    def want(self, model: str) -> None:
        """An operator wants it in memory, now even if it has failed."""
        resident = self.models[model]
        resident.hopeless = False
        resident.wanted, resident.unwanted, resident.again = resident.state != "loaded", False, 0.0

    def unwant(self, model: str) -> None:
        """An operator wants it out of memory once what runs has ended. Whoever asks later brings it back."""
        resident = self.models[model]
        resident.wanted, resident.unwanted = False, resident.state in ("loading", "loaded")

    def begin(self, model: str, now: float) -> None:
        """It is being loaded: as a turn says, or before anybody asks."""
        self.models[model].state, self.models[model].began = "loading", now

    def loaded(self, model: str, now: float) -> None:
        resident = self.models[model]
        resident.state, resident.came, resident.used = "loaded", now, now
        resident.took = now - resident.began
        resident.wanted = resident.crowded = resident.hopeless = resident.dear = False
        resident.failures, resident.error, resident.sound = 0, None, True

    def checked(self, model: str, error: PenstockError | None, now: float) -> None:
        """It was looked at, with all memory counted as free that others may leave. ``error``: what is wrong with it."""
        resident = self.models[model]
        resident.checking, resident.sound = False, error is None
        if error is not None:
            resident.error, resident.crowded = error, False
            self._put_off(resident, now)

    def failed(self, model: str, error: PenstockError, now: float) -> None:
        """It could not be loaded, or has died. For lack of memory it is tried again as soon as another has left, if one
        can. One that has died has left, too.
        """
        resident = self.models[model]
        if resident.state == "loaded":
            self._has_left()
        resident.state, resident.error, resident.keep_alive = "unloaded", error, resident.stay.keep_alive
        others = any(self.may_leave(name) or r.state == "unloading" for name, r in self.models.items())
        resident.hopeless |= error.code in MEMORY_CODES and not others
        resident.crowded = error.code in MEMORY_CODES and others and not resident.hopeless
        resident.sound &= resident.crowded and resident.dear  # others leave until it fits, as was found
        if not resident.crowded:
            self._put_off(resident, now)

    def unloaded(self, model: str) -> None:
        resident = self.models[model]
        resident.state, resident.unwanted, resident.keep_alive = "unloaded", False, resident.stay.keep_alive
        self._has_left()

    def may_leave(self, name: str) -> bool:
        """It makes room for others, once what runs has ended."""
        return self.models[name].state == "loaded" and not self.models[name].stay.pinned

    # -- what to do ----------------------------------------------------------------------------------

    def turn(self, now: float) -> Turn:
        """To be carried out; each part of it is told of with ``checked``, ``loaded``, ``failed`` or ``unloaded``."""
        turn = Turn()
        self._refuse(turn, now)
        following = self._following()
        if following is None or not self._in_the_way(following):
            self._leaving = None
        self._grant(turn)
        for name, resident in self.models.items():
            end = self._end(resident)
            unwanted = resident.unwanted and resident.state == "loaded" and not resident.running
            if unwanted or (end is not None and now >= end):
                self._unload(turn, name)
        self._make_room(turn, following, now)
        return turn

    def wake(self, now: float) -> float | None:
        """Seconds after which there is something to do although nothing happens."""
        firsts = [resident.first for resident in self.models.values()]
        times = [ticket.asked + LONGEST_WAIT for ticket in firsts if ticket is not None]
        times += [end for resident in self.models.values() if (end := self._end(resident)) is not None]
        times += [] if self._room_at is None else [self._room_at]
        return max(0.0, min(times) - now) if times else None

    def _end(self, resident: Resident) -> float | None:
        """When it has been idle for long enough; None if it runs something, or stays."""
        keep_alive = None if resident.stay.pinned else resident.keep_alive
        idle = resident.state == "loaded" and not resident.running
        return resident.used + keep_alive if idle and keep_alive is not None else None

    def _refuse(self, turn: Turn, now: float) -> None:
        for resident in self.models.values():
            failed = resident.state == "unloaded" and resident.error is not None and now < resident.again
            while (ticket := resident.first) is not None and (failed or now >= ticket.asked + LONGEST_WAIT):
                del resident.waiting[ticket]
                error = resident.error if failed else None
                waited = too_long(ticket.model, now - ticket.asked)
                turn.refused.append((ticket, refusal(error, resident.again - now) if error else waited))

    def _following(self) -> str | None:
        """The model to come in next: first those that requests wait for, then those that an operator wants."""
        unloaded = {name: resident for name, resident in self.models.items() if resident.state == "unloaded"}
        asked = [ticket for resident in unloaded.values() if (ticket := resident.first) is not None]
        if asked:
            return min(asked, key=lambda ticket: ticket.number).model
        return next((name for name, resident in unloaded.items() if resident.wanted), None)

    def _in_the_way(self, model: str) -> bool:
        """Whether another has to leave before it can come in."""
        taken = sum(resident.state != "unloaded" for resident in self.models.values())
        return taken >= self.room or self.models[model].crowded

    def _grant(self, turn: Turn) -> None:
        for name, resident in self.models.items():
            if resident.state == "loaded" and not resident.unwanted and name != self._leaving:
                turn.granted += resident.waiting
                for ticket in resident.waiting:
                    ticket.granted = True
                resident.running += len(resident.waiting)
                resident.waiting.clear()

    def _kept_until(self, resident: Resident) -> float:
        """When others may have its room."""
        if self._least_stay is None:
            waiting = sum(other.state == "unloaded" and bool(other.waiting) for other in self.models.values())
            stay = min(STAY_LOADS * resident.took, LONGEST_STAY / max(1, waiting))
        else:
            stay = self._least_stay
        idle_end = resident.used + min(resident.took, stay)
        return resident.came + stay if resident.running else min(resident.came + stay, idle_end)

    def _make_room(self, turn: Turn, following: str | None, now: float) -> None:
        """One change at a time, so that what is free when a model comes in is what it was found to be."""
        self._room_at = None
        if following is None or any(r.checking or r.state in ("loading", "unloading") for r in self.models.values()):
            return
        if not self._in_the_way(following):
            self.begin(following, now)
            turn.load = following
            return
        # What an operator wants, and what has been told to leave, is not put off.
        until = {
            name: now if self.models[following].wanted or name == self._leaving else self._kept_until(resident)
            for name, resident in self.models.items()
            if self.may_leave(name)
        }
        if until and not self.models[following].sound:
            self.models[following].checking, turn.check = True, following
            self._leaving = None  # nobody leaves before it was looked at
            return
        ready = [name for name, at in until.items() if at <= now]
        if idle := [name for name in ready if not self.models[name].running]:
            self._leaving, self.models[following].dear = None, True
            self._unload(turn, min(idle, key=lambda name: self.models[name].used))
            return
        if ready and self._leaving not in ready:
            self._leaving = min(ready, key=lambda name: self.models[name].came)
        self._room_at = min((at for at in until.values() if at > now), default=None)

    def _put_off(self, resident: Resident, now: float) -> None:
        pause = LAST_PAUSE if resident.dear else min(FIRST_PAUSE * 2.0**resident.failures, LAST_PAUSE)
        resident.again = now + pause
        resident.failures += 1
        resident.wanted = resident.unwanted = resident.dear = False

    def _has_left(self) -> None:
        for resident in self.models.values():
            resident.crowded = False

    def _unload(self, turn: Turn, name: str) -> None:
        self.models[name].state = "unloading"
        turn.unload.append(name)


def refusal(error: PenstockError, seconds: float) -> Unavailable:
    """To whoever asks for a model that could not be loaded. What may name files stays in the log."""
    if error.code in MEMORY_CODES:
        return Unavailable(error.code, error.what, why=error.why, fix=error.fix, retry_after=seconds)
    return Unavailable(
        "model_not_loaded",
        "The model could not be loaded",
        why=f"it failed with {error.code}, and is tried again in {max(1, round(seconds))} s",
        fix="ask whoever runs the server, whose log says more",
        retry_after=seconds,
    )


def too_long(model: str, seconds: float) -> Unavailable:
    return Unavailable(
        "model_not_loaded",
        f"The model {model!r} could not be loaded in time",
        why=f"the request has waited for {seconds:.0f} s; others are busy, or it takes longer to load",
        fix="try again later, or serve with a higher --max-loaded",
        retry_after=30.0,
    )
