"""SamplingParams: what it refuses and how, what it makes of its lists, and that a recording gives it back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import SamplingParams
from penstock.base import ConfigError, InvalidRequest
from penstock.spec import StructuredOutputs
from penstock.spec.rule_places import rule_places


class OutputKind(Enum):
    """As vLLM's."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 2),
    "output_kind": (None, 0, OutputKind.CUMULATIVE),
    "extra_args": (None, {}),
    "guided_decoding": (None, {}, {"json": None, "backend": "xgrammar"}, SimpleNamespace(json=None, regex=None)),
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1, 3),
    "output_kind": (2, OutputKind.DELTA),
    "extra_args": ({"a": 1},),
}


def refusal(**keywords: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**keywords)
    return error.value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_a_keyword_that_asks_for_nothing_is_accepted_and_not_kept(name: str, value: Any) -> None:
    plain = SamplingParams(n=2, seed=1)
    params = SamplingParams(n=2, seed=1, **{name: value})
    assert params == plain and repr(params) == repr(plain) and asdict(params) == asdict(plain)
    assert name not in asdict(params)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(n=2, **{name: value})
    assert error.code == "unsupported_parameter"
    assert error.what == f"{name} is not in this build yet" and error.fix


EVERYTHING: dict[str, Any] = {
    "n": 3,
    "typical_p": 0.5,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": ["\n", "--"],
    "stop": "a",
    "stop_token_ids": [1],
    "logit_bias": {5: 1},
    "allowed_token_ids": [9, 2, 9],
    "bad_words": ["bad word"],
    "bad_words_ids": [[1, 2], [3]],
    "dry_breaker_ids": [[4], [5, 6]],
    "logits_rules": {"mine": {"a": (1, 2), "b": None}, "other": 5},
    "structured_outputs": StructuredOutputs(regex="[ab]*"),
    "truncate_prompt_tokens": -1,
    "prompt_logprobs": 0,
    "thinking_budget": 7,
    "min_tokens": 2,
}


def test_a_recording_gives_the_same_parameters() -> None:
    for params in (SamplingParams(**EVERYTHING), SamplingParams()):
        read = SamplingParams(**json.loads(json.dumps(asdict(params))))
        assert read == params and repr(read) == repr(params)


def test_clone_and_replace() -> None:
    params = SamplingParams(**EVERYTHING, best_of=3)
    copy = params.clone()
    assert copy == params and copy is not params and copy.logit_bias is not params.logit_bias
    assert replace(params, n=1, bad_words=None) == SamplingParams(**{**EVERYTHING, "n": 1, "bad_words": None})
    with pytest.raises(InvalidRequest, match="extra_args"):
        replace(params, extra_args={"x": 1})


