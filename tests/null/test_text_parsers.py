"""Parsers of calls and thoughts: the same events wherever the text is cut, no character lost, only calls that parse."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toytext
from penstock.base import ConfigError
from penstock.text import ChatTemplate
from penstock.text.parsers import (
    CALL_FORMATS,
    THOUGHT_FORMATS,
    Arguments,
    CallDropped,
    CallEnd,
    CallStart,
    Content,
    Event,
    Formats,
    Parser,
    Reasoning,
    formats_of,
    merged,
)
from penstock.text.parsers.jsontext import JsonText
from penstock.text.parsers.output import Machine, Output

TOOLS = ("get_weather", "add", "search-web")
TEXTS = 200
Call = tuple[str, str]
"""Name, and arguments as they are written."""


def parser(name: str, thoughts: str | None = None, *, opened: bool | None = None) -> Parser:
    """With ids that are numbers."""
    ids = itertools.count()
    tools = CALL_FORMATS.get(name)
    machine = Machine(tools.steps, Output(TOOLS, lambda: f"id{next(ids)}"))
    if thoughts is None:
        return machine
    split = Formats(None, THOUGHT_FORMATS.get(thoughts)).parser((), opened=opened)
    split._rest = machine  # type: ignore[attr-defined]
    return split


def read(make: Callable[[], Parser], pieces: Sequence[str]) -> list[Event]:
    reader = make()
    events = [event for piece in pieces for event in reader.feed(piece)]
    return merged(events + reader.finish())


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def thoughts(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Reasoning))


def calls(events: Sequence[Event]) -> list[Call]:
    """Those that ended well."""
    names = {event.index: event.name for event in events if isinstance(event, CallStart)}
    ended = [event.index for event in events if isinstance(event, CallEnd)]
    return [(names[i], "".join(e.text for e in events if isinstance(e, Arguments) and e.index == i)) for i in ended]


# -- texts of each format --------------------------------------------------------------------------------------------

Written = Callable[[random.Random, list[Call]], str]


def body(rng: random.Random, call: Call, key: str) -> str:
    """A call as an object, its members in either order, with members that mean nothing in between."""
    members = [f'"name":{rng.choice(["", " "])}"{call[0]}"', f'"{key}": {call[1]}']
    if rng.random() < 0.2:
        members.reverse()
    if rng.random() < 0.2:
        members.insert(rng.randrange(3), '"type": "function"')
    return "{" + rng.choice([", ", ",\n "]).join(members) + "}"


def hermes(rng: random.Random, made: list[Call]) -> str:
    gap = rng.choice(["\n", ""])
    return gap.join(f"<tool_call>{gap}{body(rng, call, 'arguments')}\n</tool_call>" for call in made)


def listed(rng: random.Random, made: list[Call]) -> str:
    return "[" + rng.choice([", ", ","]).join(body(rng, call, "arguments") for call in made) + "]"


def row(between: str, key: str) -> Written:
    return lambda rng, made: between.join(body(rng, call, key) for call in made)


def fields(begin: str, end: str, *, newline: str = "\n") -> Callable[[Call], str]:
    """Arguments on their own."""

    def text(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def written(call: Call) -> str:
        given = json.loads(call[1]).items()
        return "".join(f"{begin.format(key=key)}{text(value)}{end}{newline}" for key, value in given)

    return written


def qwen3_coder(rng: random.Random, made: list[Call]) -> str:
    opened, closed = rng.choice([("<tool_call>\n", "\n</tool_call>"), ("", ""), ("", "\n</tool_call>")])
    inner = fields("<parameter={key}>\n", "\n</parameter>", newline=rng.choice(["\n", ""]))
    return "\n".join(f"{opened}<function={call[0]}>\n{inner(call)}</function>{closed}" for call in made)


def glm(rng: random.Random, made: list[Call]) -> str:
    gap = rng.choice(["\n", ""])
    inner = fields("<arg_key>{key}</arg_key>" + gap + "<arg_value>", "</arg_value>", newline=gap)
    return gap.join(f"<tool_call>{call[0]}{gap}{inner(call)}</tool_call>" for call in made)


def harmony(rng: random.Random, made: list[Call]) -> str:
    heads = [
        "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>",
        " to=functions.{}<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.{}<|message|>",
    ]
    written = [rng.choice(heads).format(name) + arguments for name, arguments in made]
    return f"{rng.choice(['<|call|>', '<|end|>'])}<|start|>assistant".join(written) + rng.choice(["<|call|>", ""])


WRITTEN: dict[str, list[Written]] = {
    "hermes": [hermes],
    "llama3": [row("; ", "parameters"), lambda rng, made: "<|python_tag|>" + row(";", "parameters")(rng, made)],
    "granite": [
        lambda rng, made: "<|tool_call|>" + listed(rng, made),
        lambda rng, made: "<tool_call>" + listed(rng, made),
    ],
    "mistral": [
        lambda rng, made: "[TOOL_CALLS]" + rng.choice(["", " "]) + listed(rng, made),
        lambda rng, made: "".join(f"[TOOL_CALLS]{name}{arguments}" for name, arguments in made),
        lambda rng, made: "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in made),
        lambda rng, made: "".join(f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{args}" for name, args in made),
    ],
    "json": [row("\n", "arguments"), row("", "parameters"), listed],
    "qwen3_coder": [qwen3_coder],
    "glm": [glm],
    "harmony": [harmony],
}
WRITTEN["mistral_args"] = WRITTEN["mistral"]
TAGGED = ("qwen3_coder", "glm")
ANYWHERE = ("hermes", "granite", "mistral", "mistral_args", *TAGGED)
"""Formats whose calls may come after content."""

WORDS = [
    "I will look.", "x < y", "<tool", "</tool_call>", "<|", "[TOOL", "{", "}", '{"name"', "[ARGS]", "null",
    "naïve 日本 🙂", "a\n\nb", '"', "\\", "<", "[", "\t", '{"name": "add"}', "<think>", "; ,",
    "<function=", "</parameter>", "<arg_key>", "<|start|>", "<|channel|>", "<|message|>", "to=",
]  # fmt: skip
VALUES: list[object] = [{}, {"city": "Paris"}, {"a": [1, -2.5e3, None]}, {"s": 'q"\\\n é🙂 </tool_call>]}'},
                        {"o": {"p": [[], {}]}}, {"name": "add", "arguments": {"a": "}"}}]  # fmt: skip


def some_calls(rng: random.Random) -> list[Call]:
    def arguments() -> str:
        return json.dumps(rng.choice(VALUES), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1]))

    return [(rng.choice(TOOLS), arguments()) for _ in range(rng.choice([1, 1, 1, 2]))]


def good(name: str, rng: random.Random) -> tuple[str, str, list[Call]]:
    """A text with calls, its content, and they."""
    made = some_calls(rng)
    if name in TAGGED:  # there is one way to write a value
        made = [(tool, json.dumps(json.loads(given), ensure_ascii=False)) for tool, given in made]
    before = rng.choice(["", "Let me see.", "Let me see: é"]) if name in ANYWHERE else ""
    gap = rng.choice(["", "\n", " \n\n"])
    return before + gap + rng.choice(WRITTEN[name])(rng, made) + rng.choice(["", "\n"]), before, made


def damaged(name: str, rng: random.Random) -> str:
    """A text with calls that was cut, or from which something was taken, or to which something was added."""
    text = good(name, rng)[0]
    at = rng.randrange(len(text))
    match rng.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[at + 1 :]
        case 2:
            return text[:at] + rng.choice(WORDS) + text[at:]
    return " ".join(rng.choice([*WORDS, text]) for _ in range(rng.randrange(1, 5)))


def all_texts(name: str, count: int = TEXTS) -> list[str]:
    rng = random.Random(name)
    return [good(name, rng)[0] if i % 2 else damaged(name, rng) for i in range(count)]


# -- what holds ------------------------------------------------------------------------------------------------------


LONG = (*TAGGED, "harmony")
CUTS = [(name, TEXTS // 5 if name in LONG else TEXTS) for name in CALL_FORMATS]


@pytest.mark.parametrize(
    ("name", "count"), [*CUTS, *(pytest.param(name, TEXTS, marks=pytest.mark.slow) for name in LONG)]
)
def test_wherever_the_text_is_cut_in_two(name: str, count: int) -> None:
    for text in all_texts(name, count):
        whole = read(lambda: parser(name), [text])
        for at in range(1, len(text)):
            assert read(lambda: parser(name), [text[:at], text[at:]]) == whole, (text, at)
        assert read(lambda: parser(name), list(text)) == whole


@pytest.mark.parametrize("thinks", list(THOUGHT_FORMATS))
def test_wherever_thoughts_are_cut_in_two(thinks: str) -> None:
    rng, tags = random.Random(thinks), THOUGHT_FORMATS.get(thinks)
    for i in range(TEXTS // 4 if tags.channels else TEXTS):
        start, end = (
            (tags.starts[0], tags.ends[0]) if i % 3 else (rng.choice(["", "\n"]), rng.choice(["", tags.ends[-1]]))
        )
        said = rng.choice([*WORDS, '<tool_call>{"name": "add"}'])
        text = start + rng.choice(["\n", " ", ""]) + rng.choice(WORDS) + rng.choice(["\n", ""]) + end + "\n\n" + said

        def make(opened: bool = bool(rng.randrange(2))) -> Parser:
            return parser("hermes", thinks, opened=opened)

        whole = read(make, [text])
        for at in range(1, len(text)):
            assert read(make, [text[:at], text[at:]]) == whole, (text, at)


@pytest.mark.parametrize("name", list(CALL_FORMATS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_wherever_the_text_is_cut_in_many(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32))
    text = damaged(name, random.Random(seed))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert read(lambda: parser(name), pieces) == read(lambda: parser(name), [text])


@pytest.mark.parametrize("name", list(CALL_FORMATS))
def test_calls_are_found_as_they_were_made(name: str) -> None:
    rng = random.Random(7)
    for _ in range(TEXTS):
        text, said, made = good(name, rng)
        events = read(lambda: parser(name), [text])
        assert calls(events) == made and content(events) == said, text
        assert [e.index for e in events if isinstance(e, CallStart)] == list(range(len(made)))
        assert not [e for e in events if isinstance(e, CallDropped)]


@pytest.mark.parametrize("name", list(CALL_FORMATS))
def test_what_is_told_as_a_call_is_one(name: str) -> None:
    rng = random.Random(11)
    found = lost = 0
    for _ in range(10 * TEXTS):
        text = damaged(name, rng)
        events = read(lambda: parser(name), [text])
        for tool, arguments in calls(events):
            assert tool in TOOLS and isinstance(json.loads(arguments), dict), text
        started = {e.index for e in events if isinstance(e, CallStart)}
        over = [e.index for e in events if isinstance(e, (CallEnd, CallDropped))]
        assert sorted(started) == sorted(over), text
        found += bool(calls(events))
        if not calls(events):
            lost += 1
            assert content(events) == text or (name == "harmony" and "<|message|>" in text)  # a head is no content
    assert found > TEXTS and lost > TEXTS


BROKEN = {
    "hermes": ['<tool_call>{"name": "add", "arguments": {}} x', '<tool_call>{"name": "add", "arguments": {"a": 1,}}'],
    "llama3": ['{"name": "add", "parameters": {"a": 1}} is the call', '<|python_tag|>print(1)', '{"name": "add"}'],
    "granite": ['<|tool_call|>[{"name": "add", "arguments": {"a": 01}}]', "<|tool_call|> none"],
    "mistral": ["[TOOL_CALLS]add[ARGS]{a}", "[TOOL_CALLS]unknown{}", "[TOOL_CALLS]add[CALL_ID]-[ARGS]{}"],
    "qwen3_coder": ["<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\nx", "<tool_call> x",
                    "<function=no></function>", "<function=add>\n<parameter=a>\n1", "a </tool_call>"],
    "glm": ["<tool_call>add\n<arg_key>a</arg_key>1</tool_call>", "<tool_call>no\n</tool_call>", "<tool_call>add"],
    "harmony": ["<|channel|>commentary to=browser.search<|message|>{}<|call|>", "<|channel|>final", "a <|end|>",
                "<|channel|>commentary to=functions.add<|message|>{} x", "today",
                "<|channel|>commentary to=functions.no<|message|>{}"],
    "json": ['{"answer": 42}', '[{"name": "add", "arguments": 3}]', '[1, 2]', '{"name": "Bob", "arguments": {}}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    events = read(lambda: parser(name), [text])
    assert content(events) == text and not calls(events)


def test_a_call_that_breaks_off_is_taken_back() -> None:
    text = 'Well.\n<tool_call>{"name": "add", "arguments": {"a": 1'
    events = read(lambda: parser("hermes"), [text])
    assert events == [
        Content("Well."),
        CallStart(0, "id0", "add"),
        Arguments(0, '{"a": 1'),
        CallDropped(0),
        Content(text.removeprefix("Well.")),
    ]


def test_arguments_come_as_they_are_written() -> None:
    reader = parser("hermes")
    told = [
        reader.feed(piece) for piece in ('<tool_call>{"name": "add", "argum', 'ents": {"a": "b', 'c"}', "}</tool_call>")
    ]
    assert told == [[], [CallStart(0, "id0", "add"), *arguments_told('{"a": "b')], arguments_told('c"}'), [CallEnd(0)]]


def arguments_told(text: str) -> list[Event]:
    return [Arguments(0, text)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('"{\\"a\\": [1]}"', '{"a": [1]}'),
        ("null", "{}"),
        ('"{"', None),
        ('"[]"', None),
        ("[]", None),
        ("1", None),
        ('"{\\"a\\": \\"\\ud800\\"}"', None),
        ('{"a": ' + "1" * 5000 + "}", '{"a": ' + "1" * 5000 + "}"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_arguments_in_other_forms(arguments: str, told: str | None, first: bool) -> None:
    members = ['"name": "add"', f'"arguments": {arguments}'][:: -1 if first else 1]
    events = read(lambda: parser("hermes"), [f"<tool_call>{{{', '.join(members)}}}</tool_call>"])
    assert calls(events) == ([] if told is None else [("add", told)])


@pytest.mark.parametrize("name", ["1" * 5000, '"\\ud800"', "null", "[]", '""'])
def test_names_that_are_none(name: str) -> None:
    text = f'<tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call>'
    assert content(read(lambda: parser("hermes"), [text])) == text


def test_a_call_without_arguments_has_empty_ones_where_it_is_marked_as_a_call() -> None:
    assert calls(read(lambda: parser("hermes"), ['<tool_call>{"name": "add"}</tool_call>'])) == [("add", "{}")]


@pytest.mark.parametrize(
    "members",
    ['"name": "add", "name": "add", "arguments": {}', '"name": "add", "arguments": {}, "arguments": {}',
     '"name": "add", "arguments": {}, "parameters": null', '"arguments": {}, "arguments": {}, "name": "add"'],
)  # fmt: skip
def test_a_member_that_comes_twice_says_nothing(members: str) -> None:
    text = f"<tool_call>{{{members}}}</tool_call>"
    assert content(read(lambda: parser("hermes"), [text])) == text


def test_thoughts() -> None:
    def split(text: str, thinks: str = "think", *, opened: bool | None = None) -> tuple[str, str, list[Call]]:
        events = read(lambda: parser("hermes", thinks, opened=opened), [text])
        return thoughts(events), content(events), calls(events)

    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert split(f"<think>\nHm, {call}?\n</think>\n\nYes.{call}") == (f"Hm, {call}?", "Yes.", [("add", "{}")])
    assert split("Hm.</think>No.", opened=True) == split("Hm.</think>No.", "deepseek_r1") == ("Hm.", "No.", [])
    assert split("Hm. No.", "deepseek_r1", opened=False) == ("", "Hm. No.", [])
    assert split("No. <think>x</think>") == ("", "No. <think>x</think>", [])
    assert split("\n<think></think>\n") == ("", "", [])
    assert split("<think>\n\n</think>\n\n a ") == ("", " a ", [])
    assert split("<think> a </thin") == ("a </thin", "", [])
    assert split("<thin") == ("", "<thin", [])
    assert split("[THINK]a[/THINK]b", "mistral") == ("a", "b", [])
    assert split("Here's my thought process: a\nHere is my response: b", "granite") == ("a", " b", [])


VALUES_OF = json.dumps(
    {
        "properties": {
            "s": {"type": "string"},
            "n": {"type": "integer"},
            "b": {"type": "boolean"},
            "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "e": {"$ref": "#/$defs/e"},
            "a": {"type": "array"},
        },
        "$defs": {"e": {"enum": ["1", "2"]}},
    }
)


@pytest.mark.parametrize(
    ("key", "written", "told"),
    [
        ("s", "12", '"12"'), ("s", "a\n\"b\"</p\n", '"a\\n\\"b\\"</p\\n"'), ("s", "", '""'),
        ("n", "12", "12"), ("n", " 12 ", "12"), ("n", "twelve", '"twelve"'), ("n", "1" * 5000, "1" * 5000),
        ("b", "True", "true"), ("b", "false", "false"), ("o", "null", "null"), ("o", "3", '"3"'),
        ("o", "None", '"None"'),
        ("e", "1", '"1"'), ("a", "[1, {}]", "[1, {}]"), ("a", "[1,", '"[1,"'),
        ("undeclared", "1", "1"), ("undeclared", '"a"', '"\\"a\\""'), ("undeclared", "{}, {}", '"{}, {}"'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", TAGGED)
def test_a_value_is_of_the_kind_that_its_schema_says(name: str, key: str, written: str, told: str) -> None:
    texts = {
        "qwen3_coder": f"<function=add><parameter={key}>\n{written}\n</parameter></function>",
        "glm": f"<tool_call>add<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>",
    }
    for size in (1, 1000):
        pieces = [texts[name][i : i + size] for i in range(0, len(texts[name]), size)]
        events = read(lambda: Formats(CALL_FORMATS.get(name)).parser({"add": VALUES_OF}), pieces)
        assert calls(events) == [("add", f'{{"{key}": {told}}}')]


SCHEMAS: Any = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["string", "integer", "null", "#/$defs/a", "#"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "enum", "const", "anyOf", "$ref", "properties", "a", "$defs"]), inner
        )
    ),
)


@given(schema=SCHEMAS, written=st.sampled_from(["1", "a", "null", "[1]", '"x"', ""]))
def test_a_schema_that_is_none_says_nothing(schema: Any, written: str) -> None:
    twice = [{"$ref": f"#/$defs/{other}"} for other in "ab"] * 20  # as a tree it would have no end
    root = {"properties": {"a": schema, "b": {"anyOf": twice}}, "$defs": {"a": schema, "b": {"anyOf": twice}}}
    for whole in (root, schema):
        text = f"<function=add><parameter=a>{written}</parameter><parameter=b>{written}</parameter></function>"
        reader = Formats(CALL_FORMATS.get("qwen3_coder")).parser({"add": json.dumps(whole)})
        events = merged(reader.feed(text) + reader.finish())
        [(_, arguments)] = calls(events)
        assert set(json.loads(arguments)) == {"a", "b"}


def test_a_schema_may_lead_from_one_reference_to_the_next() -> None:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)} | {"d3000": {"type": "integer"}}
    text = "<function=add><parameter=a>1</parameter><parameter=b>1</parameter></function>"
    for first in ("d0", "d2990"):
        properties = {name: {"$ref": f"#/$defs/{first}"} for name in "ab"}
        schema = json.dumps({"properties": properties, "$defs": chain})
        reader = Formats(CALL_FORMATS.get("qwen3_coder")).parser({"add": schema})
        [(_, arguments)] = calls(merged(reader.feed(text) + reader.finish()))
        assert arguments == '{"a": 1, "b": 1}'


def test_channels() -> None:
    found = Formats(CALL_FORMATS.get("harmony"), THOUGHT_FORMATS.get("harmony"))
    text = (
        "<|channel|>analysis<|message|>Hm <|e.<|end|><|start|>assistant<|channel|>commentary<|message|>I will look."
        "<|end|><|start|>assistant<|channel|>analysis<|message|>So.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    for pieces in ([text], list(text)):
        events = read(lambda: found.parser(TOOLS), pieces)
        assert (thoughts(events), content(events)) == ("Hm <|e.So.", "I will look.Done.")
        assert calls(events) == [("add", '{"a": 1}')]
    assert content(read(lambda: found.parser(()), [text])).count("functions.add") == 1  # nothing may be called
    assert read(lambda: found.parser(()), ["<|channel|>analysis<|message|>a"]) == [Reasoning("a")]
    reader = found.parser(())
    reader.feed("<|channel|>analysis<|message|>a")
    assert reader.thinking
    reader.feed("<|end|>")
    assert not reader.thinking


def lines_run(work: Callable[[], object]) -> int:
    """Of Python: what a slow machine does not change."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def test_work_is_linear() -> None:
    """Ten times as long takes ten times as many lines."""
    hostile = [
        "<tool_call>",
        '<tool_call>{"name": "add", "arguments": {"a": "',
        '{"name": ',
        "<tool_c",
        "[",
        " ",
        '"\\u00',
    ]
    own = [
        ("qwen3_coder", "<function=add>"),
        ("glm", "<tool_call>add<arg_key>a</arg_key><arg_value>"),
        ("harmony", "<|channel|>analysis<|message|>"),
        ("harmony", "<|start|>"),
    ]
    for name, unit in [*itertools.product(CALL_FORMATS, hostile), *own]:

        def lines(times: int, name: str = name, unit: str = unit) -> int:
            return lines_run(lambda: read(lambda: parser(name, "think"), [unit * times]))

        short, long = lines(100), lines(1000)
        assert long < 12 * short, (name, unit, short, long)


