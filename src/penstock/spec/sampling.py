"""SamplingParams: what a caller may ask of the draw. Names, meaning and defaults are vLLM's, else llama.cpp's."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Self

from penstock.base import InvalidRequest
from penstock.spec import ranges
from penstock.spec.ranges import MAX_ID
from penstock.spec.structured import StructuredOutputs

MAX_N = 128
MAX_LOGPROBS = 128
MAX_STOP = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 1 << 20
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LENGTH = 1024
MAX_BREAKERS = 64
MAX_BREAKER_LENGTH = 40
MAX_BREAKER_IDS = 1 << 20
MAX_TAG_LENGTH = 1024
MAX_RULES = 16
MAX_RULE_ARGUMENTS = 1 << 16

_INTEGERS = {
    "n": (1, MAX_N),
    "top_k": (-1, MAX_ID),
    "dry_allowed_length": (1, MAX_ID),
    "dry_penalty_last_n": (-1, MAX_ID),
    "min_tokens": (0, MAX_ID),
}
_OPTIONAL_INTEGERS = {
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (1, MAX_ID),
    "logprobs": (-1, MAX_LOGPROBS),
    "prompt_logprobs": (-1, MAX_LOGPROBS),
    "truncate_prompt_tokens": (-1, MAX_ID),
    "thinking_budget": (0, MAX_ID),
}
_REALS = {
    "temperature": (0.0, 1e4),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-4, 1e4),  # a logit over less would overflow
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "dry_multiplier": (0.0, 1e4),
    "dry_base": (1.0, 1e4),
    "thinking_soft": (0.0, 1.0),
}
POSITIVE = {"top_p": 1.0, "typical_p": 1.0}
BOUNDS = _INTEGERS | _OPTIONAL_INTEGERS | _REALS | {name: (0.0, most) for name, most in POSITIVE.items()}
"""Least and most of every number; those of ``POSITIVE`` stop just short of their least."""

_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    Rules apply in this order: ``allowed_token_ids``, ``bad_words``, ``min_tokens``, ``logit_bias``, custom rules,
    penalties, DRY, the thinking budget, grammar, ``temperature``, ``min_p``, ``top_k``, ``top_p``, ``typical_p``.

    Attributes:
        n: completions per prompt; they share the prompt's KV blocks.
        temperature: 0 is greedy; below 0.01 and above 0 is raised to 0.01.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p, in (0, 1].
        min_p: drop tokens below min_p x the likeliest one's probability, in [0, 1].
        typical_p: of what is left, keep the smallest set with probability p of the tokens whose surprise is nearest
            to the expected one (locally typical sampling, Meister et al. 2022), in (0, 1].
        repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al. 2019), in [0.0001, 10000].
        presence_penalty, frequency_penalty: in [-2, 2]; count output tokens only (OpenAI).
        dry_multiplier, dry_base, dry_allowed_length: DRY ("don't repeat yourself") subtracts multiplier x
            base^(length - allowed_length) from a token that would continue a repetition of so many tokens, in prompt
            or output; a multiplier of 0 is off.
        dry_penalty_last_n: tokens to look back; -1 is all, 0 is off.
        dry_sequence_breakers: no repetition is followed across these strings.
        logit_bias: token id -> value in [-100, 100] added to its raw logit.
        allowed_token_ids: no other token can be drawn.
        bad_words: strings that must not be written, at the start of a word or within a text: the last token of each
            is held back wherever the tokens before it were just output.
        seed: makes the draw reproducible; without one the engine chooses a seed per request.
        stop: strings that end a completion; they are not part of the text.
        stop_token_ids: token ids that end a completion; they are not part of the text.
        min_tokens: tokens before which no end-of-sequence or stop id can be drawn.
        max_tokens: most tokens of one completion; None means as many as the context holds.
        ignore_eos: the model's own end-of-sequence token does not end the completion.
        logprobs: log-probabilities of this many likeliest tokens beside the drawn one's; None for none, -1 for the
            whole vocabulary where that is no more than MAX_LOGPROBS.
        prompt_logprobs: as ``logprobs``, for the tokens of the prompt.
        truncate_prompt_tokens: keep only the last so many tokens of the prompt; -1 keeps what leaves room for
            ``max_tokens``.
        detokenize: make text of the tokens; without it texts are empty, and there are no stop strings.
        skip_special_tokens: leave special tokens out of the text.
        shown_token_ids: special tokens that are part of the text even so, such as marks of tool calls.
        spaces_between_special_tokens: of effect only where special tokens are shown and the tokenizer does not say how
            they are spaced; the tokenizers read here do.
        include_stop_str_in_output: keep the stop string, or the stop token's text, at the end of the text.
        logits_rules: name of a rule the engine was started with -> its arguments, JSON values.
        logits_processors: in this process only: functions of (output ids, logits) or (prompt ids, output ids, logits)
            that return logits.
        structured_outputs: what form the completion must have.
        thinking_budget: most tokens of a reasoning model's thoughts; when they are spent the end is written for it.
        thinking_start, thinking_end: what stands around thoughts, as text or token ids; the model's own if left out.
        thinking_close: written before ``thinking_end`` when the budget is spent, such as a closing sentence.
        thinking_soft: share of the budget, its last, in which ending becomes likelier and likelier; 0 to 1.
        bad_words_ids, dry_breaker_ids, thinking_ids: the strings above as token ids; made by whoever has the tokenizer.

    ``guided_decoding`` is vLLM's former name of ``structured_outputs``. Its other keywords are accepted when they ask
    for nothing; they are not kept.

    Raises:
        InvalidRequest: (invalid_parameter) a value out of range, or at odds with another, named with its limits;
            (unsupported_parameter) a keyword of vLLM's that this build cannot honour.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    shown_token_ids: Sequence[int] = ()
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logits_rules: Mapping[str, Any] | None = None
    logits_processors: Sequence[Callable[..., Any]] | None = field(default=None, repr=False)
    structured_outputs: StructuredOutputs | None = None
    thinking_budget: int | None = None
    thinking_start: str | Sequence[int] | None = None
    thinking_end: str | Sequence[int] | None = None
    thinking_close: str | Sequence[int] = ""
    thinking_soft: float = 0.2
    bad_words_ids: Sequence[Sequence[int]] = ()
    dry_breaker_ids: Sequence[Sequence[int]] = ()
    thinking_ids: Sequence[Sequence[int]] = ()

    best_of: InitVar[int | None] = None
    output_kind: InitVar[Any] = None
    extra_args: InitVar[Mapping[str, Any] | None] = None
    guided_decoding: InitVar[Any] = None

    def __post_init__(self, best_of: object, output_kind: object, extra_args: object, guided_decoding: object) -> None:
        self._check_numbers()
        self._normalise_lists()
        self._normalise_rules(guided_decoding)
        self._refuse_contradictions()
        if best_of not in (None, self.n):
            raise _unsupported("best_of", best_of, "ask for n = best_of completions and choose among them")
        if getattr(output_kind, "value", output_kind) not in (None, 0):
            raise _unsupported("output_kind", output_kind, "leave it out; stream() gives what is new, generate() all")
        if extra_args:
            raise _unsupported("extra_args", extra_args, "pass arguments to a rule by its name, in logits_rules")

    def _check_numbers(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            ranges.integer(name, getattr(self, name), low, high)
        for name, (low, high) in _OPTIONAL_INTEGERS.items():
            if (value := getattr(self, name)) is not None:
                ranges.integer(name, value, low, high)
        for name, (least, most) in _REALS.items():
            self._set(name, ranges.real(name, getattr(self, name), least, most))
        for name, most in POSITIVE.items():
            self._set(name, ranges.real(name, getattr(self, name), 0.0, most, open_low=True))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ranges.invalid(name, getattr(self, name), "it must be true or false")
        if 0.0 < self.temperature < 0.01:  # below this exp(logit / t) overflows; vLLM does the same
            self._set("temperature", 0.01)
        if self.truncate_prompt_tokens == 0:
            raise ranges.invalid("truncate_prompt_tokens", 0, "a prompt has at least one token")

    def _normalise_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", ranges.strings("stop", stop, MAX_STOP, MAX_STOP_LENGTH))
        self._set("stop_token_ids", ranges.token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        self._set("shown_token_ids", ranges.token_ids("shown_token_ids", self.shown_token_ids, MAX_STOP_IDS))
        breakers = ranges.strings("dry_sequence_breakers", self.dry_sequence_breakers, MAX_BREAKERS, MAX_BREAKER_LENGTH)
        self._set("dry_sequence_breakers", breakers)
        for name in ("thinking_start", "thinking_end", "thinking_close"):
            self._set(name, _tag(name, getattr(self, name)))
        for name in ("bad_words_ids", "dry_breaker_ids", "thinking_ids"):
            self._set(name, ranges.token_lists(name, getattr(self, name), MAX_BREAKER_IDS, MAX_BAD_WORD_LENGTH))
        words = ranges.strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
        for word in words:
            if word.isspace():
                raise ranges.invalid("bad_words", word, "there is no word in it")
        self._set("bad_words", words or None)
        if self.allowed_token_ids is not None:
            allowed = ranges.token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_IDS)
            self._set("allowed_token_ids", tuple(sorted(set(allowed))))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ranges.invalid("logit_bias", self.logit_bias, "it must map token ids to numbers")
            ranges.at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
            bias = {}
            for token, value in self.logit_bias.items():
                token = int(token) if isinstance(token, str) and token.isdecimal() else token
                ranges.integer("logit_bias", token, 0, MAX_ID)
                bias[token] = ranges.real("logit_bias", value, -100.0, 100.0)
            self._set("logit_bias", bias)

    def _normalise_rules(self, guided_decoding: object) -> None:
        if guided_decoding is not None:
            if self.structured_outputs is not None:
                raise ranges.invalid("guided_decoding", guided_decoding, "structured_outputs is given too")
            self._set("structured_outputs", _from_guided(guided_decoding))
        elif self.structured_outputs is not None:  # a recording has it as a mapping
            self._set("structured_outputs", StructuredOutputs.of(self.structured_outputs))
        if self.logits_rules is not None:
            rules = self.logits_rules
            if not isinstance(rules, Mapping) or not all(isinstance(name, str) and name for name in rules):
                raise ranges.invalid("logits_rules", rules, "it must map names of rules to their arguments")
            ranges.at_most("logits_rules", rules, MAX_RULES)
            self._set("logits_rules", ranges.as_json("logits_rules", dict(rules), MAX_RULE_ARGUMENTS) or None)
        functions = ranges.entries("logits_processors", self.logits_processors, MAX_RULES, "functions")
        for function in functions:
            if not callable(function):
                raise ranges.invalid("logits_processors", function, "it must be a function")
        self._set("logits_processors", functions or None)

    def _refuse_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ranges.invalid("min_tokens", self.min_tokens, f"it is above max_tokens = {self.max_tokens}")
        if self.allowed_token_ids is not None:
            bad = {ids[0] for ids in self.bad_words_ids if len(ids) == 1}
            if bad.issuperset(self.allowed_token_ids):
                why = "bad_words leave no token to draw" if self.allowed_token_ids else "no token could be drawn"
                raise ranges.invalid("allowed_token_ids", self.allowed_token_ids, why)
        if self.stop and not self.detokenize:
            raise ranges.invalid("stop", self.stop, "it is looked for in the text, and detokenize is false")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return replace(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def dry(self) -> bool:
        """DRY changes something."""
        return self.dry_multiplier > 0.0 and self.dry_penalty_last_n != 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)  # made so in __post_init__
        return self.stop


def _tag(name: str, value: str | Sequence[int] | None) -> str | tuple[int, ...] | None:
    """Text or token ids; only ``thinking_close`` may be empty."""
    if value is None or (name == "thinking_close" and not value):
        return None if value is None else ""
    if isinstance(value, str):
        return ranges.strings(name, (value,), 1, MAX_TAG_LENGTH)[0]
    return ranges.token_lists(name, (value,), 1, MAX_TAG_LENGTH)[0]


def _from_guided(guided: Any) -> StructuredOutputs | None:
    """vLLM's GuidedDecodingParams, as an object or as a mapping; it may ask for nothing."""
    given = dict(guided) if isinstance(guided, Mapping) else dict(getattr(guided, "__dict__", {}) or {})
    if not given and not isinstance(guided, Mapping):
        raise ranges.invalid("guided_decoding", guided, "it must be a mapping or have the fields of one")
    asked = {name: value for name, value in given.items() if value not in (None, False) and not name.startswith("_")}
    asked.pop("backend", None)  # there is one
    return StructuredOutputs.of(asked) if asked else None


def _unsupported(name: str, value: object, fix: str) -> InvalidRequest:
    why = f"it was {reprlib.repr(value)}"
    return InvalidRequest("unsupported_parameter", f"{name} is not in this build yet", why=why, fix=fix)
