"""What a grammar may cost: bounded time and stack, or a refusal that says so."""

import json
import time

import pytest

from penstock.base import InvalidRequest
from penstock.grammar import Grammars, Matcher, TokenTable
from penstock.grammar.validation import InstanceCheck
from penstock.spec import StructuredOutputs

END = 256
GRAMMARS = Grammars(lambda: TokenTable([*(bytes([i]) for i in range(256)), b"<end>"], special=[END], end_ids=[END]))


def start(room: int = 200, **wanted: object) -> Matcher:
    return GRAMMARS.matcher(StructuredOutputs(**wanted), room, (END,))  # type: ignore[arg-type]


def allowed(matcher: Matcher) -> set[int]:
    return {i for i, bit in enumerate(matcher.mask(END + 1).tolist()) if bit}


def doubling(depth: int) -> dict[str, object]:
    """A schema whose evaluation by the letter takes 2^depth steps."""
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": {**defs, f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0", "not": {"const": 1}}


HOSTILE = {
    "counted": {"regex": "((a{1,100}){1,100}){1,100}b"},
    "nested stars": {"regex": "(((a*)*)*)*b"},
    "alternatives": {"regex": "|".join(f"a{{{i}}}b" for i in range(1, 300))},
    "states": {"regex": "(a|b)*a(a|b){30}c"},
    "doubling": {"json": doubling(40)},
    "deep": {"json": json.loads('{"items":' * 100 + "{}" + "}" * 100)},
    "wide": {"json": {"properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}},
    "enum": {"json": {"enum": [f"value {i}" for i in range(5000)]}},
    "long": {"json": {"type": "string", "minLength": 10**6}},
    "huge number": {"json": {"type": "number", "multipleOf": 1e-300, "minimum": 1e308}},
    "long text": {"regex": "ab " * 20_000},
    "long texts": {"choice": [first * 60_000 for first in "abcde"]},
    "long constants": {"json": {"enum": [first * 6_000 for first in "abcde"]}},
    "long pattern": {"json": {"type": "string", "pattern": "^" + "ab " * 20_000}},
    "mixed enum": {
        "json": {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "enum": [[i] if i % 2 else {"a": i} for i in range(5000)],
            "not": {"type": "null"},
        }
    },
    "pattern bomb": {"json": {"type": "string", "pattern": "^(a+)+$", "not": {"pattern": "^(a|aa)+$"}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_cost_a_bounded_time(name: str) -> None:
    started = time.process_time()
    try:
        matcher = start(50, **HOSTILE[name])
    except InvalidRequest as error:
        assert error.code in ("unsupported_schema", "grammar_too_large")
    else:
        for _ in range(10):
            choice = sorted(allowed(matcher))
            if not choice:
                break
            token = choice[-1]
            known = matcher.next_token()
            matcher.advance(token if known is None or matcher.admits(token) else known)
    assert time.process_time() - started < 8.0  # what is stated, times ten


def chain(links: int, **link: object) -> dict[str, object]:
    """Schemas of which each holds a reference to the next one."""
    defs = {f"d{i}": json.loads(json.dumps(link).replace("NEXT", f"#/$defs/d{i + 1}")) for i in range(links)}
    return {"$defs": {**defs, f"d{links}": {"type": "null"}}, "$ref": "#/$defs/d0"}


DEEP = chain(1500, type="object", properties={"n": {"$ref": "NEXT"}})
TOO_LARGE = {  # the first four would run out of stack and take the process along
    "references": {"json": DEEP},
    "a schema inside": {"grammar": f"start: %json {json.dumps(DEEP)}"},
    "rules": {"grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(5000)) + '\na5000: "x"'},
    "terminals": {"grammar": "start: A0\n" + "\n".join(f"A{i}: /a/ A{i + 1}" for i in range(5000)) + '\nA5000: "x"'},
    "GBNF": {"grammar": "root ::= " + " | ".join(['"abcdefgh"'] * 20_000)},
    "properties": {"json": {"properties": {f"p{i}": {} for i in range(10_000)}}},
    "texts": HOSTILE["long texts"],
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_costs_too_much_is_refused_as_such(name: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        start(**TOO_LARGE[name])
    assert caught.value.code == "grammar_too_large" and caught.value.why and caught.value.fix
    assert time.process_time() - started < 8.0


@pytest.mark.parametrize(
    "schema",
    [
        chain(150, type="object", properties={"n": {"$ref": "NEXT"}}, required=["n"]),
        chain(150, anyOf=[{"$ref": "NEXT"}, {"type": "null"}]),
    ],
)
def test_references_may_go_deep(schema: dict[str, object]) -> None:
    assert start(json=schema).grammar.closing is not None


def test_a_long_text_costs_little_at_each_draw() -> None:
    matcher = start(30_000, regex="ab " * 10_000)
    started = time.process_time()
    for token in b"ab " * 200:
        assert token in allowed(matcher) and matcher.admits(token)
        matcher.advance(token)
    assert time.process_time() - started < 5.0


def test_validation_gives_up_rather_than_take_for_ever() -> None:
    started = time.process_time()
    assert not InstanceCheck(doubling(40)).accepts(b'"x"')
    assert not InstanceCheck({"$ref": "#"}).accepts(b"1")
    assert not InstanceCheck({"type": "string", "pattern": "^(a|aa)+$"}).accepts(b'"' + b"a" * 60 + b'b"')
    assert not InstanceCheck({}).accepts(b'{"a": 1, "a": 2}') and not InstanceCheck({}).accepts(b"{")
    assert time.process_time() - started < 5.0
