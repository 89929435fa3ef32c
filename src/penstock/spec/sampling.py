"""SamplingParams: what a caller may ask of the draw. Names, meaning and defaults are vLLM's."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import InitVar, dataclass, replace
from typing import Any, Self

from penstock.base import InvalidRequest

MAX_N = 128
_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
MAX_LOGPROBS = 128
MAX_STOP = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 1024
MAX_LOGIT_BIAS = 1024

_NOT_YET: dict[str, bool | None] = {
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "prompt_logprobs": None,
    "bad_words": None,
    "best_of": None,
    "logits_processors": None,
    "allowed_token_ids": None,
    "truncate_prompt_tokens": None,
    "output_kind": None,
    "extra_args": None,
    "structured_outputs": None,
    "guided_decoding": None,
}
"""vLLM's keywords that this build cannot honour, and the value that asks for nothing (beside None, also an empty list
or mapping; ``best_of`` may equal ``n``). SamplingParams declares each of them as an InitVar, in this order: they are
checked and not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    Attributes:
        n: completions per prompt; they share the prompt's KV blocks.
        temperature: 0 is greedy; below 0.01 and above 0 is raised to 0.01.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p, in (0, 1].
        min_p: drop tokens below min_p x the likeliest one's probability, in [0, 1].
        repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al. 2019).
        presence_penalty, frequency_penalty: in [-2, 2]; count output tokens only (OpenAI).
        logit_bias: token id -> value in [-100, 100] added to its raw logit.
        seed: makes the draw reproducible; without one the engine chooses a seed per request.
        stop: strings that end a completion; they are not part of the text.
        stop_token_ids: token ids that end a completion; they are not part of the text.
        min_tokens: tokens before which no end-of-sequence or stop id can be drawn.
        max_tokens: most tokens of one completion; None means as many as the context holds.
        ignore_eos: the model's own end-of-sequence token does not end the completion.
        logprobs: log-probabilities of this many likeliest tokens beside the drawn one's; None for none.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string at the end of the text.

    vLLM's other keywords are accepted when they ask for nothing; they are not kept.

    Raises:
        InvalidRequest: (invalid_parameter) a value out of range, named with its limits; (unsupported_parameter) a
            keyword of vLLM's that this build cannot honour.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    detokenize: InitVar[bool] = True
    spaces_between_special_tokens: InitVar[bool] = True
    prompt_logprobs: InitVar[None] = None
    bad_words: InitVar[Sequence[str] | None] = None
    best_of: InitVar[int | None] = None
    logits_processors: InitVar[Sequence[Any] | None] = None
    allowed_token_ids: InitVar[Sequence[int] | None] = None
    truncate_prompt_tokens: InitVar[None] = None
    output_kind: InitVar[None] = None
    extra_args: InitVar[Mapping[str, Any] | None] = None
    structured_outputs: InitVar[None] = None
    guided_decoding: InitVar[None] = None

    def __post_init__(self, *not_yet: object) -> None:
        _int("n", self.n, 1, MAX_N)
        _real("temperature", self.temperature, 0.0, 1e4)
        if 0.0 < self.temperature < 0.01:  # below this exp(logit / t) overflows; vLLM does the same
            object.__setattr__(self, "temperature", 0.01)
        _int("top_k", self.top_k, -1, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise _invalid("min_tokens", self.min_tokens, f"it is above max_tokens = {self.max_tokens}")
        if self.seed is not None:
            _int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for (name, neutral), value in zip(_NOT_YET.items(), not_yet, strict=True):
            if value is not neutral and not _empty(value) and not (name == "best_of" and value == self.n):
                raise InvalidRequest(
                    "unsupported_parameter",
                    f"{name} is not in this build yet",
                    why=f"it was {reprlib.repr(value)}",
                    fix=f"leave it out or pass {neutral}",
                )
        self._normalise()

    def _normalise(self) -> None:
        for name in _REALS:  # a numpy scalar would not survive a recording
            object.__setattr__(self, name, float(getattr(self, name)))
        stop = (self.stop,) if isinstance(self.stop, str) else _entries("stop", self.stop, MAX_STOP, "strings")
        for string in stop:
            if not isinstance(string, str):
                raise _invalid("stop", string, "it must be a string")
            if not 0 < len(string) <= MAX_STOP_LENGTH:
                raise _invalid("stop", string, f"it has {len(string)} characters, not 1 to {MAX_STOP_LENGTH}")
        object.__setattr__(self, "stop", stop)
        ids = _entries("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS, "token ids")
        for token in ids:
            _int("stop_token_ids", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", ids)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise _invalid("logit_bias", self.logit_bias, "it must map token ids to numbers")
            _at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
            bias = {}
            for token, value in self.logit_bias.items():
                token = int(token) if isinstance(token, str) and token.isdecimal() else token
                _int("logit_bias", token, 0, 2**31 - 1)
                _real("logit_bias", value, -100.0, 100.0)
                bias[token] = float(value)
            object.__setattr__(self, "logit_bias", bias)

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return replace(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)  # made so in __post_init__
        return self.stop


def _invalid(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{name} = {reprlib.repr(value)} cannot be used", why=why)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, (list, tuple, Mapping)) and not value)


def _entries(name: str, value: object, most: int, what: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise _invalid(name, value, f"it must be a list of {what}")
    entries = tuple(value)
    _at_most(name, entries, most)
    return entries


def _at_most(name: str, entries: Sized, most: int) -> None:
    if len(entries) > most:
        raise _invalid(name, entries, f"it has {len(entries)} entries, at most {most} are allowed")


def _int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _invalid(name, value, f"it must be an integer from {low} to {high}")


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        bracket = "(" if open_low else "["
        raise _invalid(name, value, f"it must be a number in {bracket}{low:g}, {high:g}]")
