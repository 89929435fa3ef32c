"""Embeddings and scores: from texts to submissions, and from what the engine gives to what a caller asked for.

What an engine gives is a vector as the model made it, in fp32 values, or log-probabilities of a prompt; everything
after that (the cut, the length, the angle, the sigmoid, the mean) happens here in float64, so that it cannot depend on
how requests were batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from queue import SimpleQueue
from typing import cast

import numpy as np
import numpy.typing as npt

from penstock.base import InvalidRequest
from penstock.core.service import Submission, Update
from penstock.llm.prompts import Prompt, TokensPrompt
from penstock.llm.requests import Requests, wrong_type
from penstock.spec import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EncoderSpec,
    PoolingParams,
    SamplingParams,
    ScoringOutput,
    ScoringRequestOutput,
)

Floats = npt.NDArray[np.float64]


class VectorJob:
    """One submission that asks for a vector, and what became of it.

    Attributes:
        scored: if any, the vector is the log-probabilities of so many tokens at the end of the prompt.
        update: the engine's last word, None until then.
    """

    def __init__(self, submission: Submission, params: PoolingParams, scored: int = 0) -> None:
        self.submission, self.params, self.scored = submission, params, scored
        self.update: Update | None = None
        self._logprobs: list[float] = []

    @property
    def num_tokens(self) -> int:
        return len(self.submission.tokens)

    def hear(self, update: Update) -> bool:
        """Whether it was the last."""
        self._logprobs += [entry.drawn for entry in update.prompt_logprobs]
        if update.finish_reason is not None:
            self.update = update
        return update.finish_reason is not None

    def vector(self) -> Floats:
        """Raises PenstockError: why there is none."""
        assert self.update is not None
        if self.update.error is not None:
            raise self.update.error
        found: Sequence[float] | None = self.update.vector
        if self.scored and len(self._logprobs) == self.num_tokens - 1:  # the first token has none
            found = self._logprobs[-self.scored :]
        if found is None:
            raise InvalidRequest(
                "request_aborted", "The request was aborted before its vector was there", fix="submit it again"
            )
        return np.array(found, np.float64)


@dataclass(slots=True)
class PairJob:
    """One score and the submissions it is made of: one that holds both texts, or one for each text."""

    jobs: tuple[VectorJob, ...]


class Vectors:
    """Makes and finishes the requests for vectors of one engine. ``tokenize``: in place of ``Requests.tokenize``."""

    def __init__(self, requests: Requests, tokenize: Callable[..., TokensPrompt] | None = None) -> None:
        self.requests, self.tokenize = requests, tokenize or requests.tokenize
        self.pooling = requests.engine.pooling

    def embedding(
        self, prompt: Prompt, params: PoolingParams | None, request_id: str | None = None, priority: int = 0
    ) -> VectorJob:
        """A request for the embedding of a prompt.

        Raises:
            InvalidRequest: not_an_embedding_model, empty_prompt, invalid_parameter, and what ``Requests.tokenize`` and
                ``check_prompt`` raise.
        """
        params = self._params(params)
        if self.pooling.classifier:
            raise InvalidRequest(
                "not_an_embedding_model",
                f"{self.requests.engine.name} is a cross-encoder: it scores pairs and embeds nothing",
                fix="use score, or an embedding model",
            )
        if params.dimensions is not None and params.dimensions > self.requests.engine.spec.hidden:
            raise InvalidRequest(
                "invalid_parameter",
                f"dimensions = {params.dimensions} cannot be had",
                why=f"the model's vectors have {self.requests.engine.spec.hidden}",
            )
        return self._job(self._tokenize(prompt, params), params, request_id, priority)

    def embedded(self, job: VectorJob) -> EmbeddingRequestOutput:
        """Raises PenstockError: why there is no embedding."""
        return EmbeddingRequestOutput(
            request_id=job.submission.id,
            outputs=EmbeddingOutput(self._finish(job).tolist()),
            prompt_token_ids=list(job.submission.tokens),
            num_cached_tokens=cast(Update, job.update).cached_tokens,
        )

    def pairs(
        self, first: str | Sequence[str], second: str | Sequence[str], params: PoolingParams | None, priority: int = 0
    ) -> list[PairJob]:
        """Requests for the scores of pairs: one with one, one with each of many, or many with as many.

        Raises:
            InvalidRequest: invalid_text, empty_prompt, invalid_parameter, not_a_scoring_model, prompt_too_long.
        """
        params = self._params(params)
        firsts, seconds = _texts("text_1", first), _texts("text_2", second)
        if len(firsts) == 1:
            firsts *= len(seconds)
        if len(firsts) != len(seconds):
            raise InvalidRequest(
                "invalid_parameter",
                "The texts cannot be paired",
                why=f"there are {len(firsts)} first and {len(seconds)} second ones",
                fix="give one first text, or as many as second ones",
            )
        if self.pooling.classifier or not self.pooling.embedder:
            both = self._cross if self.pooling.classifier else self._likelihood
            return [PairJob((both(a, b, params, priority),)) for a, b in zip(firsts, seconds, strict=True)]
        single = {text: self.embedding(text, params, None, priority) for text in dict.fromkeys(chain(firsts, seconds))}
        return [PairJob((single[a], single[b])) for a, b in zip(firsts, seconds, strict=True)]

    def scored(self, pair: PairJob) -> ScoringRequestOutput:
        """Raises PenstockError: why there is no score."""
        if len(pair.jobs) == 1:
            (job,) = pair.jobs
            activated = self.pooling.sigmoid if job.params.use_activation is None else job.params.use_activation
            score = float(job.vector().mean())
            if activated:
                score = math.exp(score) if job.scored else _sigmoid(score)
        else:
            a, b = (_unit(self._finish(job)) for job in pair.jobs)
            score = float(a @ b)
        return ScoringRequestOutput(
            request_id="_".join(job.submission.id for job in pair.jobs),
            outputs=ScoringOutput(score),
            prompt_token_ids=[token for job in pair.jobs for token in job.submission.tokens],
            num_cached_tokens=sum(cast(Update, job.update).cached_tokens for job in pair.jobs),
        )

    def collect(self, jobs: Iterable[VectorJob], done: Callable[[VectorJob], None]) -> None:
        """Submits jobs and waits for all; leaving early aborts the rest. Raises what ``Service.submit`` raises."""
        news: SimpleQueue[Update] = SimpleQueue()
        unfinished = dict[str, VectorJob]()
        try:
            for job in jobs:
                self.requests.engine.service.submit(job.submission, news.put)
                unfinished[job.submission.id] = job
            while unfinished:
                job = unfinished[(update := news.get()).id]
                if job.hear(update):
                    del unfinished[update.id]
                    done(job)
        finally:
            for id in unfinished:
                self.requests.engine.service.abort(id)

    def _finish(self, job: VectorJob) -> Floats:
        vector_D = job.vector()[: job.params.dimensions]
        normalize = self.pooling.normalize if job.params.normalize is None else job.params.normalize
        return _unit(vector_D) if normalize else vector_D

    def _job(
        self, ids: list[int], params: PoolingParams, request_id: str | None = None, priority: int = 0
    ) -> VectorJob:
        task, unused = self.pooling.pooling, SamplingParams()
        submission = self.requests.submission(ids, unused, task=task, request_id=request_id, priority=priority)
        return VectorJob(submission, params)

    def _tokenize(self, prompt: Prompt, params: PoolingParams) -> list[int]:
        """Special tokens written in the text are ordinary text; those that the tokenizer puts around it are there."""
        text: object = None
        if not _has_ids(prompt):
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if text == "":
            raise _empty()
        if self.pooling.lower and isinstance(text, str):
            prompt = text.lower()
        ids = list(self.tokenize(prompt, parse_special=False)["prompt_token_ids"])
        longest = self._longest(params)
        if longest is None or len(ids) <= longest:
            return ids
        closing = [] if _has_ids(prompt) else self.requests.engine.tokenizer.pair_frame()[2]
        return ids[: longest - len(closing)] + closing[-longest:]

    def _cross(self, first: str, second: str, params: PoolingParams, priority: int) -> VectorJob:
        """A pair as the cross-encoder reads it. Special tokens written in the texts are ordinary text."""
        spec = self.requests.engine.spec
        if isinstance(spec, EncoderSpec) and spec.labels != 1:
            what = f"{self.requests.engine.name} has {spec.labels} labels, and a score is one number"
            raise InvalidRequest("not_a_scoring_model", what, fix="use a cross-encoder with one label")
        if not first or not second:
            raise _empty()
        a, b = (
            self.tokenize(text.lower() if self.pooling.lower else text, add_special_tokens=False, parse_special=False)[
                "prompt_token_ids"
            ]
            for text in (first, second)
        )
        before, between, after = self.requests.engine.tokenizer.pair_frame()
        longest = self._longest(params)
        if longest is not None:
            frame = len(before) + len(between) + len(after)
            if longest < frame:
                why = f"the tokens around a pair are {frame}"
                raise InvalidRequest("invalid_parameter", f"truncate_prompt_tokens = {longest} cannot be used", why=why)
            a, b = _shorten(a, b, longest - frame)
        return self._job([*before, *a, *between, *b, *after], params, priority=priority)

    def _likelihood(self, first: str, second: str, params: PoolingParams, priority: int) -> VectorJob:
        """How likely the model finds the first text after the second: of a query and a document, the query's likelihood
        (Sachan et al. 2022, "Improving Passage Retrieval with Zero-Shot Question Generation", without the instruction).
        A pair that is too long loses the end of the second text.
        """
        if not first or not second:
            raise _empty()
        plain = {"add_special_tokens": False, "parse_special": False}
        before = self.tokenize(second, parse_special=False)["prompt_token_ids"]
        between, scored = (self.tokenize(text, **plain)["prompt_token_ids"] for text in ("\n", first))
        if not scored:
            raise _empty()
        longest = self._longest(params)
        if longest is not None:
            room = longest - len(between) - len(scored) - 1
            if room < 1:
                why = f"the first text and what goes around it are {len(between) + len(scored) + 1} tokens"
                raise InvalidRequest("invalid_parameter", f"truncate_prompt_tokens = {longest} cannot be used", why=why)
            before = before[:room]
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        submission = self.requests.submission([*before, *between, *scored], asked, priority=priority)
        return VectorJob(submission, params, len(scored))

    def _longest(self, params: PoolingParams) -> int | None:
        """Tokens that a prompt is cut to."""
        holds = self.requests.engine.setup.limits.max_model_len
        wanted = params.truncate_prompt_tokens
        if wanted is not None and wanted > holds:
            raise InvalidRequest(
                "invalid_parameter", f"truncate_prompt_tokens = {wanted} cannot be used", why=f"the context is {holds}"
            )
        return holds if wanted == -1 else wanted

    def _params(self, params: PoolingParams | None) -> PoolingParams:
        if params is not None and not isinstance(params, PoolingParams):
            raise wrong_type("pooling_params", params, "PoolingParams")
        return params or PoolingParams()


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # no overflow, on either side
    return (1.0 if x >= 0 else small) / (1.0 + small)


def _unit(vector_D: Floats) -> Floats:
    length = np.sqrt((vector_D * vector_D).sum())
    return vector_D / length if length > 0 else vector_D


def _shorten(a: Sequence[int], b: Sequence[int], room: int) -> tuple[Sequence[int], Sequence[int]]:
    """Cuts the longer text, then both alike, as ``tokenizers`` does by its rule "longest_first"."""
    if len(a) + len(b) <= room:
        return a, b
    if len(a) > len(b):
        b, a = _shorten(b, a, room)
        return a, b
    kept = min(len(a), room // 2)
    return a[:kept], b[: room - kept]


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise wrong_type(name, value, "a text or a list of texts")
    return list(texts)


def _has_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and (not isinstance(prompt, Mapping) or "prompt_token_ids" in prompt)


def _empty() -> InvalidRequest:
    return InvalidRequest("empty_prompt", "The text is empty", fix="send at least one character")
