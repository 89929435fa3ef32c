"""Structures in a text: what the form admits, and that parsers read back whatever it admits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import toytext
from penstock.base import InvalidRequest
from penstock.grammar import Grammars, TokenTable
from penstock.spec import SamplingParams, StructuredOutputs
from penstock.text import Completion
from penstock.text.parsers.described import described, write_calls
from penstock.text.parsers.hermes import SHAPE
from penstock.text.parsers.tagged import GLM

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
HERMES = [{"begin": '<tool_call>\n{"name": "f", "arguments": ', "schema": SCHEMA, "end": "}\n</tool_call>"}]
BARE = [{"begin": '{"name": "f", "arguments": ', "schema": SCHEMA, "end": "}"}]
ONE, BAD = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>', "<tool_call>\nno"
PLAIN = '{"name": "f", "arguments": {"a": 3}}'
THOUGHTS = {"start": ["<think>"], "end": ["</think>"]}
FREE = {"structures": HERMES, "triggers": ["<tool_call>"]}
FORCED = FREE | {"at_least": 1}
ANSWER = {"type": "object", "required": ["x"]}
FIELDS = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "n": {"$ref": "#/$defs/n"},
        "e": {"enum": ["x", "y"]},
        "l": {"type": "string", "minLength": 2, "maxLength": 3},
        "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["s", "n"],
    "$defs": {"n": {"type": "integer"}},
}
TAGGED = {
    "structures": [
        {"begin": "<tool_call>f\n", "schema": FIELDS, "end": "</tool_call>", "field": ["<@{key}>", "</v>\n"]}
    ],
    "triggers": ["<tool_call>"],
}


def tagged(inner: str) -> str:
    return f"<tool_call>f\n<@s>a<b</v>\n<@n>3</v>\n{inner}</tool_call>"


LIST = {"structures": BARE, "triggers": ["[INST]"], "first": "[INST][", "between": ", ", "last": "]"}
"""[INST] is a special token."""


@cache
def grammars() -> Grammars:
    tokenizer = toytext.byte_level()
    vocabulary = tokenizer.vocabulary
    texts = [tokenizer.token_bytes(i) for i in range(vocabulary.size)]
    return Grammars(lambda: TokenTable(texts, tokenizer.special_tokens.values(), vocabulary.eos_ids))


def admits(tags: dict[str, Any], text: str) -> bool:
    """As a whole."""
    matcher = grammars().compile(StructuredOutputs(structural_tag=tags)).tokens.deep_copy()
    ids = toytext.byte_level().encode(text, add_special_tokens=False)
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("tags", "good", "bad"),
    [
        (FREE, ["", "hi", f"hi {ONE}", f"{ONE} and {ONE}."], [BAD, f"hi {BAD}", ONE.replace("3", '"3"'), ONE[:-1]]),
        (FREE | {"at_most": 1}, ["hi", f"hi {ONE}"], [ONE + ONE, f"{ONE} more"]),
        (FREE | {"at_least": 1, "between": "\n"}, [ONE, f"{ONE}\n{ONE}"], ["", "hi", f"hi {ONE}", ONE + ONE]),
        (FREE | {"at_least": 1, "at_most": 1}, [ONE], [f"{ONE}\n{ONE}"]),
        (FREE | {"thoughts": THOUGHTS}, [f"<think>a</think>\n\n{ONE}", "hi"], [f"<think>a</think>{BAD}"]),
        (
            FREE | {"at_least": 1, "thoughts": THOUGHTS | {"opened": True}},
            [f"hm</think>\n{ONE}"],
            [ONE, "hm</think>hi"],
        ),
        (LIST, ["hi", f"a[INST][{PLAIN}, {PLAIN}]", f"[INST][{PLAIN}]b"], ["[INST]", f"[INST]{PLAIN}", "[INST][]"]),
        (
            TAGGED | {"at_least": 1},
            [
                tagged(""),
                tagged("<@e>y</v>\n"),
                tagged("<@l>abc</v>\n"),
                tagged("<@o>\n</v>\n"),
                tagged("<@e>x</v>\n<@l></v</v>\n"),
            ],
            [
                "",
                tagged("<@e>z</v>\n"),
                tagged("<@l>a</v>\n"),
                tagged("<@l>abcd</v>\n"),
                tagged("x"),
                tagged("").replace("3", "a"),
                tagged("<@o>a</v>\n<@e>x</v>\n"),
                tagged("").replace("<@s>a<b</v>\n", ""),
            ],
        ),
        (TAGGED, ["hi", f"hi{tagged('')} there"], ["<tool_call>no"]),
        (
            {"structures": [TAGGED["structures"][0] | {"schema": {"type": "object"}}], "at_least": 1},
            ["<tool_call>f\n</tool_call>", "<tool_call>f\n<@a>b</v>\n<@c>d</v>\n</tool_call>"],
            ["<tool_call>f\n<@a>b</tool_call>"],
        ),
        (FREE | {"triggers": [], "says": "[INST]"}, [ONE, "[INST]hi"], ["hi", "", f"[INST]{BAD}[INST]"]),
        (
            FREE | {"triggers": [], "says": "[INST]", "answer": ANSWER},
            [ONE, '[INST]{"x": 1}'],
            ['{"x": 1}', "[INST]hi"],
        ),
        (
            {"structures": [], "thoughts": THOUGHTS, "says": "[INST]", "answer": ANSWER},
            ['[INST]{"x": 1}', '<think>{"y"</think>\n[INST]{"x": 1}'],
            ["", "hi", '{"x": 1}', "[INST]hi", '<think>{"x": 1}', '<think>a</think>{"x": 1}'],
        ),
        (
            {"structures": [], "thoughts": THOUGHTS | {"opened": True}, "answer": ANSWER},
            ['a</think>{"x": 1}'],
            ['{"x": 1}', 'a</think>{"y": 1}'],
        ),
        ({"structures": BARE}, ["", "hi", PLAIN, PLAIN * 2, "a {}"], ['{"x": 1}', "[1]", " hi"]),
        ({"structures": BARE, "between": "; "}, [f"{PLAIN}; {PLAIN}"], [PLAIN * 2]),
        (
            {"structures": BARE, "answer": {"required": ["x"], "type": "object"}},
            [PLAIN, '{"x": 1}'],
            ["hi", '{"y": 1}'],
        ),
    ],
)
def test_what_is_admitted(tags: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not admits(tags, text)] == []
    assert [text for text in bad if admits(tags, text)] == []


def test_many_large_tools_are_no_deep_grammar() -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "([{:"} for i in range(40)}}
    many = [{"begin": f"<tool_call>f{i}", "schema": wide, "end": "</tool_call>"} for i in range(40)]
    assert admits({"structures": many, "at_least": 1}, '<tool_call>f7{"p3": "x"}</tool_call>')


@pytest.mark.parametrize(
    ("schema", "code"),
    [({"not": {"required": ["a"]}}, "unsupported_schema"), ({"$ref": "#"}, "infinite_schema"),
     ({"properties": {str(i): {} for i in range(2001)}}, "grammar_too_large")],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_is_refused(schema: Any, code: str) -> None:
    tags = {"structures": [{"begin": "x", "schema": schema, "end": ""}], "at_least": 1}
    with pytest.raises(InvalidRequest) as refused:
        grammars().compile(StructuredOutputs(structural_tag=tags))
    assert refused.value.code == code


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": []},
        {"required": ["a"]},
        {"properties": {"a>\n": {}}},
        {"properties": {"a": {"type": "string", "pattern": "x"}}},
        {"properties": {"a": {"enum": ["x", 1]}}},
        {"properties": {"a": {"const": "</v>\n"}}},
        {"properties": {"a": {"enum": 1}}},
        {"properties": {"a": {"type": {}}}},
        {"properties": {"a": {"type": "string", "maxLength": 10**9}}},
        {"properties": {"a": {"type": "string", "minLength": "1"}}},
        {"properties": {"a": False}, "required": ["a"]},
        {"properties": []},
        {"required": 1},
        {"properties": {"a": {}}, "required": [["a"]]},
        False,
    ],
)
def test_what_a_plain_text_cannot_be_held_to_is_refused(schema: Any) -> None:
    tags = {"structures": [TAGGED["structures"][0] | {"schema": schema}], "at_least": 1}
    with pytest.raises(InvalidRequest, match="A schema of these tools cannot be compiled") as refused:
        grammars().compile(StructuredOutputs(structural_tag=tags))
    assert refused.value.code == "unsupported_schema"


def test_references_cannot_be_moved() -> None:
    refers = {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    structures = [BARE[0] | {"schema": refers}]
    assert admits({"structures": structures}, PLAIN)
    with pytest.raises(InvalidRequest, match=r"\$ref in a tool"):
        grammars().compile(StructuredOutputs(structural_tag={"structures": structures, "answer": ANSWER}))


def test_a_structure_needs_a_trigger() -> None:
    with pytest.raises(InvalidRequest, match="no structure begins with a trigger"):
        grammars().compile(StructuredOutputs(structural_tag={"structures": BARE, "triggers": ["<x>"]}))


def test_special_tokens_are_shown_where_it_is_said() -> None:
    tokenizer = toytext.byte_level()
    ids = tokenizer.encode("a[INST]b<|im_end|>", add_special_tokens=False)
    for shown, text in (((), "ab"), ((tokenizer.special_tokens["[INST]"],), "a[INST]b")):
        completion = Completion(0, SamplingParams(shown_token_ids=shown), tokenizer)
        assert completion.extend(ids, finish_reason="length").text == text


def test_tools_are_told_to_templates_that_do_not_read_them() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 3}'}}
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "So.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "tool", "tool_call_id": "2", "content": "8"},
    ]
    told = described(history, [tool], SHAPE)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n") and '"name": "f"' in told[0]["content"]
    assert told[2]["content"] == f"So.\n{ONE}" and told[3]["content"] == "f returned: 7\nThe function returned: 8"
    assert described(history[1:2], [tool], SHAPE)[0]["role"] == "system"
    assert described(history[:2], [], SHAPE) == history[:2]
    assert write_calls(SHAPE, [("f", {"a": 3})]) == ONE
    assert write_calls(GLM, [("f", '{"a": 3, "b": "c"}'), ("g", None)]) == (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n"
        "<arg_key>b</arg_key>\n<arg_value>c</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>"
    )
