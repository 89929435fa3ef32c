"""A measurement from its options to its report."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import platform
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penstock.bench.load import machine, traces
from penstock.bench.load.arrivals import arrival_times
from penstock.bench.load.checks import ClientLoad, warnings
from penstock.bench.load.drive import Driver, Lag, Record
from penstock.bench.load.http import HttpClient, client_of
from penstock.bench.load.lengths import parse_lengths
from penstock.bench.load.metrics import Figures, figures
from penstock.bench.load.openai import Asking, calibrate, served
from penstock.bench.load.options import Load, LoadOptions, refused
from penstock.bench.load.prompts import read_prompts
from penstock.bench.load.report import Point, Report, Search, ServerLoad, money
from penstock.bench.load.search import largest_rate
from penstock.bench.load.stats import percentile
from penstock.bench.load.workload import Session, TokenWriter, Writer, fitted, from_texts, synthetic

HIDDEN = {"api_key", "json_file", "html_file", "price_per_hour", "url", "model"}
"""Options that a report has no place for, or another one."""


@dataclass
class Target:
    """What is measured.

    Attributes:
        pid: of a server that was started here.
        vocabulary: of its model, where it is known.
        name: as a report calls it: a URL or a command.
    """

    client: HttpClient
    name: str
    pid: int | None = None
    vocabulary: int | None = None


@dataclass
class Bench:
    """Attributes:
    version: of penstock, for the report.
    say: told a line for each load.
    progress: told (done, all) of a load's requests.
    """

    options: LoadOptions
    target: Target
    version: str = ""
    say: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None
    notes: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    async def run(self) -> Report:
        """Raises EngineError: server_unreachable, bad_server. InvalidRequest, NotFound: of the workload's files."""
        search = None
        try:
            await self._meet()
            if self.options.scenario is None:
                for load in self.options.loads():
                    await self.point(load)
            else:
                search = await self._scenario(self.options.scenario)
        finally:
            await self.target.client.close()
        return self._report("serve", search)

    async def by_length(self, lengths: Sequence[str]) -> Report:
        """A point for each length of prompts, at the first load. Raises as ``run``."""
        (load, *_), asked = self.options.loads(), self.options
        try:
            for length in lengths:
                self.options = dataclasses.replace(asked, input_len=length)
                await self._meet()
                await self.point(load, name=f"{length} in, {load}")
        finally:
            await self.target.client.close()
        self.options = asked
        report = self._report("latency", None)
        return dataclasses.replace(report, workload=report.workload | {"input_len": ",".join(lengths)})

    async def _meet(self) -> None:
        machine.allow_many_connections()
        self.served = await served(self.target.client)
        self.asking = self._asking()
        self.writer = await self._writer()
        await self._warm_up()

    async def point(self, load: Load, attempt: int = 0, name: str = "") -> Point:
        """Measures one load, on prompts that no other load of this run had."""
        sessions = self.sessions(f"{self.options.seed}.{attempt}.{len(self.points)}")
        driver = Driver(
            self.target.client, self.asking, self.writer, self.options.timeout, self.options.think, load.most,
            self.progress, self.options.verify > 0,
        )  # fmt: skip
        bodies = driver.first_bodies(sessions)
        send, open_loop = self._schedule(load, sessions, bodies, driver, attempt)
        records, client, server, energy = await self._observed(send)
        found = figures(records, self.options.limits(), open_loop=open_loop)
        price = self.options.price_per_hour
        joules, why = energy
        verified = await driver.again(bodies, self.options.verify) if self.options.verify else None
        point = Point(
            load=name or str(load),
            kind=load.kind,
            value=load.value,
            figures=found,
            client=client,
            server=server,
            joules=joules,
            joules_why=why,
            money=None if price is None else money(found, price),
            verified=verified,
            warnings=(*warnings(records, found, client), *self._cache_warning(found)),
            requests=tuple(_row(record) for record in records),
        )
        self.points.append(point)
        self.say(f"{point.load}: {found.output_per_s:.0f} tokens/s")
        return point

    @property
    def longest(self) -> int | None:
        """The context of the model that is asked, if the server tells it."""
        return self.served.contexts.get(self.asking.model)

    def sessions(self, content: str) -> list[Session]:
        made, cut = sessions_of(self.options, content, self.longest)
        note = f"{cut} turns did not fit into the context of {self.longest} tokens and were cut or left out"
        if cut and note not in self.notes:
            self.notes.append(note)
        return made

    def _schedule(
        self, load: Load, sessions: Sequence[Session], bodies: Sequence[bytes], driver: Driver, attempt: int
    ) -> tuple[Callable[[], Awaitable[list[Record]]], bool]:
        """How the sessions are sent, and whether arrivals are independent of answers."""
        single = all(len(session.turns) == 1 for session in sessions)
        recorded = [session.at for session in sessions if session.at is not None]
        if load.kind == "concurrency":
            return lambda: driver.in_turn(sessions, bodies, int(load.value)), False
        if len(recorded) == len(sessions):
            pace = 1.0 if load.kind == "trace" else traces.mean_rate(list(sessions)) / load.value
            times = [at * (pace if math.isfinite(pace) else 0.0) for at in recorded]
        elif load.kind == "trace":
            raise refused("trace", self.options.trace, "it has no times: give --rate or --concurrency")
        else:
            times = arrival_times(len(sessions), load.value, self.options.burstiness, self.options.seed + attempt)
        return lambda: driver.at_times(sessions, bodies, times), single

    async def _observed(
        self, send: Callable[[], Awaitable[list[Record]]]
    ) -> tuple[list[Record], ClientLoad, ServerLoad | None, tuple[float | None, str]]:
        """What was sent, and meanwhile: this process, the server's, the machine's energy."""
        lag, pid = Lag(), self.target.pid
        sizes: list[int] = []
        watching = [asyncio.create_task(lag.watch()), asyncio.create_task(_sizes(pid, sizes))]
        energy, server_before = machine.read_energy(), machine.cpu_seconds(pid) if pid else 0.0
        started, cpu = time.perf_counter(), time.process_time()
        try:
            records = await send()
        finally:
            for task in watching:
                task.cancel()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        client = ClientLoad(cpu / seconds, percentile(lag.late, 99) if lag.late else 0.0, max(lag.late, default=0.0))
        server = None
        if pid is not None:
            busy = (machine.cpu_seconds(pid) - server_before) / seconds
            server = ServerLoad(busy, machine.peak_bytes(pid), machine.growth(sizes))
        after = machine.read_energy()
        why = after.why if self.target.client.local else "the server is on another machine"
        return records, client, server, (None if why else after.joules_since(energy), why)

    def _cache_warning(self, found: Figures) -> list[str]:
        o = self.options
        expected = o.shared_prefix or o.turns > 1 or o.trace is not None
        if expected or not found.cached_tokens or found.cached_tokens < 0.1 * found.input_tokens:
            return []
        share = 100 * found.cached_tokens / found.input_tokens
        return [f"{share:.0f} % of the prompts' tokens were in the server's cache, sent before: give another --seed"]

    # -- before the first load -----------------------------------------------------------------------------------------

    def _asking(self) -> Asking:
        names = self.served.models
        name = self.options.model if self.options.model and self.target.pid is None else names[0]
        return Asking(name, self.options.chat, self.options.extra())

    async def _writer(self) -> Writer:
        o = self.options
        vocabulary = o.vocabulary or self.target.vocabulary
        if vocabulary and not o.chat and o.turns == 1 and o.prompts is None:
            return TokenWriter(vocabulary)
        return await calibrate(self.target.client, self.asking, o.timeout)

    async def _warm_up(self) -> None:
        """A few requests of the same kind, whose prompts come in no load."""
        if not self.options.warmup:
            return
        sessions, _ = sessions_of(self.options, f"{self.options.seed} warm-up", self.longest, warm=True)
        driver = Driver(self.target.client, self.asking, self.writer, self.options.timeout)
        records = await driver.in_turn(sessions, driver.first_bodies(sessions), min(8, len(sessions)))
        if failed := [record for record in records if record.error]:
            first = f"{failed[0].error}{': ' * bool(failed[0].message)}{failed[0].message}"
            self.notes.append(f"{len(failed)} of {len(records)} requests of the warm-up failed: {first}")

    # -- scenarios -----------------------------------------------------------------------------------------------------

    async def _scenario(self, name: str) -> Search | None:
        whole = await self.point(Load("rate", math.inf))
        limits = self.options.limits()
        if name != "offline" and within(whole.figures, limits):
            self.notes.append(
                f"all {self.options.requests} at once were within the limits: a search needs more requests"
            )
            return None
        if name == "offline" or not whole.figures.requests_per_s:
            return None
        loop = asyncio.get_running_loop()

        def passes(rate: float, attempt: int) -> bool:
            made = asyncio.run_coroutine_threadsafe(self.point(Load("rate", rate), attempt), loop).result()
            return within(made.figures, limits)

        error = 100 / math.sqrt(self.options.requests)
        self.notes.append(
            f"{self.options.requests} arrivals offer their rate within {error:.0f} % (one standard deviation)"
        )
        start = whole.figures.requests_per_s * 0.7
        found = await asyncio.to_thread(largest_rate, passes, start, tolerance=self.options.tolerance)
        return Search(name, limits, found.rate, found.failed, found.confirmed, self.options.tolerance, found.probes)

    def _report(self, kind: str, search: Search | None) -> Report:
        exact = isinstance(self.writer, TokenWriter)
        return Report(
            bench=kind,
            date=today(),
            penstock=self.version,
            machine=this_machine(),
            server=self.target.name,
            model=self.asking.model,
            workload=told(self.options),
            prompts="of a file" if self.options.prompts else "random token ids" if exact else "plain words",
            points=tuple(self.points),
            search=search,
            notes=tuple(self.notes),
        )


