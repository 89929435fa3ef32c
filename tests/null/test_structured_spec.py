"""StructuredOutputs: exactly one kind, bounded, hashable and plain enough to be sent."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base import InvalidRequest
from penstock.spec import SamplingParams, StructuredOutputs, ranges, structured
from penstock.spec.sampling import MAX_RULE_ARGUMENTS
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


LONG = MAX_GRAMMAR_CHARS + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"description": "[" * LONG}},
        {"json": {"[" * LONG: 1}},
        {"json": {"enum": [1] * LONG}},
        {"json": '{"description": "' + "[" * LONG + '"}'},
        {"structural_tag": {"structures": [{"begin": "[" * LONG, "schema": {}, "end": ""}]}},
    ],
    ids=range(5),
)
def test_what_is_too_long_is_refused_before_it_is_read_or_written(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "json", None)
    with pytest.raises(InvalidRequest, match="too long") as caught:
        StructuredOutputs(**fields)
    assert caught.value.code == "invalid_parameter"


def test_arguments_of_rules_that_are_too_long_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "json", None)
    with pytest.raises(InvalidRequest, match="invalid_parameter"):
        SamplingParams(logits_rules={"a": "[" * MAX_RULE_ARGUMENTS})


def steps(work: Callable[[], object]) -> int:
    """Instructions of Python that it takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, count = True, count + (event == "opcode")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", ["json", "text", "regex", "grammar", "choice", "structural_tag"])
def test_no_character_is_looked_at_on_its_own(kind: str) -> None:
    def fields(length: int) -> dict[str, Any]:
        text = "[é{" * length
        schema = {"description": text, "enum": [text]}
        structures = [{"begin": text, "schema": schema, "end": text}]
        return {
            "json": {"json": schema},
            "text": {"json": json.dumps(schema)},
            "regex": {"regex": text},
            "grammar": {"grammar": text},
            "choice": {"choice": [text, text]},
            "structural_tag": {"structural_tag": {"structures": structures, "triggers": [text]}},
        }[kind]

    short, long = fields(1), fields(1000)
    few, many = steps(lambda: StructuredOutputs(**short)), steps(lambda: StructuredOutputs(**long))
    assert 0 < many < few + 3000  # an instruction for each character would be more; what the collector ends counts too


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=9,
)


def depth(value: object) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(value=VALUES, most=st.integers(0, 40))
def test_an_extent_is_that_of_the_text_as_far_as_it_is_looked_at(value: Any, most: int) -> None:
    chars = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    deep, least = ranges.extent(value, 1 << 20)
    assert deep == depth(value) and least <= chars
    assert (ranges.extent(value, most)[1] > most) == (least > most)
    assert (ranges.extent(value, 1 << 20, most)[0] > most) == (deep > most)


def test_an_extent_that_has_no_end_is_not_looked_at_to_its_end() -> None:
    value: list[Any] = [0]
    for _ in range(100):
        value = [value] * 10
    assert ranges.extent(value, 1 << 10)[1] > 1 << 10
    loop: list[Any] = []
    loop.append({"a": loop})
    assert ranges.extent(loop, 1 << 10, 5)[0] == 6 and ranges.extent(loop, 1 << 10)[1] > 1 << 10


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
