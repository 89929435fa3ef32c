"""A search and whoever runs it.

A search is a generator: it yields rounds of submissions, is sent what came of them, and returns its outcome. So it
knows no threads, clocks or engines, and runs wherever there is a Service: in this process, on a cluster, or in virtual
time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.base import EngineError
from penstock.core.service import Service, Sink, Submission, Update
from penstock.spec import CompletionOutput, FinishReason, Logprob, TokenLogprobs
from penstock.text import Completion, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchSequence:
    """One beam, with vLLM's fields: ``tokens`` and ``text`` begin with the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    text: str | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(slots=True, kw_only=True)
class SearchOutput:
    """What came of a search over one prompt.

    Attributes:
        prompt: the text, also of token ids; None where there is no tokenizer to make one.
        candidates: all that were found; of a beam search, the best first.
        scores: of each candidate, by what the search chose; higher is better.
        chosen: index of the best candidate, of equals the first.
        num_tokens: tokens drawn for all of this, those of abandoned beams included.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    candidates: list[CompletionOutput]
    scores: list[float]
    chosen: int
    num_tokens: int

    @property
    def best(self) -> CompletionOutput:
        return self.candidates[self.chosen]

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def sequences(self) -> list[BeamSearchSequence]:
        """The candidates as vLLM's beam search returns them."""
        return [
            BeamSearchSequence(
                tokens=self.prompt_token_ids + candidate.token_ids,
                logprobs=candidate.logprobs or [],
                cum_logprob=candidate.cumulative_logprob or 0.0,
                text=(self.prompt or "") + candidate.text,
                finish_reason=candidate.finish_reason,
                stop_reason=candidate.stop_reason,
            )
            for candidate in self.candidates
        ]


Round = Sequence[Submission]
"""Submissions that run side by side."""

Search = Generator[Round, list[list[CompletionOutput]], SearchOutput]
"""Is sent, for each submission of a round, its samples by index, all finished."""


class SearchRun:
    """One search on a service: start it, and tell it all that its sink hears, in order, from one thread at a time.

    Args:
        sink: is called for each update of its submissions, from whatever thread runs the engine; it or whoever it
            passes the update on to calls ``hear``.
        tokenizer: makes the texts and finds the stop strings; without one texts are empty.
    """

    def __init__(self, service: Service, search: Search, sink: Sink, tokenizer: Tokenizer | None = None) -> None:
        self.outcome: SearchOutput | None = None
        self._service, self._search, self._sink, self._tokenizer = service, search, sink, tokenizer
        self._round: dict[str, list[_Sample]] = {}

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def start(self) -> None:
        """Raises what the search and ``Service.submit`` raise."""
        self._submit(next(self._search))

    def hear(self, update: Update) -> None:
        """Takes in news; what comes too late is ignored.

        Raises:
            PenstockError: a request of the search failed or was aborted (search_aborted), or the search itself raised.
                Nothing of it runs any more.
        """
        samples = self._round.get(update.id)
        if samples is None or samples[update.sample].finished:
            return
        if update.error is not None or update.finish_reason == "abort":
            self.cancel()
            raise update.error or EngineError(
                "search_aborted", f"Request {update.id} of a search was aborted", fix="search again"
            )
        sample = samples[update.sample]
        sample.extend(update.tokens, update.logprobs, update.finish_reason, update.stop_reason)
        if sample.finished and update.finish_reason is None:  # a stop string
            self._service.abort(update.id, update.sample)
        if all(s.finished for samples in self._round.values() for s in samples):
            self._advance([[s.output() for s in samples] for samples in self._round.values()])

    def cancel(self) -> None:
        """Ends what still runs for it."""
        for id, samples in self._round.items():
            if not all(sample.finished for sample in samples):
                self._service.abort(id)
        self._round = {}
        self._search.close()

    def _advance(self, outputs: list[list[CompletionOutput]]) -> None:
        self._round = {}
        try:
            following = self._search.send(outputs)
        except StopIteration as end:
            self.outcome = end.value
        else:
            self._submit(following)

    def _submit(self, submissions: Round) -> None:
        self._round = {submission.id: self._samples(submission) for submission in submissions}
        started = set[str]()
        try:
            for submission in submissions:
                self._service.submit(submission, self._sink)
                started.add(submission.id)
        except Exception:
            self._round = {id: samples for id, samples in self._round.items() if id in started}  # others' run on
            self.cancel()
            raise

    def _samples(self, submission: Submission) -> list[_Sample]:
        params, tokenizer = submission.params, self._tokenizer
        if tokenizer is None:
            return [_Tokens(CompletionOutput(i)) for i in range(params.n)]
        return [Completion(i, params, tokenizer, submission.tokens) for i in range(params.n)]


class _Sample(Protocol):
    """What ``text.Completion`` and ``_Tokens`` have in common."""

    @property
    def finished(self) -> bool: ...

    def extend(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: int | None = None,
    ) -> object: ...

    def output(self) -> CompletionOutput: ...


@dataclass(slots=True)
class _Tokens:
    """A completion without text."""

    so_far: CompletionOutput
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    total: float = 0.0

    @property
    def finished(self) -> bool:
        return self.so_far.finished()

    def extend(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: int | None = None,
    ) -> None:
        out = self.so_far
        out.token_ids += tokens
        out.finish_reason, out.stop_reason = finish_reason, stop_reason
        for token, raw in zip(tokens, logprobs, strict=False):
            entry = {token: Logprob(raw.drawn, raw.rank)}
            entry |= {other: Logprob(value, rank) for rank, (other, value) in enumerate(raw.top, 1)}
            self.logprobs.append(entry)
            self.total += raw.drawn
        out.logprobs, out.cumulative_logprob = self.logprobs, self.total

    def output(self) -> CompletionOutput:
        return self.so_far
