"""StructuredOutputs: exactly one kind, bounded, hashable and plain enough to be sent."""

import json
from dataclasses import asdict

import pytest

from penstock.base import InvalidRequest
from penstock.spec import SamplingParams, StructuredOutputs
from penstock.spec.structured import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_SCHEMA_DEPTH


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "invalid_parameter"),
        ({"regex": "a", "choice": ["a"]}, "invalid_parameter"),
        ({"json_object": False}, "invalid_parameter"),
        ({"json_object": 3}, "invalid_parameter"),
        ({"regex": False}, "invalid_parameter"),
        ({"json": False, "regex": "a"}, "invalid_parameter"),
        ({"regex": ""}, "invalid_parameter"),
        ({"regex": 7}, "invalid_parameter"),
        ({"regex": "\ud800"}, "invalid_parameter"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "invalid_parameter"),
        ({"choice": []}, "invalid_parameter"),
        ({"choice": "ab"}, "invalid_parameter"),
        ({"choice": ["a", 1]}, "invalid_parameter"),
        ({"choice": [""]}, "invalid_parameter"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "invalid_parameter"),
        ({"grammar": b"start: x"}, "invalid_parameter"),
        ({"regex": "a", "disable_any_whitespace": 1}, "invalid_parameter"),
        ({"structural_tag": "{}"}, "invalid_parameter"),
        ({"structural_tag": {"structures": [{"begin": "a"}]}}, "invalid_parameter"),
        ({"json": "{"}, "invalid_schema"),
        ({"json": "[]"}, "invalid_schema"),
        ({"json": "1"}, "invalid_schema"),
        ({"json": {"a": {1, 2}}}, "invalid_schema"),
        ({"json": {"minimum": float("nan")}}, "invalid_schema"),
        ({"json": '{"items":' * (MAX_SCHEMA_DEPTH + 1) + "{}" + "}" * (MAX_SCHEMA_DEPTH + 1)}, "invalid_schema"),
        ({"json": '{"a":' * 100_000}, "invalid_schema"),
        ({"json": '{"pattern": "\\ud800"}'}, "invalid_parameter"),
    ],
)
def test_bad_values_are_named(fields: dict[str, object], code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(**fields)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_a_schema_with_a_cycle_is_refused() -> None:
    schema: dict[str, object] = {}
    schema["items"] = schema
    with pytest.raises(InvalidRequest, match="invalid_schema"):
        StructuredOutputs(json=schema)


def test_brackets_in_strings_are_not_depth() -> None:
    assert StructuredOutputs(json={"const": '[{"\\' * 500}).kind == "json"


def test_a_boolean_is_a_schema() -> None:
    assert StructuredOutputs(json=False).json == "false" and StructuredOutputs.of({"json": True}).json == "true"
    assert StructuredOutputs(json_object=False, json=True).kind == "json"


def test_values_are_plain_and_equal_after_a_round_trip() -> None:
    for fields in ({"json": {"a": [1]}}, {"choice": ["x", "y"]}, {"regex": "a"}, {"json_object": True}):
        wanted = StructuredOutputs(**fields)  # type: ignore[arg-type]
        sent = json.loads(json.dumps(asdict(wanted)))
        assert StructuredOutputs.of(sent) == wanted and hash(StructuredOutputs.of(sent)) == hash(wanted)
    assert StructuredOutputs.of(wanted) is wanted
    with pytest.raises(InvalidRequest):
        StructuredOutputs.of({"jsn": {}})


def test_sampling_params_carry_it() -> None:
    wanted = StructuredOutputs(choice=["a"])
    assert SamplingParams(structured_outputs=wanted).structured_outputs == wanted
    assert SamplingParams().structured_outputs is None
