"""AsyncLLM: a model in this process, for asyncio. The server is built on it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from penstock.assemble import Assembled, build_engine
from penstock.base import InvalidRequest
from penstock.core.service import Update
from penstock.llm.compiling import compiled
from penstock.llm.embedding import VectorJob, Vectors
from penstock.llm.mailbox import Mailbox
from penstock.llm.prompts import Message, Prompt, TokensPrompt, packed
from penstock.llm.requests import Job, Requests
from penstock.llm.searches import beams_of, samples_of
from penstock.search import (
    BeamSearchParams,
    Extract,
    Majority,
    Scorer,
    Search,
    SearchOutput,
    SearchRun,
    mean_logprob,
)
from penstock.spec import (
    EmbeddingRequestOutput,
    EngineConfig,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    ScoringRequestOutput,
)
from penstock.text import Delta
from penstock.wire import Chat, Text, TextWorkers

if TYPE_CHECKING:
    from penstock.grammar import Grammar

FAR_CHARS = 32_000
"""Texts of so many characters are tokenized by another process, if there is one: that is what a thread would hold up
the interpreter with by more than the way there costs."""

_FAR = ThreadPoolExecutor(4, "penstock-far")

T = TypeVar("T")
Admit = Callable[[int], None]


class AsyncLLM:
    """A model in this process, for asyncio: what the server is built on.

    Requests without a seed get a random one.

    Args:
        engine: a configuration to build from, or an engine that was built; the bundled model by default. Of another
            AsyncLLM, whose event loop then must run, the same engine.
        tenant: whose requests these are; cached prefixes are shared within one.
        texts: tokenize what is long; by default a thread of this process does.
    """

    def __init__(
        self,
        engine: EngineConfig | Assembled | AsyncLLM | None = None,
        tenant: str = "",
        texts: TextWorkers | None = None,
    ) -> None:
        self._mailbox: Mailbox | None = None
        self._texts = texts
        if isinstance(engine, AsyncLLM):
            self._texts, self._mailbox, engine = engine._texts, engine._current_mailbox(), engine.engine
        built = build_engine(engine or EngineConfig()) if engine is None or isinstance(engine, EngineConfig) else engine
        # Ids of 128 random bits: numbers could be ids that callers have chosen for requests of their own.
        self._requests = Requests(built, lambda: secrets.randbits(64), lambda: secrets.token_hex(16), tenant)

    @property
    def engine(self) -> Assembled:
        return self._requests.engine

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> TokensPrompt:
        """The prompt as ``stream`` and ``generate`` would submit it, to learn its length first or to send it twice.

        Raises:
            InvalidRequest: invalid_prompt, invalid_text, prompt_too_long, token_out_of_range.
        """
        if self._texts is not None and isinstance(prompt, str) and self._is_for_others(prompt):
            made = await asyncio.wrap_future(self._texts.tokenize(Text(prompt, add_special_tokens, parse_special)))
            return TokensPrompt(prompt_token_ids=made.ids, prompt=prompt)

        def tokenized() -> TokensPrompt:
            given = packed(prompt) if isinstance(prompt, list) else prompt
            made = self._requests.tokenize(given, add_special_tokens=add_special_tokens, parse_special=parse_special)
            made["prompt_token_ids"] = packed(made["prompt_token_ids"])
            return made

        return await _beside_the_loop(prompt, tokenized)

    async def compile(self, params: SamplingParams) -> Grammar | None:
        """Compiles the grammar that ``params`` ask for, beside the event loop. While it is held it is known at once.

        Raises:
            InvalidRequest: unsupported_schema, invalid_regex, invalid_grammar.
        """
        if params.structured_outputs is None:
            return None
        return await compiled(self.engine.grammars(), params.structured_outputs, self._requests.tenant)

    async def tokenize_chat(self, messages: Sequence[Message], **options: Any) -> TokensPrompt:
        """A conversation as the model reads it; ``options`` are those of ``text.ChatTemplate.apply``.

        Raises:
            InvalidRequest: no_chat_template, and what ``ChatTemplate.apply`` raises.
        """
        if self._texts is not None and _is_far(messages, options.get("tools")):
            sent = None
            with suppress(InvalidRequest):  # no frame holds it, such as a large integer in the schema of a tool
                sent = self._texts.tokenize(Chat([dict(message) for message in messages], options))
            if sent is not None:
                made = await asyncio.wrap_future(sent)
                return TokensPrompt(prompt_token_ids=made.ids, prompt=made.text)
        return await asyncio.to_thread(self._requests.tokenize_chat, messages, **options)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """Yields a completion piece by piece; each sample's last delta has a finish_reason.

        Cancelling the task or closing the iterator aborts the request (``contextlib.aclosing`` closes it in time).

        Raises:
            PenstockError: the request was refused (before the first delta) or failed.
        """
        async with aclosing(self._follow(prompt, sampling_params, request_id, priority)) as news:
            async for _, delta in news:
                yield delta

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As ``stream``, but yields all that there is so far; the last output has ``finished`` set."""
        async with aclosing(self._follow(prompt, sampling_params, request_id, priority)) as news:
            async for job, _ in news:
                yield job.output()

    async def beam_search(
        self, prompt: Prompt, params: BeamSearchParams, request_id: str | None = None, priority: int = 0
    ) -> SearchOutput:
        """As ``LLM.beam_search``. Cancelling the task ends it."""
        tokenized = await self.tokenize(prompt)
        return await self._search(beams_of(self._requests, tokenized, params, request_id, priority))

    async def best_of(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        *,
        by: Scorer = mean_logprob,
    ) -> SearchOutput:
        """As ``LLM.best_of``. ``by`` is called in the event loop."""
        tokenized = await self.tokenize(prompt)
        _held = await self.compile(sampling_params) if isinstance(sampling_params, SamplingParams) else None
        search = await _beside_the_loop(
            tokenized, lambda: samples_of(self._requests, tokenized, sampling_params, by, request_id, priority)
        )
        return await self._search(search)

    async def self_consistency(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        extract: Extract | str,
        request_id: str | None = None,
        priority: int = 0,
    ) -> SearchOutput:
        """As ``LLM.self_consistency``."""
        return await self.best_of(prompt, sampling_params, request_id, priority, by=Majority(extract))

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> EmbeddingRequestOutput:
        """A prompt's vector, as ``LLM.embed`` makes it. Cancelling the task aborts the request.

        Raises:
            PenstockError: the request was refused or failed.
        """
        vectors = self._vectors()

        def made() -> VectorJob:
            return vectors.embedding(prompt, pooling_params, request_id, priority)

        job = await (self._apart(made, prompt) if self._is_for_others(prompt) else _beside_the_loop(prompt, made))
        await self._collect([job])
        return vectors.embedded(job)

    async def embed_all(
        self,
        prompts: Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        priority: int = 0,
        *,
        admit: Admit | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """As ``embed``, for several prompts. All are checked before the first is started.

        Args:
            admit: is told of how many tokens they are before the first is started, and may raise.

        Raises:
            PenstockError: a request was refused, or the first that failed.
        """
        vectors = self._vectors()
        jobs = await self._apart(
            lambda: [vectors.embedding(prompt, pooling_params, priority=priority) for prompt in prompts], *prompts
        )
        await self._collect(jobs, admit)
        return await asyncio.to_thread(lambda: [vectors.embedded(job) for job in jobs])

    async def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        priority: int = 0,
        *,
        admit: Admit | None = None,
    ) -> list[ScoringRequestOutput]:
        """As ``LLM.score``. Cancelling the task aborts the requests. ``admit`` as for ``embed_all``.

        Raises:
            PenstockError: a request was refused, or the first that failed.
        """
        vectors = self._vectors()
        texts = [text for given in (text_1, text_2) for text in ([given] if isinstance(given, str) else given)]
        pairs = await self._apart(lambda: vectors.pairs(text_1, text_2, pooling_params, priority), *texts)
        await self._collect([job for pair in pairs for job in pair.jobs], admit)
        return [vectors.scored(pair) for pair in pairs]

    async def abort(self, request_id: str) -> None:
        """Ends a request; whoever iterates over it gets its last piece, with finish_reason "abort"."""
        self.engine.service.abort(request_id)

    def get_default_sampling_params(self) -> SamplingParams:
        """As ``LLM.get_default_sampling_params``: what ``stream`` and ``generate`` use when they are given none."""
        return self._requests.default_params()

    def close(self) -> None:
        """Ends what is running and frees the model."""
        if self._texts is not None:
            self._texts.close()
        self.engine.close()

    async def _follow(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, priority: int
    ) -> AsyncGenerator[tuple[Job, Delta], None]:
        _held = await self.compile(params) if isinstance(params, SamplingParams) else None
        job = await _beside_the_loop(
            prompt,
            lambda: self._requests.job(
                self._requests.tokenize(prompt),
                self._requests.default_params() if params is None else params,
                request_id=request_id,
                priority=priority,
            ),
        )
        mailbox, news = self._current_mailbox(), asyncio.Queue[Update]()
        self._requests.submit(job, lambda _, update: mailbox.post(news, update))
        try:
            while not job.finished:
                delta = self._requests.apply(job, await news.get())
                if job.error is not None:
                    raise job.error
                if delta is not None:
                    yield job, delta
        finally:
            if not job.finished:
                self._requests.end(job)

    async def _search(self, search: Search) -> SearchOutput:
        mailbox, news = self._current_mailbox(), asyncio.Queue[Update]()
        run = SearchRun(self.engine.service, search, lambda update: mailbox.post(news, update), self.engine.tokenizer)
        try:
            run.start()
            while run.outcome is None:
                run.hear(await news.get())
            return run.outcome
        finally:
            run.cancel()

    def _vectors(self) -> Vectors:
        """For one request, which may have the same long text in many pairs."""
        if self._texts is None:
            return Vectors(self._requests)
        far = cache(lambda *order: cast(TextWorkers, self._texts).tokenize(Text(*order)).result().ids)

        def tokenize(prompt: Prompt, *, add_special_tokens: bool = True, parse_special: bool = True) -> TokensPrompt:
            if self._is_for_others(prompt):
                return TokensPrompt(prompt_token_ids=far(prompt, add_special_tokens, parse_special))
            return self._requests.tokenize(prompt, add_special_tokens=add_special_tokens, parse_special=parse_special)

        return Vectors(self._requests, tokenize)

    def _is_for_others(self, prompt: Prompt) -> bool:
        return self._texts is not None and isinstance(prompt, str) and len(prompt) >= FAR_CHARS

    async def _apart(self, work: Callable[[], T], *prompts: Prompt) -> T:
        """On a thread; where it waits for another process, on one of those that nobody else waits for."""
        threads = _FAR if any(map(self._is_for_others, prompts)) else None
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _current_mailbox(self) -> Mailbox:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    async def _collect(self, jobs: Iterable[VectorJob], admit: Admit | None = None) -> None:
        """Submits jobs and waits for all of them."""
        jobs = list(dict.fromkeys(jobs))
        if admit is not None:
            admit(sum(job.num_tokens for job in jobs))
        mailbox, news = self._current_mailbox(), asyncio.Queue[Update]()
        service, unfinished = self.engine.service, dict[str, VectorJob]()
        try:
            for i, job in enumerate(jobs):
                service.submit(job.submission, lambda update: mailbox.post(news, update))
                unfinished[job.submission.id] = job
                if i % 16 == 15:  # there may be thousands: let others have a turn
                    await asyncio.sleep(0)
            while unfinished:
                if unfinished[(update := await news.get()).id].hear(update):
                    del unfinished[update.id]
        finally:
            for id in unfinished:
                service.abort(id)


def _is_far(*given: object) -> bool:
    """Whether the texts in it have FAR_CHARS characters together, wherever they stand: a template may render all."""
    size, left = 0, list(given)
    while left and size < FAR_CHARS:
        value, size = left.pop(), size + 1
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return size >= FAR_CHARS


async def _beside_the_loop(prompt: Prompt, work: Callable[[], T]) -> T:
    """On a thread of its own if it would hold up the event loop for a millisecond: for a long prompt."""
    content: Any = prompt
    if isinstance(prompt, Mapping):
        content = prompt.get("prompt_token_ids") or prompt.get("prompt")
    size = len(content) if isinstance(content, Sized) else 0
    return await asyncio.to_thread(work) if size >= 2_000 else work()
