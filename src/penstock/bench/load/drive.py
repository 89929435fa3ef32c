"""Sends sessions at their times and records what comes back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from penstock.bench.load.http import HttpClient
from penstock.bench.load.openai import Answer, Asking, Prompt, ask
from penstock.bench.load.workload import Session, Turn, Writer


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds since the run began.

    Attributes:
        due: when it should have been sent: its arrival, or where nobody else decides the end of what it waited for.
            Latencies count from here, however late the client was.
        asked_in: tokens its prompt should have; None if nobody knows.
        asked_out: tokens it asked for.
        times: arrivals of its events with text.
    """

    session: int
    turn: int
    due: float
    sent: float
    done: float
    times: tuple[float, ...]
    asked_in: int | None
    asked_out: int
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    finish: str
    error: str
    message: str = ""

    @property
    def tokens(self) -> int:
        """Generated: as the server's usage says; without it, events with text."""
        return len(self.times) if self.output_tokens is None else self.output_tokens


@dataclass
class Driver:
    """Attributes:
    think: seconds between an answer and the next turn of its session.
    most: requests in flight at a time; more wait in the client, and the wait counts.
    say: told (done, all) now and then.
    keep: the texts of first turns, by session.
    """

    client: HttpClient
    asking: Asking
    writer: Writer
    timeout: float = 600.0
    think: float = 0.0
    most: int | None = None
    say: Callable[[int, int], None] = lambda done, total: None
    keep: bool = False
    texts: dict[int, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    _started: float = 0.0
    _total: int = 0

    def first_bodies(self, sessions: Sequence[Session]) -> list[bytes]:
        """Of the first request of each session, made before anything is measured."""
        return [self._body(session.turns[0], []) for session in sessions]

    async def at_times(
        self, sessions: Sequence[Session], bodies: Sequence[bytes], times: Sequence[float]
    ) -> list[Record]:
        """An open loop: each session begins at its time, whatever became of the others."""
        gate = asyncio.Semaphore(self.most or len(sessions) or 1)
        self._begin(sessions)
        self._started = time.perf_counter() + 0.05  # all tasks exist by then
        async with asyncio.TaskGroup() as tasks:
            for i, (session, at) in enumerate(zip(sessions, times, strict=True)):
                tasks.create_task(self._session(i, session, at, bodies[i], gate))
        return self._ended()

    async def in_turn(self, sessions: Sequence[Session], bodies: Sequence[bytes], workers: int) -> list[Record]:
        """A closed loop: so many workers, each of which begins the next session when its last one has ended."""
        self._begin(sessions)
        waiting = iter(enumerate(sessions))
        self._started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(workers, len(sessions))):
                tasks.create_task(self._worker(waiting, bodies))
        return self._ended()

    async def again(self, bodies: Sequence[bytes], most: int) -> tuple[int, int]:
        """Asks once more for so many of the answers, spread over all, one at a time.

        Returns:
            How many, and how many of them came out otherwise.
        """
        kept = sorted(self.texts)
        chosen = kept if len(kept) <= most else [kept[i * len(kept) // most] for i in range(most)]
        differ = 0
        for number in chosen:
            answer = await ask(self.client, self.asking.path, bodies[number], self.timeout)
            differ += bool(answer.error) or answer.text != self.texts[number]
        return len(chosen), differ

    async def _worker(self, waiting: Iterator[tuple[int, Session]], bodies: Sequence[bytes]) -> None:
        for i, session in waiting:
            await self._session(i, session, self._now(), bodies[i], None)

    async def _session(
        self, number: int, session: Session, due: float, body: bytes, gate: asyncio.Semaphore | None
    ) -> None:
        history: list[tuple[str, str]] = []
        before = 0
        for i, turn in enumerate(session.turns):
            if i:
                body = self._body(turn, history)
            if (early := due - self._now()) > 0:
                await asyncio.sleep(early)
            async with gate or asyncio.Semaphore():
                answer = await ask(self.client, self.asking.path, body, self.timeout)
            record = self._record(number, i, turn, due, before, answer)
            self.records.append(record)
            if self.keep and i == 0 and not record.error:
                self.texts[number] = answer.text
            self.say(len(self.records), self._total)
            if record.error:
                self._total -= len(session.turns) - i - 1  # what would have followed is not asked
                return
            if i + 1 < len(session.turns):
                history.append((self._said(turn), answer.text))
                before += (turn.asked or 0) + record.tokens
            due = self._now() + self.think

    def _record(self, session: int, i: int, turn: Turn, due: float, before: int, answer: Answer) -> Record:
        start = self._started
        return Record(
            session=session,
            turn=i,
            due=due,
            sent=answer.sent - start,
            done=answer.done - start,
            times=tuple(at - start for at in answer.times),
            asked_in=None if turn.asked is None else turn.asked + before,
            asked_out=turn.output,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            finish=answer.finish,
            error=answer.error,
            message=answer.message,
        )

    def _body(self, turn: Turn, history: list[tuple[str, str]]) -> bytes:
        content: str | list[int] = turn.text or self.writer(turn.pieces)
        prompt: Prompt = content
        if isinstance(content, str) and self.asking.chat:
            said = [
                {"role": role, "content": text}
                for pair in history
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            prompt = [*said, {"role": "user", "content": content}]
        elif isinstance(content, str):
            prompt = "".join(f"{asked}{answered}\n" for asked, answered in history) + content
        return self.asking.body(prompt, turn.output)

    def _said(self, turn: Turn) -> str:
        content = turn.text or self.writer(turn.pieces)
        return content if isinstance(content, str) else ""

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _begin(self, sessions: Sequence[Session]) -> None:
        self.records, self._total = [], sum(len(session.turns) for session in sessions)

    def _ended(self) -> list[Record]:
        return sorted(self.records, key=lambda record: (record.session, record.turn))


@dataclass
class Lag:
    """How late this process's event loop ran what was due: the client's own delay in what it measures.

    Attributes:
        late: seconds, one for each look.
    """

    every: float = 0.01
    late: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            due = time.perf_counter() + self.every
            await asyncio.sleep(self.every)
            self.late.append(max(0.0, time.perf_counter() - due))

    @property
    def longest(self) -> float:
        return max(self.late, default=math.nan)
