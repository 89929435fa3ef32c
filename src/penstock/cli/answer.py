"""One request as the command line reports it: its texts, what they used, and the clock around them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from penstock.spec import CompletionOutput, Logprob

if TYPE_CHECKING:
    from penstock.text import Delta


class Answer:
    """The completions of one prompt. Times count from the moment the model was ready for it."""

    def __init__(self, prompt_tokens: int, samples: int = 1) -> None:
        self.prompt_tokens, self.samples = prompt_tokens, [CompletionOutput(i) for i in range(samples)]
        self.cached = 0
        self.first_s: float | None = None
        self.total_s = 0.0
        self._started = time.perf_counter()

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.total_s if self.total_s else None

    def take(self, delta: Delta) -> None:
        self.total_s = time.perf_counter() - self._started
        if delta.token_ids and self.first_s is None:
            self.first_s = self.total_s
        sample = self.samples[delta.index]
        sample.text += delta.text
        sample.token_ids += delta.token_ids
        sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            sample.logprobs = (sample.logprobs or []) + delta.logprobs
        self.cached = delta.num_cached_tokens

    def report(self) -> dict[str, Any]:
        return completions(self.samples) | {
            "usage": usage(self.prompt_tokens, self.tokens, self.cached),
            "timings": {
                "time_to_first_token_s": None if self.first_s is None else round(self.first_s, 4),
                "total_s": round(self.total_s, 4),
                "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            },
        }


def completions(samples: Sequence[CompletionOutput]) -> dict[str, Any]:
    """One completion's text, tokens and end; of several, a list of such objects in ``outputs``."""
    reports = [
        {"text": sample.text, "token_ids": sample.token_ids, "finish_reason": sample.finish_reason}
        | ({} if sample.stop_reason is None else {"stop_reason": sample.stop_reason})
        | ({} if sample.logprobs is None else {"logprobs": [_by_id(entry) for entry in sample.logprobs]})
        for sample in samples
    ]
    return reports[0] if len(reports) == 1 else {"outputs": reports}


def _by_id(entry: Mapping[int, Logprob]) -> dict[int, dict[str, Any]]:
    return {token: asdict(value) for token, value in entry.items()}


def usage(prompt: int, completion: int, cached: int) -> dict[str, int]:
    """Token counts, named as OpenAI names them; ``cached``: prompt tokens found in the prefix cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cached": cached,
    }