def test_functions_are_kept_and_not_shown() -> None:
    params = SamplingParams(logits_processors=[max])
    assert params.logits_processors == (max,) and "logits_processors" not in repr(params)
    assert SamplingParams(logits_processors=[]) == SamplingParams()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stop": 5}, "stop = 5 cannot be used: it must be a list of strings"),
        ({"stop": 0}, "stop = 0 cannot be used: it must be a list of strings"),
        ({"stop": b"a"}, "stop = b'a' cannot be used: it must be a list of strings"),
        ({"stop": ["a", 5]}, "stop = 5 cannot be used: it must be a string"),
        ({"stop": ""}, "stop = '' cannot be used: it has 0 characters, not 1 to 1024"),
        ({"stop": "x" * 1025}, "stop = 'xxxxxxxxxxxx...xxxxxxxxxxxxx' cannot be used: it has 1025 characters"),
        ({"stop": ["a"] * 65}, "cannot be used: it has 65 entries, at most 64 are allowed"),
        ({"stop_token_ids": 5}, "stop_token_ids = 5 cannot be used: it must be a list of token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids = '12' cannot be used: it must be a list of token ids"),
        ({"stop_token_ids": {1: 2}}, "stop_token_ids = {1: 2} cannot be used"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids = 'a' cannot be used: it must be an integer"),
        ({"stop_token_ids": [True]}, "stop_token_ids = True cannot be used: it must be an integer"),
        ({"stop_token_ids": [1] * 1025}, "it has 1025 entries, at most 1024 are allowed"),
        ({"logit_bias": [1]}, "logit_bias = [1] cannot be used: it must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "it has 1025 entries, at most 1024 are allowed"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids = -1 cannot be used: it must be an integer from 0"),
        ({"bad_words": "bad"}, "bad_words = 'bad' cannot be used: it must be a list of strings"),
        ({"bad_words": [" \n"]}, "bad_words = ' \\n' cannot be used: there is no word in it"),
        ({"bad_words_ids": [1]}, "bad_words_ids = 1 cannot be used: it must be a list of token ids"),
        ({"bad_words_ids": [[1], []]}, "a list in it is empty"),
        ({"dry_sequence_breakers": "\n"}, "it must be a list of strings"),
        ({"dry_sequence_breakers": ["x" * 41]}, "it has 41 characters, not 1 to 40"),
        ({"logits_rules": ["mine"]}, "logits_rules = ['mine'] cannot be used: it must map names of rules"),
        ({"logits_rules": {"": 1}}, "it must map names of rules to their arguments"),
        ({"logits_rules": {"a": {1, 2}}}, "it cannot be written as JSON"),
        ({"logits_rules": {"a": float("nan")}}, "it cannot be written as JSON"),
        ({"logits_rules": {"a": "x" * 70_000}}, "at most 65536 are allowed"),
        ({"logits_processors": max}, "it must be a list of functions"),
        ({"logits_processors": [5]}, "logits_processors = 5 cannot be used: it must be a function"),
        ({"guided_decoding": 5}, "guided_decoding = 5 cannot be used"),
    ],
)  # fmt: skip
def test_lists_are_refused_with_their_numbers(keywords: dict[str, Any], message: str) -> None:
    error = refusal(**keywords)
    assert error.code == "invalid_parameter" and message in str(error)
    assert error.what.startswith(f"{next(iter(keywords))} = ") and len(str(error)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.0), ("typical_p", 1.1), ("dry_multiplier", -1), ("dry_base", 0.5), ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("logprobs", -2),
        ("prompt_logprobs", 129), ("detokenize", None), ("detokenize", 1), ("thinking_budget", -1),
        ("skip_special_tokens", "no"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_themselves(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.code == "invalid_parameter" and error.what.startswith(f"{name} = ")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens = 5 cannot be used: it is above max_tokens = 4"),
        ({"allowed_token_ids": []}, "allowed_token_ids = () cannot be used: no token could be drawn"),
        (
            {"allowed_token_ids": [1, 2], "bad_words_ids": [[1], [2], [3]]},
            "allowed_token_ids = (1, 2) cannot be used: bad_words leave no token to draw",
        ),
        ({"stop": "a", "detokenize": False}, "stop = ('a',) cannot be used: it is looked for in the text"),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": StructuredOutputs(regex="a")},
            "cannot be used: structured_outputs is given too",
        ),
    ],
)
def test_contradictions_are_refused(keywords: dict[str, Any], message: str) -> None:
    error = refusal(**keywords)
    assert error.code == "invalid_parameter" and message in str(error)
    assert SamplingParams(allowed_token_ids=[1, 2], bad_words_ids=[[1], [2, 2]]).allowed_token_ids == (1, 2)


def test_guided_decoding_is_the_former_name_of_structured_outputs() -> None:
    expected = SamplingParams(structured_outputs=StructuredOutputs(choice=["a", "b"]))
    given = {"choice": ["a", "b"], "json": None, "backend": "auto", "_internal": 1}
    assert SamplingParams(guided_decoding=given) == expected
    assert SamplingParams(guided_decoding=SimpleNamespace(**given)) == expected
    assert SamplingParams(structured_outputs={"choice": ["a", "b"]}) == expected  # type: ignore[arg-type]


def test_lists_may_come_in_any_form() -> None:
    params = SamplingParams(stop=("a", "b"), stop_token_ids=range(3), logit_bias={"7": 1})  # type: ignore[dict-item]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (0, 1, 2), {7: 1.0})
    assert SamplingParams(stop=[], stop_token_ids=()) == SamplingParams()
    assert SamplingParams(bad_words=[], bad_words_ids=[], logits_rules={}) == SamplingParams()
    assert len(SamplingParams(stop=["a"] * 64, stop_token_ids=[1] * 1024).stop_strings) == 64
    assert SamplingParams(allowed_token_ids=[5, 1, 5]).allowed_token_ids == (1, 5)


def test_long_lists_are_checked_fast() -> None:
    """A long DRY breaker list is made once and copied with every request."""
    ids = [[i] for i in range(100_000)]
    params = SamplingParams(dry_breaker_ids=ids, allowed_token_ids=range(500_000))
    assert params.dry_breaker_ids[99_999] == (99_999,) and len(params.allowed_token_ids or ()) == 500_000
    with pytest.raises(InvalidRequest, match="dry_breaker_ids = True"):
        SamplingParams(dry_breaker_ids=[*ids, [True]])


def test_places_of_rules() -> None:
    assert list(rule_places(" a=pkg.mod:make , pkg:other,")) == [("a", "pkg.mod", "make"), ("other", "pkg", "other")]
    assert list(rule_places(None)) == []
    for option in ("pkg", "pkg:", ":make", "a=b=c:d", "pkg:a.b", "../x:y"):
        with pytest.raises(ConfigError, match="cannot be used"):
            list(rule_places(option))
