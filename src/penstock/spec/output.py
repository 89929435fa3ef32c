"""What a caller gets back. Field names are vLLM's, so that scripts run by changing one import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Attributes:
    logprob: natural log-probability under the raw softmax, before temperature and rules.
    rank: 1 for the likeliest token of the vocabulary.
    decoded_token: its text, None when the output was not detokenized.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class TokenLogprobs(NamedTuple):
    """Raw log-softmax at one drawn token.

    Attributes:
        drawn: log-probability of the drawn token.
        rank: its rank, 1 for the likeliest.
        top: (token id, log-probability), likeliest first, ties by id; as many as asked for.
    """

    drawn: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: sample index, 0 <= index < n.
        logprobs: per token, id -> Logprob of the drawn and the likeliest tokens.
        finish_reason: "stop", "length", "abort" or "error"; None while running.
        stop_reason: the stop string or stop token id that ended it, None for end-of-sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on the engine's monotonic clock."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    finished_time: float | None = None


class Timing(NamedTuple):
    """What one sample had to wait for in its engine.

    Attributes:
        queued: seconds from its arrival to the first step that it was part of.
        preempted: times that its KV was given up.
        starved: seconds it then waited for KV blocks, or with those it held for more of them.
    """

    queued: float
    preempted: int
    starved: float


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        prompt: the text, None when token ids were given.
        num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
        prompt_logprobs: per prompt token, id -> Logprob of it and the likeliest tokens, if asked for; None for the
            first token, which nothing was before.
        lora_request: always None in this build, which refuses requests for one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    lora_request: None = None


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The vector of one prompt.

    Attributes:
        num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class ScoringOutput:
    """Attributes:
    score: how well two texts go together: the cosine of their embeddings, or what a cross-encoder says.
    """

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """The score of one pair of texts. ``prompt_token_ids`` are those of both."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
