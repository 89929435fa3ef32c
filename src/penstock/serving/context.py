"""What the routes share, and the one way they make an engine generate."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from penstock.base import PenstockError, Unavailable
from penstock.core.service import engine_stopped
from penstock.llm import AsyncLLM, TokensPrompt
from penstock.serving.errors import HTTPError
from penstock.serving.gate import Caller, Gate, current
from penstock.serving.history import History
from penstock.serving.kept import Kept
from penstock.serving.limits import MAX_CHOICES
from penstock.serving.metrics import Metrics
from penstock.serving.models import Models, Served
from penstock.serving.requestlog import RequestLog
from penstock.serving.schemas import GenerationRequest, PromptTokensDetails, Usage
from penstock.serving.sse import unless_disconnected
from penstock.serving.texts import Texts
from penstock.spec import SamplingParams
from penstock.text import Delta

if TYPE_CHECKING:
    from penstock.serving.batches import Batches
    from penstock.serving.spans import Spans

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Context:
    """A server, as a request to one of its models sees it.

    Attributes:
        models: all that it serves.
        served: the one that the request is for; the first where none is named.
        live: engine ids of the requests under way that generate.
        tasks: those that make vectors, or choose among samples.
        history: those that ended last.
        starting: the models that shall be there at once are being loaded; requests wait for them.
        draining: no new requests; the process is about to end.
        batches: files of requests, answered when there is time.
        kept: responses and conversations that may be gone on from.
        origins: web pages of other sites whose scripts may use it.
        stop: set to begin that end.
    """

    models: Models
    served: Served
    metrics: Metrics
    gate: Gate
    log: RequestLog | None = None
    spans: Spans | None = None
    live: set[str] = field(default_factory=set)
    tasks: set[asyncio.Future[Any]] = field(default_factory=set)
    history: History = field(default_factory=History)
    starting: bool = False
    draining: bool = False
    batches: Batches = field(init=False)
    kept: Kept = field(init=False)
    origins: tuple[str, ...] = ()
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def llm(self) -> AsyncLLM:
        """Raises Unavailable: (engine_stopped) it is not in memory."""
        if self.served.llm is None:
            raise engine_stopped()
        return self.served.llm

    def of(self, model: Served) -> Context:
        """The same for one of its models."""
        view = copy(self)
        view.served = model
        return view

    def admit(self, model: str | None) -> Served:
        """Refuses what is not served here, and everything while it ends."""
        if self.draining:
            raise shutting_down()
        return self.models.find(model)

    async def use(
        self, model: str | None, size: int, receive: Receive | None = None, stays: float | None = None
    ) -> Context:
        """The same for one of its models, which stays in memory until the caller leaves. Waits for it if need be.

        Args:
            size: of the request, in bytes: no prompt has more tokens.
            receive: of a client that may go away meanwhile.
            stays: as of ``ModelRequest.stays``.

        Raises:
            HTTPError: as ``admit``.
            ClientDisconnect: it went away.
            Unavailable: it cannot be loaded, or too many wait.
        """
        view, caller = self.of(self.admit(model)), current.get()
        caller.model = view.name
        ticket = self.models.ask(view.served)
        caller.let_go.append(lambda: self.models.leave(ticket))
        if not ticket.granted:
            caller.reserve(size)
            began = time.monotonic()
            try:
                waiting = self.until_aborted(self.models.granted(ticket))
                await (waiting if receive is None else unless_disconnected(receive, waiting))
            finally:
                caller.release()
                caller.load += time.monotonic() - began
        if stays is not None and view.heeds:
            self.models.policy.keep(view.name, None if stays == inf else stays)  # carried out when it leaves
        return view

    @property
    def heeds(self) -> bool:
        """The caller may say how long the model stays, as it may load and unload it by hand; not of the only model, nor
        of one that is pinned.
        """
        return current.get().administers and len(self.models.all) > 1 and not self.served.stay.pinned

    def tier(self, asked: GenerationRequest) -> str:
        """At which a request is served; an engine that goes by arrival alone has only the default one."""
        config = self.served.config
        return asked.tier if config.scheduling_policy == "priority" and config.priority_age_seconds else "default"

    @property
    def own_llm(self) -> AsyncLLM:
        """The model as the caller's tenant sees it."""
        return AsyncLLM(self.llm, current.get().tenant)

    async def until_aborted(self, work: Awaitable[T]) -> T:
        """Awaits work that ``abort_all`` cancels. Raises Unavailable: (shutting_down) it did."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        try:
            await asyncio.wait({task})
            if task.cancelled():
                raise shutting_down()
            return task.result()
        finally:
            task.cancel()
            self.tasks.discard(task)

    async def abort_all(self) -> None:
        for task in tuple(self.tasks):
            task.cancel()
        for engine_id in tuple(self.live):
            await self.models.abort(engine_id)


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


def shutting_down() -> Unavailable:
    return Unavailable(
        "shutting_down", "This server is shutting down", fix="send the request again, elsewhere or later"
    )


@dataclass(slots=True)
class Generation:
    """All samples of all prompts of one HTTP request.

    Attributes:
        id: the id of the response; the engine's ids are made from it.
        fingerprint: of weights and arithmetic; it is another exactly where bits of an answer may be others.
        kept: of a prompt's ``params.n`` samples only so many are answered with, the best; 0 for all, as they come.
    """

    context: Context
    id: str
    prompts: Sequence[TokensPrompt]
    params: SamplingParams
    priority: int = 0
    kept: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    cached_tokens: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = f"fp_{blake2b(self.context.llm.engine.setup.numerics_id, digest_size=8).hexdigest()}"
        if len(self.prompts) * self.params.n > MAX_CHOICES:
            raise HTTPError(
                "too_many_choices",
                "The request asks for too many completions",
                why=f"{len(self.prompts)} prompts times {self.params.n}; at most {MAX_CHOICES}",
                fix="split it into several requests",
                param="best_of" if self.kept else "n",
            )

    @property
    def choices(self) -> int:
        """For each prompt."""
        return self.kept or self.params.n

    def usage(self) -> Usage:
        prompt = sum(len(prompt["prompt_token_ids"]) for prompt in self.prompts)
        return Usage(
            prompt, self.completion_tokens, prompt + self.completion_tokens, PromptTokensDetails(self.cached_tokens)
        )

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice, what is new of it), as it comes. Closing it aborts what is still running.

        Choice ``i * choices + j`` is sample j of prompt i, or the one that came out as number j.
        """
        self._charge()
        current.get().answer = self.id
        one = self._best if self.kept else self._one
        async with aclosing(merged([one(i) for i in range(len(self.prompts))])) as news:
            async for prompt, delta in news:
                self._count(len(delta.token_ids))
                yield prompt * self.choices + delta.index, delta

    def _charge(self) -> None:
        """All of it, before any of it is computed. Raises InvalidRequest, OverLimit, Unavailable."""
        limits = self.context.llm.engine.setup.limits
        lengths = [len(prompt["prompt_token_ids"]) for prompt in self.prompts]
        for length in lengths:  # what never fits is told so, not to come again when there is room
            limits.check_length(length)
        room = limits.max_model_len - min(lengths)
        completions = len(lengths) * self.params.n
        current.get().charge(sum(lengths), completions, max(1, room), self.params.max_tokens)

    def _count(self, tokens: int) -> None:
        self.completion_tokens += tokens
        current.get().completion_tokens += tokens

    async def _best(self, prompt: int) -> AsyncGenerator[Delta, None]:
        """Samples as a whole, those of the highest mean log-probability first."""
        search = self.context.own_llm.best_of(self.prompts[prompt], self.params, f"{self.id}-{prompt}", self.priority)
        outcome = await self.context.until_aborted(search)
        ranked = sorted(range(self.params.n), key=lambda i: -outcome.scores[i])
        for place, sample in enumerate([outcome.candidates[i] for i in ranked]):
            self.context.metrics.finished.labels(sample.finish_reason).inc()
            current.get().finish = sample.finish_reason
            if place >= self.kept:
                self._count(len(sample.token_ids))  # drawn all the same
                continue
            logprobs = None if self.params.logprobs is None else sample.logprobs
            yield Delta(place, sample.text, sample.token_ids, logprobs, sample.finish_reason, sample.stop_reason)

    async def _one(self, prompt: int) -> AsyncGenerator[Delta, None]:
        metrics, engine_id = self.context.metrics, f"{self.id}-{prompt}"
        started, caller = time.perf_counter(), current.get()
        latest: dict[int, float] = {}
        lengths: Counter[int] = Counter()
        unfinished, cached, reason = self.params.n, 0, "abort"
        texts = self._texts(caller) if prompt == 0 else None
        params = self.params if texts is None else texts.params(self.params)
        self.context.live.add(engine_id)
        try:
            stream = self.context.own_llm.stream(self.prompts[prompt], params, engine_id, self.priority)
            async with aclosing(stream):
                async for delta in stream:
                    if texts is not None:
                        texts.add(delta)
                    now = time.perf_counter()
                    lengths[delta.index] += len(delta.token_ids)
                    if delta.token_ids:
                        if (before := latest.get(delta.index)) is None:
                            metrics.first_token.observe(now - started)
                            caller.began(delta.timing)
                        else:
                            metrics.between.observe((now - before) / len(delta.token_ids))
                            caller.longest_gap = max(caller.longest_gap, now - before)
                        latest[delta.index] = now
                    if delta.timing is not None:
                        caller.waited(delta.timing)
                    self.cached_tokens += delta.num_cached_tokens - cached
                    caller.cached_tokens = self.cached_tokens
                    cached = delta.num_cached_tokens
                    if delta.finish_reason is not None:
                        if delta.finish_reason == "abort":
                            raise shutting_down()
                        unfinished -= 1
                        if self.params.max_tokens is None:
                            self.context.gate.admission.completed(lengths[delta.index])
                        metrics.finished.labels(delta.finish_reason).inc()
                        caller.finish = delta.finish_reason
                        metrics.whole.observe(now - started)
                    yield delta
        except PenstockError:
            reason = "error"
            raise
        finally:
            self.context.live.discard(engine_id)
            metrics.finished.labels(reason).inc(unfinished)
            if unfinished:
                caller.finish = reason

    def _texts(self, caller: Caller) -> Texts | None:
        """Where what a request says is kept; nobody looks at the lines of a batch."""
        if caller.gate.keep_texts and caller.booked:
            ids = self.prompts[0]["prompt_token_ids"]
            caller.texts = Texts.of(self.context.llm.engine.tokenizer, ids, self.params)
        return caller.texts


async def merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index of the stream, item) in order of arrival. The first error ends all; closing it closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait((index, delta))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