def sessions_of(
    options: LoadOptions, content: str, longest: int | None, *, warm: bool = False
) -> tuple[list[Session], int]:
    """What the options ask for, and how many turns were cut to fit into a context of ``longest`` tokens.

    Args:
        content: as for ``synthetic``.
        warm: those of the warm-up; of a file of prompts, the lines after those that are measured.
    """
    o = options
    outputs = parse_lengths("--output-len", o.output_len)
    if o.trace is not None:
        made = traces.read_trace(o.trace, o.requests, scale=o.length_scale, seed=o.seed, content=content)
    elif o.prompts is not None:
        texts = read_prompts(o.prompts, o.requests + o.warmup)
        made = from_texts(texts[o.requests :] if warm else texts[: o.requests], outputs, o.seed)
    else:
        made = synthetic(
            o.requests, parse_lengths("--input-len", o.input_len), outputs, o.seed, content=content,
            turns=o.turns, shared=o.shared_prefix, groups=o.prefix_groups,
        )  # fmt: skip
    return fitted(made[: o.warmup] if warm else made, longest)


async def _sizes(pid: int | None, sizes: list[int]) -> None:
    """Notes a server's memory once a second until it is cancelled."""
    while pid is not None:
        sizes.append(machine.resident_bytes(pid))
        await asyncio.sleep(1.0)


def within(found: Figures, limits: dict[str, float]) -> bool:
    """No request failed, at most 1 % of them took longer to their first token or their end than the limit or were
    slower, and at most 1 % of all gaps were longer."""
    spreads = {"ttft": found.ttft, "itl": found.itl, "tpot": found.tpot, "e2e": found.e2e}
    return not found.errors and all(
        (each := spreads[name]) is None or each.p99 <= most for name, most in limits.items()
    )


def _row(record: Record) -> tuple[object, ...]:
    first = record.times[0] if record.times else None
    return (record.due, record.sent, first, record.done, record.prompt_tokens, record.tokens, record.error)


def target_of(options: LoadOptions) -> Target:
    """Of --url."""
    assert options.url is not None
    return Target(client_of(options.url, options.api_key or ""), options.url.rpartition("@")[2])


def told(options: LoadOptions) -> dict[str, Any]:
    """What a report says of them."""
    kept = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in HIDDEN}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def this_machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"


def today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
