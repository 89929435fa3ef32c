"""Beam search: the likeliest completions, found by keeping the best few at every length.

Names and output are vLLM's. The rule is the one of transformers' ``generate(num_beams=..., early_stopping=False)``, so
that both find the same beams: candidates that end are set aside only from among the best ``beam_width`` of a step; the
search is over when that many were set aside and the best running beam, by the score it has now, is below the worst of
them. A score is the sum of log-probabilities divided by length ** length_penalty; the length counts generated tokens,
the ending one included (vLLM counts the prompt's too).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from penstock.base import InvalidRequest
from penstock.core.service import Submission
from penstock.search.run import Search, SearchOutput
from penstock.spec import CompletionOutput, Logprob, SamplingParams
from penstock.spec.sampling import MAX_LOGPROBS


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What a beam search looks for. Names and defaults are vLLM's.

    Attributes:
        beam_width: beams kept at every length, and candidates returned.
        max_tokens: most tokens of a candidate.
        ignore_eos: the end-of-sequence token is a token like any other.
        temperature: only 0: beams are compared by what the model says, not by what is drawn.
        length_penalty: above 0 favours longer candidates, below 0 shorter ones.
        include_stop_str_in_output: keep the ending token in a candidate's tokens.

    Raises:
        InvalidRequest: invalid_parameter, unsupported_parameter.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (
            ("beam_width", self.beam_width, MAX_LOGPROBS // 2),
            ("max_tokens", self.max_tokens, 2**31 - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise _unusable(name, value, f"it must be an integer from 1 to {most}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not abs(penalty) <= 100.0:
            raise _unusable("length_penalty", penalty, "it must be a number in [-100, 100]")
        if self.temperature != 0.0:
            raise InvalidRequest(
                "unsupported_parameter",
                f"temperature = {self.temperature!r} has no meaning in a beam search",
                why="beams are ranked by the model's own log-probabilities",
                fix="leave it out",
            )


class _Beam(NamedTuple):
    """Tokens beyond the prompt, the entries of their log-probabilities, and the sum of those, in float64."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    total: float = 0.0

    def extended(self, token: int, entry: dict[int, Logprob], total: float) -> _Beam:
        return _Beam((*self.tokens, token), (*self.logprobs, entry), total)

    def score(self, length_penalty: float) -> float:
        return float(self.total / len(self.tokens) ** length_penalty)


class _Ended(NamedTuple):
    score: float
    beam: _Beam


def step_params(params: BeamSearchParams, eos_ids: Collection[int], vocab_size: int) -> SamplingParams:
    """What each beam asks of a step: the likeliest tokens, so many that ``beam_width`` of them do not end it.

    Raises:
        InvalidRequest: (invalid_parameter) the beam is too wide for a model with so many end-of-sequence tokens.
    """
    wanted = min(_candidates(params, eos_ids), vocab_size)
    if wanted > MAX_LOGPROBS:
        why = f"with {len(eos_ids)} end-of-sequence tokens at most {MAX_LOGPROBS // (1 + len(eos_ids))} can be used"
        raise _unusable("beam_width", params.beam_width, why)
    return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=wanted)


def beam_search(
    request: Submission, params: BeamSearchParams, eos_ids: Collection[int], room: int, prompt: str | None = None
) -> Search:
    """The search, in lockstep: each round extends every beam by one token.

    The beams' KV is shared as far as their tokens are equal, by the prefix cache. Candidates of one score are ordered
    by parent beam, then token id.

    Args:
        request: names the prompt, and everything but the parameters, which are ``step_params``.
        eos_ids: tokens that end a candidate; not looked at with ``ignore_eos``.
        room: tokens the context has left after the prompt.
    """
    width, penalty = params.beam_width, params.length_penalty
    enders = frozenset(() if params.ignore_eos else eos_ids)
    last = min(params.max_tokens, room)
    running, ended, spent = [_Beam()], list[_Ended](), 0
    for length in range(1, last + 1):
        step = [
            replace(request, id=f"{request.id}.{length}.{i}", tokens=(*request.tokens, *beam.tokens))
            for i, beam in enumerate(running)
        ]
        outputs = yield step
        spent += len(running)
        best = _extensions(running, [samples[0] for samples in outputs], _candidates(params, enders))
        over = [length == last or beam.tokens[-1] in enders for beam in best]
        ended += [_Ended(beam.score(penalty), beam) for beam, ends in zip(best[:width], over, strict=False) if ends]
        ended = sorted(ended, key=lambda e: -e.score)[:width]  # stable: of equals the earlier
        running = [beam for beam, ends in zip(best, over, strict=True) if not ends][:width]
        if not running or (len(ended) == width and running[0].score(penalty) <= ended[-1].score):
            break
    return SearchOutput(
        prompt=prompt,
        prompt_token_ids=list(request.tokens),
        candidates=[_candidate(i, e.beam, enders, params) for i, e in enumerate(ended)],
        scores=[e.score for e in ended],
        chosen=0,
        num_tokens=spent,
    )


def _candidates(params: BeamSearchParams, enders: Collection[int]) -> int:
    return params.beam_width * max(2, 1 + len(enders))


def _extensions(running: list[_Beam], outputs: list[CompletionOutput], count: int) -> list[_Beam]:
    """The best extensions of all beams by one token."""
    entries = [(output.logprobs or [{}])[0] for output in outputs]
    every = (
        (-(beam.total + found.logprob), parent, token)
        for parent, (beam, entry) in enumerate(zip(running, entries, strict=True))
        for token, found in entry.items()
    )
    return [running[parent].extended(token, entries[parent], -cost) for cost, parent, token in sorted(every)[:count]]


def _candidate(index: int, beam: _Beam, enders: frozenset[int], params: BeamSearchParams) -> CompletionOutput:
    stopped = beam.tokens[-1] in enders
    shown = len(beam.tokens) - (stopped and not params.include_stop_str_in_output)
    return CompletionOutput(
        index=index,
        token_ids=list(beam.tokens[:shown]),
        cumulative_logprob=beam.total,
        logprobs=list(beam.logprobs[:shown]),
        finish_reason="stop" if stopped else "length",
    )


def _unusable(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{name} = {value!r} cannot be used", why=why)
