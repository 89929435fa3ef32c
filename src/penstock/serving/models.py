"""The models of a server. Each that is in memory has an engine process of its own; ``fleet.Residency`` says which are.

A server of one model is one whose only model comes in first, and stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from penstock.assemble import Assembled, front_of
from penstock.base import ConfigError, EngineError, PenstockError
from penstock.core.service import Counters, Status
from penstock.fleet import Residency, Stay, Ticket
from penstock.llm import AsyncLLM
from penstock.serving.errors import HTTPError
from penstock.serving.limits import REQUESTS_AT_ONCE
from penstock.serving.turns import Turnstile
from penstock.spec import EngineConfig, ModelSpec
from penstock.spec.encoder import encoder_parameters
from penstock.spec.sizing import active_parameters
from penstock.wire import RemoteService, TextWorkers, python

LOAD_SECONDS = 300.0
"""After which an engine that loads its model, and tells of no progress, counts as hung."""
STEP_SECONDS = 120.0
SLOWEST = 10e9
"""FLOP/s that any machine has on which somebody serves a model: what a step may take follows from it."""
UNKNOWN = -(1 << 62)
"""Bytes that others give back where that cannot be told: lack of memory is no reason then before they have."""

T = TypeVar("T")

_log = logging.getLogger(__name__)
_NOTHING = Status(running=0, waiting=0, blocks_total=0, blocks_used=0, counters=Counters())


@dataclass(slots=True, eq=False, kw_only=True)
class Served:
    """A model that may be asked for.

    Attributes:
        name, aliases: what clients call it.
        config: what it is loaded with.
        service: its engine, from the start of the process on.
        llm: set while it is in memory.
        gone: what engines of it did that have been unloaded.
    """

    name: str
    config: EngineConfig
    aliases: tuple[str, ...] = ()
    stay: Stay = field(default_factory=Stay)
    created: int = field(default_factory=lambda: int(time.time()))
    service: RemoteService | None = None
    llm: AsyncLLM | None = None
    gone: Counters = field(default_factory=Counters)

    @property
    def alive(self) -> bool:
        return self.llm is not None and self.llm.engine.service.alive

    def status(self) -> Status:
        now = _NOTHING if self.llm is None else self.llm.engine.service.status()
        return replace(now, counters=self.gone + now.counters)

    def bring(self, taken: Callable[[], int], tokenizers: int = 0, timeout: float = LOAD_SECONDS) -> AsyncLLM:
        """Loads it, which takes long. Raises as ``RemoteService.ready``.

        Args:
            taken: as of ``RemoteService``.
            tokenizers: most processes for its long texts, started when there is one.
            timeout: as ``load_timeout`` of ``RemoteService``.
        """
        service = self.service = self.service or RemoteService(python("penstock.host"), self.config, taken)
        service.taken, service.load_timeout = taken, timeout
        try:
            front = front_of(service, self.config)
            texts = TextWorkers(python("penstock.texthost"), front.config, tokenizers) if tokenizers else None
            return AsyncLLM(front, texts=texts)
        except BaseException:
            self.service = None
            service.close()
            raise

    def check(self, taken: int, timeout: float) -> None:
        """Looks at what can be known of it without loading it, in a process that ends then. Raises as ``bring``."""
        service = self.service = RemoteService(python("penstock.host"), self.config, lambda: taken, check=True)
        service.load_timeout = timeout
        try:
            service.ready()
        finally:
            self.service = None
            service.close()

    def part(self) -> Callable[[], None]:
        """Nobody can use it from here on. Returns what ends its process, which takes long."""
        llm, service, self.llm, self.service = self.llm, self.service, None, None
        if llm is None:
            return (lambda: None) if service is None else service.close
        self.gone += llm.engine.service.status().counters
        return llm.close


def step_seconds(engine: Assembled) -> float:
    """After which an engine counts as hung: STEP_SECONDS, and what a full step takes at the SLOWEST rate."""
    spec, tokens = engine.spec, engine.config.max_num_batched_tokens
    used = active_parameters(spec) if isinstance(spec, ModelSpec) else encoder_parameters(spec)
    return STEP_SECONDS + 2.0 * used * tokens / SLOWEST


class Models:
    """Brings models in and out as requests ask for them, in the event loop.

    Args:
        room: most models in memory at a time; None for all of them.
        step_timeout: seconds; as of ``RemoteService``. None: by the size of model and step.
        tokenizers: processes for the long texts of each model in memory, at most.
        least_stay: as of ``Residency``.
        load_timeout: seconds; as of ``RemoteService``.

    Attributes:
        changed: called when a model has come in.
        turnstile: bounds what requests that arrive together, or go on together, take of a turn of the loop.

    Raises:
        ConfigError: (model_named_twice), (too_many_pinned).
    """

    def __init__(
        self,
        served: Sequence[Served],
        room: int | None = None,
        step_timeout: float | None = None,
        tokenizers: int = 0,
        least_stay: float | None = None,
        load_timeout: float = LOAD_SECONDS,
    ) -> None:
        self.all = {model.name: model for model in served}
        self.changed: Callable[[], None] = lambda: None
        self._names: dict[str, Served] = {}
        for model in served:
            for name in {model.name, *model.aliases}:
                if name in self._names:
                    fix = "give one of them another name, with a table [models.NAME] in the configuration"
                    raise ConfigError("model_named_twice", f"Two models are called {name!r}", fix=fix)
                self._names[name] = model
        self.policy = Residency({model.name: model.stay for model in served}, room or len(served), least_stay)
        self._step_timeout, self._bringing = step_timeout, (tokenizers, load_timeout)
        self.turnstile = Turnstile(REQUESTS_AT_ONCE)
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._closed = False

    @classmethod
    def of(cls, llm: AsyncLLM) -> Models:
        """One model that is in memory."""
        config = llm.engine.config
        models = cls([Served(name=llm.engine.name, config=config, llm=llm)])
        models.policy.begin(llm.engine.name, time.monotonic())
        models.policy.loaded(llm.engine.name, time.monotonic())
        return models

    @property
    def first(self) -> Served:
        """The one that a request means which names none."""
        return next(iter(self.all.values()))

    @property
    def engines(self) -> list[Assembled]:
        return [model.llm.engine for model in self.all.values() if model.llm is not None]

    def find(self, name: str | None) -> Served:
        """By its name, an alias, or as the engine was given it. Raises HTTPError: (model_not_found)."""
        if name is None:
            return self.first
        found = self._names.get(name)
        found = found or next((model for model in self.all.values() if name == model.config.model), None)
        if found is None:
            raise HTTPError(
                "model_not_found",
                "This server does not have the model that was asked for",
                why=f"it serves {', '.join(map(repr, self.all))}",
                fix="see GET /v1/models",
                param="model",
                status=404,
            )
        return found

    async def start(self) -> None:
        """Loads those that are pinned, or else the first; others wait until these are there. Raises as
        ``assemble.build_engine``.
        """
        for model in [model for model in self.all.values() if model.stay.pinned] or [self.first]:
            self.policy.begin(model.name, time.monotonic())
            self._act_soon()  # who waited for the one before goes on
            bring = partial(model.bring, self._held_beside(model), *self._bringing)
            self._came(model, await asyncio.to_thread(bring))
        self._act()

    def ask(self, model: Served) -> Ticket:
        """A ticket, which may be granted at once; ``leave`` has to follow. Raises Unavailable: the model could not be
        loaded lately.
        """
        self._look(model)
        ticket = self.policy.ask(model.name, time.monotonic())
        if self.policy.models[model.name].state == "loaded":
            self._act()
        else:
            self._act_soon()
        if not ticket.granted:  # here, since it may be granted or refused before anybody awaits it
            self._waiting[ticket] = asyncio.get_running_loop().create_future()
        return ticket

    async def granted(self, ticket: Ticket) -> None:
        """Waits until it is. Raises Unavailable: the model cannot be loaded."""
        await self._waiting[ticket]

    def leave(self, ticket: Ticket) -> None:
        future = self._waiting.pop(ticket, None)
        if future is not None and not future.cancel() and not future.cancelled():
            future.exception()  # nobody may have been there to hear it
        self.policy.leave(ticket, time.monotonic())
        self._act_soon()

    def load(self, model: Served) -> None:
        """An operator wants it; it comes as soon as there is room."""
        self._look(model)
        self.policy.want(model.name)
        self._act()

    def unload(self, model: Served) -> None:
        """An operator wants it gone, once what runs has ended."""
        self.policy.unwant(model.name)
        self._act()

    def ready(self, model: Served) -> bool:
        """It can compute now."""
        self._look(model)
        return model.alive and self.policy.models[model.name].state == "loaded"

    def may_come(self, model: Served) -> bool:
        """It can, or could be loaded if a request asked for it."""
        resident = self.policy.models[model.name]
        return self.ready(model) or (resident.state == "unloaded" and time.monotonic() >= resident.again)

    def status(self) -> Status:
        """Of all together, since the server's start."""
        each = [model.status() for model in self.all.values()]
        return Status(
            running=sum(status.running for status in each),
            waiting=sum(status.waiting for status in each),
            blocks_total=sum(status.blocks_total for status in each),
            blocks_used=sum(status.blocks_used for status in each),
            counters=sum((status.counters for status in each), Counters()),
        )

    async def abort(self, request_id: str) -> None:
        for model in self.all.values():
            if model.llm is not None:
                await model.llm.abort(request_id)

    def close(self) -> None:
        """Ends every engine, and whatever is being loaded."""
        self._closed = True
        for model in self.all.values():
            model.part()()

    # -- what the policy decides ---------------------------------------------------------------------

    def _act_soon(self) -> None:
        """Once a turn of the event loop: each looks at everybody who waits, and a thousand may go away together."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._act)

    def _act(self) -> None:
        self._due = False
        if self._closed:
            return
        turn, loop = self.policy.turn(time.monotonic()), asyncio.get_running_loop()
        self.turnstile.let_in(self._waiting[ticket] for ticket in turn.granted if ticket in self._waiting)
        for ticket, error in turn.refused:
            if (future := self._waiting.get(ticket)) is not None and not future.done():
                future.set_exception(error)
        for name in turn.unload:
            self._begin(self._unload(self.all[name]))
        if turn.check is not None:
            self._begin(self._check(self.all[turn.check]))
        if turn.load is not None:
            self._begin(self._load(self.all[turn.load]))
        if self._timer is not None:
            self._timer.cancel()
        wake = self.policy.wake(time.monotonic())
        self._timer = None if wake is None else loop.call_later(wake, self._act)

    def _look(self, model: Served) -> None:
        """An engine that is dead for good makes a model that could not be loaded."""
        fault = None if model.llm is None or model.service is None else model.service.fault
        if fault is not None and self.policy.models[model.name].state == "loaded":
            self.policy.failed(model.name, fault, time.monotonic())
            self._begin(asyncio.to_thread(model.part()))

    def _held_beside(self, model: Served) -> Callable[[], int]:
        """Bytes that seem to be free, and that the other models in memory will need; told on any thread."""

        def held() -> int:
            services = [other.service for other in self.all.values() if other is not model]
            return sum(service.held for service in services if service is not None)

        return held

    def _held_after(self, model: Served) -> int:
        """The same once all others have left that may; below 0, what they give back."""
        held = 0
        for name, other in self.all.items():
            if other.service is None:
                continue
            if not self.policy.may_leave(name):
                held += other.service.held
            elif (back := other.service.memory) is not None:
                held -= back
            else:
                return UNKNOWN
        return held

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, model: Served) -> None:
        wrong = await self._outcome(model, partial(model.check, self._held_after(model), self._bringing[1]))
        self.policy.checked(model.name, wrong if isinstance(wrong, PenstockError) else None, time.monotonic())
        if isinstance(wrong, PenstockError):
            self._tell(model, wrong)
        self._act()

    async def _load(self, model: Served) -> None:
        _log.info("loading %s", model.name)
        came = await self._outcome(model, partial(model.bring, self._held_beside(model), *self._bringing))
        if isinstance(came, AsyncLLM):
            self._came(model, came)
        else:
            self.policy.failed(model.name, came, time.monotonic())
            self._tell(model, came)
        self._act()

    async def _outcome(self, model: Served, work: Callable[[], T]) -> T | PenstockError:
        """Of what takes long, in a thread."""
        try:
            return await asyncio.to_thread(work)
        except PenstockError as error:
            return error
        except Exception as error:
            _log.exception("the model %s cannot be loaded", model.name)
            why = type(error).__name__
            return EngineError("load_failed", "The model cannot be loaded", why=why, fix="see the log")

    async def _unload(self, model: Served) -> None:
        await asyncio.to_thread(model.part())  # in the loop, where others look at it
        self.policy.unloaded(model.name)
        self._act()

    def _came(self, model: Served, llm: AsyncLLM) -> None:
        model.llm = llm
        assert model.service is not None
        model.service.step_timeout = self._step_timeout or step_seconds(llm.engine)
        self.policy.loaded(model.name, time.monotonic())
        self.changed()

    def _tell(self, model: Served, error: PenstockError) -> None:
        resident = self.policy.models[model.name]
        then = "when another has left" if resident.crowded else f"in {resident.again - time.monotonic():.0f} s"
        if not self._closed:
            _log.error("the model %s is not loaded, and may be tried again %s: %s", model.name, then, error)
