"""What must be kept of a request so that another engine can go on with it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

from penstock.core.service import Sink, Submission, Update

log = logging.getLogger(__name__)

PROOF_TOKENS = 4
"""A request is harmless when a new engine has told so many of one sample: engines compute some steps ahead of what they
tell, and a step that kills one takes the news of those before it along."""


class UnderWay:
    """A submission that is not finished, and all that was heard of it.

    Attributes:
        aborted: samples that shall end.
        deaths: engines that died while it ran, and that it may have killed.
    """

    def __init__(self, submission: Submission, sink: Sink) -> None:
        self.submission, self.sink = submission, sink
        self.aborted: set[int] = set()
        self.deaths = 0
        self._tokens = {sample: list(tokens) for sample, tokens in submission.unfinished}
        self._reported = 0  # entries of prompt log-probabilities that were told
        self._heard = 0  # and those that came from the engine that is there now
        self._fresh: Counter[int] = Counter()  # tokens of each sample that did

    @property
    def left(self) -> list[int]:
        """Samples that have not ended. A copy made at once: one thread aborts while another hears."""
        return list(self._tokens)

    @property
    def harmless(self) -> bool:
        """The engine that is there now has shown that it survives it."""
        return not self._tokens or any(count >= PROOF_TOKENS for count in self._fresh.values())

    def abort(self, sample: int | None) -> None:
        self.aborted |= {index for index in self.left if sample in (None, index)}

    def hear(self, update: Update) -> bool:
        """Notes news, and takes out of them what was told before; False if the sample has ended already."""
        if (tokens := self._tokens.get(update.sample)) is None:
            return False
        tokens += update.tokens
        self._fresh[update.sample] += len(update.tokens)
        if update.prompt_logprobs:  # of an engine that goes on they all come again
            told = max(0, self._reported - self._heard)
            self._heard += len(update.prompt_logprobs)
            self._reported = max(self._reported, self._heard)
            update.prompt_logprobs = update.prompt_logprobs[told:]
        if update.finish_reason:
            del self._tokens[update.sample]
        return True

    def tell(self, update: Update) -> bool:
        """Whether the caller took it. A caller's fault is not the engine's."""
        try:
            self.sink(update)
        except Exception:
            log.exception("the sink of request %s raised", update.id)
            return False
        return True

    def continuation(self) -> Submission:
        """For an engine that knows nothing of it yet."""
        self._heard = 0
        self._fresh.clear()
        if self.submission.task != "generate":
            return self.submission
        emitted = tuple(
            tuple(self._tokens[index]) if index in self._tokens else None for index in range(self.submission.params.n)
        )
        return replace(self.submission, emitted=emitted if any(tokens != () for tokens in emitted) else ())
