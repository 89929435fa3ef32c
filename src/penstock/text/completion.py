"""From accepted tokens to what a caller sees: text, stop strings, log-probabilities, the reason it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.spec import CompletionOutput, FinishReason, Logprob, SamplingParams, Timing, TokenLogprobs
from penstock.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What is new of one completion. Joining the deltas of an index gives its CompletionOutput.

    Attributes:
        index: sample index, 0 <= index < n.
        text: may be empty while tokens arrive: a character is incomplete, or a stop string may have begun.
        token_ids: the new tokens, end-of-sequence and stop tokens included.
        logprobs: one id -> Logprob per new token, if asked for.
        finish_reason, stop_reason: set in the last delta of the index.
        num_cached_tokens: prompt tokens found in the prefix cache, as known so far.
        timing: what it waited for in the engine so far, where that is news.
        prompt_logprobs: entries of further tokens of the prompt, from the second one on; sample 0 alone brings them.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    timing: Timing | None = None
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)


class StopStrings:
    """Finds the stop string that ends first in a text fed in pieces, wherever the pieces are cut.

    Of two that end at the same character the longer wins. Knuth, Morris & Pratt (1977): the state of a string is how
    much of it the end of the text matches, so a character costs O(1) per string, amortised, and the longest state is
    exactly what must be held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(set(strings), key=lambda s: (-len(s), s))
        self._fallback = [_failure_links(string) for string in self._strings]
        self._state = [0] * len(self._strings)

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return max(self._state, default=0)

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, int] | None:
        """The string found and the index in ``text`` just after it. Unarmed, a match is passed over."""
        if not self._strings:
            return None
        for position, char in enumerate(text, 1):
            found = None
            for i, string in enumerate(self._strings):
                state, links = self._state[i], self._fallback[i]
                while state and string[state] != char:
                    state = links[state]
                state = state + 1 if string[state] == char else 0
                if state == len(string):
                    found, state = found or string, links[state]
                self._state[i] = state
            if found and armed:
                return found, position
        return None


def _failure_links(string: str) -> list[int]:
    """links[k]: length of the longest proper prefix of ``string`` that ends ``string[:k]``."""
    links, state = [0, 0], 0
    for char in string[1:]:
        while state and string[state] != char:
            state = links[state]
        state = state + 1 if string[state] == char else 0
        links.append(state)
    return links


def prompt_logprob_entries(
    tokens: Sequence[int], entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob]]:
    """Of some tokens of a prompt. Without a tokenizer the tokens have no text."""
    return [_entry(token, raw, tokenizer) for token, raw in zip(tokens, entries, strict=True)]


def _entry(token: int, raw: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """id -> Logprob, the token itself first."""

    def text(of: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(of)

    entry = {token: Logprob(raw.drawn, raw.rank, text(token))}
    for rank, (other, value) in enumerate(raw.top, 1):
        if other != token:
            entry[other] = Logprob(value, rank, text(other))
    return entry


class Completion:
    """One sample as its caller sees it.

    A stop string is found in the text, also across tokens, and the completion is cut there: the text before the
    string (after it with ``include_stop_str_in_output``), the tokens up to the one that completed it. What the engine
    computed beyond is dropped, and ``stopped`` asks the caller to end the request. Text that may turn out to be the
    start of a stop string is held back. As in vLLM, stop strings that end within the first ``min_tokens`` tokens are
    passed over, and the text of the stop token that ended the completion is left out as a stop string is. Without
    ``detokenize`` there is no text at all.

    Args:
        prompt: the tokens it continues.

    Attributes:
        text: all text shown so far.
    """

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.text = ""
        self._index, self._params = index, params
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer = (
            tokenizer.detokenizer(
                skip_special_tokens=params.skip_special_tokens, after=prompt, shown=params.shown_token_ids
            )
            if params.detokenize
            else None
        )
        self._stops = StopStrings(params.stop_strings)
        self._held = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative = 0.0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    @property
    def stopped(self) -> bool:
        """A stop string ended it, which the engine cannot know."""
        return isinstance(self._stop_reason, str)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def extend(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: int | None = None,
    ) -> Delta:
        """Takes in newly accepted tokens; the arguments are those of a ``core.service.Update``.

        With ``finish_reason`` "stop" the last token is the stop token: it counts, and its text is not shown.
        """
        delta = Delta(self._index, logprobs=None if self._logprobs is None else [])
        if self.finished:
            return delta
        hidden = len(tokens) - 1 if finish_reason == "stop" and not self._params.include_stop_str_in_output else None
        for i, token in enumerate(tokens):
            self._take(delta, token, logprobs[i] if i < len(logprobs) else None)
            if self._detokenizer and i != hidden and self._show(delta, self._detokenizer.feed(token)):
                return delta
        rest = self._detokenizer.flush() if self._detokenizer and finish_reason is not None else ""
        if finish_reason is not None and not self._show(delta, rest):
            self._emit(delta, self._held, "")
            self._finish(delta, finish_reason, stop_reason)
        return delta

    def output(self) -> CompletionOutput:
        """A snapshot; later tokens do not change it."""
        return CompletionOutput(
            index=self._index,
            text=self.text,
            token_ids=self._token_ids.copy(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

    def _take(self, delta: Delta, token: int, raw: TokenLogprobs | None) -> None:
        delta.token_ids.append(token)
        self._token_ids.append(token)
        if self._logprobs is None or delta.logprobs is None or raw is None:
            return
        entry = _entry(token, raw, self._tokenizer)
        self._cumulative += raw.drawn
        self._logprobs.append(entry)
        delta.logprobs.append(entry)

    def _show(self, delta: Delta, text: str) -> bool:
        """Adds text; true if a stop string ended the completion in it."""
        found = self._stops.feed(text, armed=len(self._token_ids) > self._params.min_tokens)
        text, before = self._held + text, len(self._held)
        if found is None:
            cut = len(text) - self._stops.held
            self._emit(delta, text[:cut], text[cut:])
            return False
        string, end = found
        end += before
        self._emit(delta, text[: end if self._params.include_stop_str_in_output else end - len(string)], "")
        self._finish(delta, "stop", string)
        return True

    def _emit(self, delta: Delta, shown: str, held: str) -> None:
        delta.text += shown
        self.text += shown
        self._held = held

    def _finish(self, delta: Delta, reason: FinishReason, stop_reason: int | str | None) -> None:
        self._finish_reason = delta.finish_reason = reason
        self._stop_reason = delta.stop_reason = stop_reason
