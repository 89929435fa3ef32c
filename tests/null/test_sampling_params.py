"""SamplingParams: what it refuses and how it says so, and vLLM's keywords that it only checks."""

from __future__ import annotations

from dataclasses import InitVar, asdict, fields, replace
from typing import Any, get_type_hints

import pytest

from penstock import SamplingParams
from penstock.base import InvalidRequest
from penstock.spec import sampling

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "prompt_logprobs": (None,),
    "bad_words": (None, []),
    "best_of": (None, 2),
    "logits_processors": (None, []),
    "allowed_token_ids": (None, []),
    "truncate_prompt_tokens": (None,),
    "output_kind": (None,),
    "extra_args": (None, {}),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
}
REFUSED: dict[str, tuple[Any, ...]] = {
    "detokenize": (False,),
    "spaces_between_special_tokens": (False,),
    "prompt_logprobs": (0, 5),
    "bad_words": (["bad"],),
    "best_of": (1, 3),
    "logits_processors": ([print],),
    "allowed_token_ids": ([1, 2],),
    "truncate_prompt_tokens": (-1, 8),
    "output_kind": (2,),
    "extra_args": ({"a": 1},),
    "structured_outputs": ({"regex": "a"},),
    "guided_decoding": ({"regex": "a"},),
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
    assert name not in repr(params) and name not in asdict(params)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(n=2, **{name: value})
    assert error.code == "unsupported_parameter"
    assert error.what == f"{name} is not in this build yet"


def test_every_keyword_is_declared_as_in_the_table() -> None:
    """Else a value would be held against another keyword's."""
    declared = [name for name, kind in get_type_hints(SamplingParams).items() if isinstance(kind, InitVar)]
    assert declared == list(sampling._NOT_YET) == list(NEUTRAL) == list(REFUSED)
    assert {name: getattr(SamplingParams, name) for name in declared} == sampling._NOT_YET
    assert not {field.name for field in fields(SamplingParams)} & set(declared)


def test_a_recording_gives_the_same_parameters() -> None:
    params = SamplingParams(n=3, stop="a", stop_token_ids=[1], logit_bias={5: 1}, detokenize=True)
    assert SamplingParams(**asdict(params)) == params


def test_clone_and_replace() -> None:
    params = SamplingParams(n=2, best_of=2, stop=["a"], logit_bias={1: 2.0})
    copy = params.clone()
    assert copy == params and copy is not params and copy.logit_bias is not params.logit_bias
    assert replace(params, n=3) == SamplingParams(n=3, stop=["a"], logit_bias={1: 2.0})
    with pytest.raises(InvalidRequest, match="bad_words"):
        replace(params, bad_words=["x"])


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
        ({"stop_token_ids": [1] * 1025}, "it has 1025 entries, at most 1024 are allowed"),
        ({"logit_bias": [1]}, "logit_bias = [1] cannot be used: it must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "it has 1025 entries, at most 1024 are allowed"),
    ],
)
def test_lists_are_refused_with_their_numbers(keywords: dict[str, Any], message: str) -> None:
    error = refusal(**keywords)
    assert error.code == "invalid_parameter" and message in str(error)
    assert error.what.startswith(f"{next(iter(keywords))} = ") and len(str(error)) < 300


def test_lists_may_come_in_any_form() -> None:
    params = SamplingParams(stop=("a", "b"), stop_token_ids=range(3), logit_bias={"7": 1})  # type: ignore[dict-item]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (0, 1, 2), {7: 1.0})
    assert SamplingParams(stop=[], stop_token_ids=()) == SamplingParams()
    assert len(SamplingParams(stop=["a"] * 64, stop_token_ids=[1] * 1024).stop_strings) == 64