# -- JSON ------------------------------------------------------------------------------------------------------------


def accepts(text: str) -> bool:
    reader = JsonText()
    for i, char in enumerate(text):
        if reader.done and text[i:].strip(" \t\r\n"):
            return False
        if not reader.done and not reader.step(char):
            return False
    return reader.done


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return False
    return True


@settings(max_examples=600, deadline=None)
@given(st.text(st.sampled_from('[]{},:" \\nu0123-+.eEtrufalsb\n\x01é'), max_size=12))
def test_json_text_is_what_python_reads(inner: str) -> None:
    for text in (f"[{inner}]", f'{{"a": {inner}}}', f'["{inner}"]'):
        assert accepts(text) == is_json(text), text


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.booleans())
def test_json_text_reads_what_python_writes(value: object, spaced: bool) -> None:
    assert accepts(json.dumps([value], indent=1 if spaced else None, ensure_ascii=spaced))


# -- which format a model has ----------------------------------------------------------------------------------------

TOOLS_READ = "{% for tool in tools %}{{ tool }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "calls", "thinks"),
    [
        ("{{ messages }}", "json", None),
        (TOOLS_READ, "json", None),
        (TOOLS_READ + "<tool_call>{{ enable_thinking }}</think>", "hermes", "think"),
        (TOOLS_READ + "<tool_call><function=x>", "qwen3_coder", None),
        (TOOLS_READ + "<tool_call><arg_key></think>", "glm", "think"),
        (TOOLS_READ + "<|channel|>commentary", "harmony", "harmony"),
        (TOOLS_READ + "<|tool_call|>Here is my thought process:", "granite", "granite"),
        (TOOLS_READ + "[TOOL_CALLS]", "mistral", None),
        (TOOLS_READ + "[TOOL_CALLS]x[ARGS][THINK]", "mistral_args", "mistral"),
        (TOOLS_READ + "<|python_tag|>", "llama3", None),
    ],
)
def test_the_format_of_a_template(source: str, calls: str | None, thinks: str | None) -> None:
    found = formats_of(ChatTemplate(source), toytext.sentencepiece().added_tokens)
    assert found.calls == (CALL_FORMATS.get(calls) if calls else None)
    assert found.thoughts == (THOUGHT_FORMATS.get(thinks) if thinks else None)


def test_marks_that_are_special_tokens_are_shown() -> None:
    tokenizer = toytext.byte_level()
    marked = replace(CALL_FORMATS.get("hermes"), marks=("[INST]", "<tool_call>", "nowhere"))
    found = Formats(marked, THOUGHT_FORMATS.get("think"))  # <tool_call> and <think> are tokens, but not special ones
    assert found.shown_ids(tokenizer, calls=True) == (tokenizer.special_tokens["[INST]"],)
    assert found.shown_ids(tokenizer, calls=False) == ()


def test_a_format_by_name() -> None:
    tokenizer = toytext.byte_level()
    assert formats_of(None, tokenizer.added_tokens).thoughts == THOUGHT_FORMATS.get("think")  # it has the token
    found = formats_of(None, tokenizer.added_tokens, calls="none", thoughts="none")
    assert found == Formats() and read(lambda: found.parser(TOOLS), ["a<tool_call>"]) == [Content("a<tool_call>")]
    with pytest.raises(ConfigError, match="no tool parser named 'hermess'"):
        formats_of(None, tokenizer.added_tokens, calls="hermess")
