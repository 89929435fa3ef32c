"""LLM: a model in this process, for scripts."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from penstock.assemble import Assembled, build_engine
from penstock.base import InvalidRequest, PenstockError
from penstock.core.service import Update
from penstock.llm.config import engine_config
from penstock.llm.embedding import VectorJob, Vectors
from penstock.llm.prompts import Message, Prompt, TokensPrompt, not_a_prompt
from penstock.llm.requests import Job, Requests, wrong_type
from penstock.llm.searches import beams_of, run_searches, samples_of
from penstock.search import BeamSearchParams, Extract, Majority, Scorer, SearchOutput, mean_logprob
from penstock.spec import EmbeddingRequestOutput, PoolingParams, RequestOutput, SamplingParams, ScoringRequestOutput
from penstock.text import ChatTemplate, Delta, Tokenizer

T = TypeVar("T")
log = logging.getLogger("penstock")


class LLM:
    """A model in this process, for scripts.

    ``LLM()`` is the bundled model. All fields of ``EngineConfig`` are keyword arguments; vLLM's keywords that change
    nothing here are accepted, and what cannot be honoured is a ConfigError.

    Requests without a seed get one derived from ``seed`` and a counter, so that a script gives the same answers each
    time it runs; with ``seed=None`` they are random.

    Raises:
        ConfigError: unknown_option, and what this build cannot do.
        NotFound, ModelFormatError: the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        config = engine_config(model, options)
        self._requests = Requests(build_engine(config), _seeds(config.seed))

    @property
    def engine(self) -> Assembled:
        """What it runs on: the resolved configuration, tokenizer, chat template, backend."""
        return self._requests.engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        parse_special: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; the outputs are in the order of the prompts.

        All prompts are checked before the first is started. One that fails while it runs does not harm the others: its
        output has finish_reason "error" and the reason is logged; if all fail, the first error is raised.

        Args:
            prompts: one or several; a list of integers is one prompt.
            sampling_params: one for all, or one for each.
            use_tqdm: show progress over several prompts when the terminal can.
            lora_request: only None in this build.
            priority: one for all, or one for each; lower is served earlier.
            parse_special: special tokens written in a text prompt become tokens.

        Raises:
            InvalidRequest: a prompt or parameter cannot be used.
        """
        _refuse_lora(lora_request)
        tokenized = [self._requests.tokenize(prompt, parse_special=parse_special) for prompt in _as_prompts(prompts)]
        return self._complete(tokenized, sampling_params, priority, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several. Special tokens in the content of messages are ordinary text.

        Args:
            lora_request: only None in this build.
            chat_template: Jinja source to use instead of the model's own.
            tools: functions the model may call, as OpenAI's API has them. Calls are in the output's text as the model
                writes them; ``engine.formats.parser`` reads them.
            chat_template_kwargs: variables for the template; those it does not read are ignored.
        """
        _refuse_lora(lora_request)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        template = None
        if chat_template is not None:
            model_own = self._requests.engine.chat
            template = ChatTemplate(chat_template, special_tokens=model_own.special_tokens if model_own else {})
        tokenized = [
            self._requests.tokenize_chat(
                cast("Sequence[Message]", conversation),
                template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self._complete(tokenized, sampling_params, None, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        parse_special: bool = True,
    ) -> Iterator[Delta]:
        """Yields a completion piece by piece as it is computed; with ``n`` > 1 the samples interleave.

        >>> for delta in llm.stream("Once upon a time"):  # doctest: +SKIP
        ...     print(delta.text, end="", flush=True)

        Leaving the loop early ends the request.

        Raises:
            PenstockError: the request was refused or failed.
        """
        tokenized = self._requests.tokenize(prompt, parse_special=parse_special)
        params = self._requests.default_params() if sampling_params is None else sampling_params
        job = self._requests.job(tokenized, params, priority=priority)
        for _, delta in self._follow([job]):
            if job.error is not None:
                raise job.error
            yield delta

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[SearchOutput]:
        """The likeliest completions of each prompt, best first, in ``sequences`` (vLLM's form) and ``candidates``.

        Args:
            use_tqdm: accepted; no progress is shown.
            concurrency_limit: prompts at a time; all of them if left out.

        Raises:
            PenstockError: a prompt or parameter cannot be used, or a request failed.
        """
        _refuse_lora(lora_request)
        tokenized = [self._requests.tokenize(prompt) for prompt in _as_prompts(prompts)]
        return run_searches(
            self._requests, [beams_of(self._requests, prompt, params) for prompt in tokenized], concurrency_limit
        )

    def best_of(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        *,
        by: Scorer = mean_logprob,
    ) -> list[SearchOutput]:
        """Draws ``n`` completions of each prompt, which share its KV, and chooses one.

        Args:
            by: scores the candidates: ``mean_logprob``, a ``Majority``, a ``Verifier``, or a function like them.

        Raises:
            PenstockError: a prompt or parameter cannot be used, or a request failed.
        """
        tokenized = [self._requests.tokenize(prompt) for prompt in _as_prompts(prompts)]
        every_params = _one_each("sampling_params", sampling_params, SamplingParams, len(tokenized))
        pairs = zip(tokenized, every_params, strict=True)
        return run_searches(self._requests, [samples_of(self._requests, prompt, p, by) for prompt, p in pairs])

    def self_consistency(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        extract: Extract | str,
    ) -> list[SearchOutput]:
        """Best of ``n`` by the answer that most of them reach; ``extract`` finds it in a text (see ``Majority``)."""
        return self.best_of(prompts, sampling_params, by=Majority(extract))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector for each prompt, pooled as the model's folder says; a decoder's is that of its last token.

        Special tokens written in a text prompt are ordinary text. All prompts are checked before the first is started.

        Raises:
            InvalidRequest: a prompt or parameter cannot be used; (not_an_embedding_model).
            PenstockError: the first that failed while it ran, once all have ended.
        """
        _refuse_lora(lora_request)
        every, vectors = _as_prompts(prompts), Vectors(self._requests)
        params = _one_each("pooling_params", pooling_params or PoolingParams(), PoolingParams, len(every))
        jobs = [vectors.embedding(prompt, one) for prompt, one in zip(every, params, strict=True)]
        with _progress(len(jobs), use_tqdm) as done:
            vectors.collect(jobs, done)
        return [vectors.embedded(job) for job in jobs]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together: one with one, one with each of many, or many with as many.

        An embedding model answers with the cosine of two embeddings; a cross-encoder reads both texts at once and
        answers with the sigmoid of its logit, or the logit if its folder says so.

        Raises:
            InvalidRequest: the texts cannot be paired or used; (not_a_scoring_model).
            PenstockError: the first that failed while it ran, once all have ended.
        """
        _refuse_lora(lora_request)
        vectors = Vectors(self._requests)
        pairs = vectors.pairs(text_1, text_2, pooling_params)
        jobs = list(dict.fromkeys(job for pair in pairs for job in pair.jobs))
        with _progress(len(jobs), use_tqdm) as done:
            vectors.collect(jobs, done)
        return [vectors.scored(pair) for pair in pairs]

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate``, ``chat`` and ``stream`` use when they are given none: what the model's
        generation_config.json recommends, or with ``LLM(generation_config="none")`` the defaults of SamplingParams.
        """
        return self._requests.default_params()

    def get_tokenizer(self) -> Tokenizer:
        return self._requests.engine.tokenizer

    def close(self) -> None:
        """Ends what is running and frees the model. Needed only to free it before the process ends."""
        self._requests.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _complete(
        self,
        prompts: Sequence[TokensPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        show_progress: bool,
    ) -> list[RequestOutput]:
        params = self._requests.default_params() if params is None else params
        every_params = _one_each("sampling_params", params, SamplingParams, len(prompts))
        priorities = _one_each("priority", 0 if priority is None else priority, int, len(prompts))
        jobs = [
            self._requests.job(prompt, one_params, priority=one_priority)
            for prompt, one_params, one_priority in zip(prompts, every_params, priorities, strict=True)
        ]
        with _progress(len(jobs), show_progress) as done:
            for job, _ in self._follow(jobs):
                if job.finished:
                    done(job)
        failed = [job for job in jobs if job.error is not None]
        if failed and len(failed) == len(jobs):
            raise cast(PenstockError, failed[0].error)
        for job in failed:
            log.error("request %s failed: %s", job.submission.id, job.error)
        return [job.output() for job in jobs]

    def _follow(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Delta]]:
        """Submits jobs and yields their deltas until all are finished; leaving early aborts the rest."""
        news: SimpleQueue[tuple[Job, Update]] = SimpleQueue()
        unfinished = dict[str, Job]()
        try:
            for job in jobs:
                self._requests.submit(job, lambda job, update: news.put((job, update)))
                unfinished[job.submission.id] = job
            while unfinished:
                job, update = news.get()
                delta = self._requests.apply(job, update)
                if job.finished:
                    unfinished.pop(job.submission.id, None)
                if delta is not None:
                    yield job, delta
        finally:
            for job in unfinished.values():
                self._requests.end(job)


def _seeds(root: int | None) -> Callable[[], int]:
    """Seed of the i-th request: blake2b-64 of root and i."""
    if root is None:
        return lambda: secrets.randbits(64)
    numbers = count()
    return lambda: int.from_bytes(blake2b(f"{root}:{next(numbers)}".encode(), digest_size=8).digest(), "little")


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise not_a_prompt(prompts)
    every = list(prompts)
    if every and not isinstance(every[0], (str, Mapping, Iterable)):
        return [cast(Prompt, every)]
    return cast("list[Prompt]", every)


def _one_each(name: str, value: T | Sequence[T], kind: type[T], number: int) -> list[T]:
    if isinstance(value, kind):
        return [value] * number
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise wrong_type(name, value, f"{kind.__name__}, or a list with one for each prompt")
    every = list(value)
    for one in every:
        if not isinstance(one, kind):
            raise wrong_type(name, one, kind.__name__)
    if len(every) != number:
        raise InvalidRequest(
            "invalid_parameter", f"{name} is a list of {len(every)}", why=f"there are {number} prompts"
        )
    return every


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise InvalidRequest("unsupported_parameter", "lora_request is not in this build yet", fix="leave it out")


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[Job | VectorJob], None]]:
    """Yields a function that counts a finished job on a bar, which only a terminal shows."""
    console = Console(stderr=True)
    tokens = 0
    with Progress(
        TextColumn("Prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown or total < 2 or not console.is_terminal,
        transient=False,
    ) as bar:
        task = bar.add_task("", total=total, rate=0.0)
        start = time.monotonic()

        def done(job: Job | VectorJob) -> None:
            nonlocal tokens
            tokens += job.num_tokens
            bar.update(task, advance=1, rate=tokens / max(time.monotonic() - start, 1e-9))

        yield done
