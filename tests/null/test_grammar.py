"""Grammars without a model: masks against brute force, rebuilding, coercion, limits, and refusals in words."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base import InvalidRequest
from penstock.grammar import Grammars, Matcher, TokenTable
from penstock.grammar.patterns import lookaheads
from penstock.grammar.validation import InstanceCheck
from penstock.spec import StructuredOutputs

PIECES = [
    *(bytes([i]) for i in range(256)),
    b'"',
    b'{"',
    b'":',
    b'",',
    b"ab",
    b"abc",
    b"ba",
    b"cab",
    b"], ",
    b'""',
    b"  ",
]
END, OTHER_END, NAMELESS = len(PIECES), len(PIECES) + 1, len(PIECES) + 2
TABLE = TokenTable([*PIECES, b"<end>", b"<stop>", b""], special=[END, OTHER_END], end_ids=[END, OTHER_END])
GRAMMARS = Grammars(lambda: TABLE)
ROWS = len(TABLE) + 5  # logits may have more rows than there are tokens


def start(room: int = 200, **wanted: object) -> Matcher:
    return GRAMMARS.matcher(StructuredOutputs(**wanted), room, (END, OTHER_END))  # type: ignore[arg-type]


def allowed(matcher: Matcher) -> set[int]:
    return {i for i, bit in enumerate(matcher.mask(ROWS).tolist()) if bit}


def walk(matcher: Matcher, random: Random) -> list[int]:
    """Draws as the sampler does: any allowed token; a few again where it is refused; until the end or the limit."""
    tokens: list[int] = []
    for _ in range(matcher.room):
        choice = sorted(allowed(matcher))
        assert choice, "nothing may come"
        token = random.choice(choice)
        for _ in range(3):
            if matcher.admits(token):
                break
            token = random.choice(choice)
        if not matcher.admits(token) and (known := matcher.next_token()) is not None:
            token = known
        tokens.append(token)
        matcher.advance(token)
        if matcher.ended:
            break
    return tokens


def text_of(tokens: list[int]) -> str:
    return b"".join(TABLE.token_bytes[t] for t in tokens if t not in TABLE.special).decode()


words = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(words, st.randoms(use_true_random=False))
def test_a_mask_is_what_brute_force_says(choice: list[str], random: Random) -> None:
    matcher, text = start(choice=choice), ""
    while True:
        fits = {
            i
            for i, piece in enumerate(PIECES)
            if any(word.encode().startswith(text.encode() + piece) for word in choice)
        }
        ends = {END, OTHER_END} if text in choice else set[int]()
        rest = [word[len(text) :] for word in choice if word.startswith(text)]
        if ends or len({word[0] for word in rest}) > 1:
            assert allowed(matcher) == fits | ends
        else:  # a byte that must come is written with the longest token for what must come
            assert allowed(matcher) and allowed(matcher) <= fits
            fits = allowed(matcher)
        if not fits:
            break
        token = random.choice(sorted(fits))
        matcher.advance(token)
        text += PIECES[token].decode()
    matcher.advance(END)
    assert matcher.ended and allowed(matcher) == {END, OTHER_END}  # for those who ignore the end


SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["ab", "abc"]}},
        "required": ["b"],
    },
    "array": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    "unique": {"type": "array", "items": {"enum": ["a", "ab", "abc"]}, "uniqueItems": True, "minItems": 2},
    "contains": {"type": "array", "items": {"type": "integer"}, "contains": {"const": 7}, "maxItems": 3},
    "not": {"type": "object", "properties": {"a": {}, "b": {}}, "not": {"required": ["a"]}, "minProperties": 1},
    "if": {"properties": {"a": {"type": "boolean"}}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependencies": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "dependencies": {"a": ["b"]},
        "additionalProperties": False,
    },
    "names": {"type": "object", "propertyNames": {"pattern": "^a"}, "minProperties": 1, "maxProperties": 2},
    "one of": {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": {}, "b": {}}},
    "lookahead": {"type": "string", "pattern": "^(?=.*[0-9])(?!tmp)[a-z0-9]{4,8}$"},
    "recursive": {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    "overlapping names": {
        "type": "object",
        "patternProperties": {"a": {"type": "integer"}, "b": {"minimum": 3}},
        "additionalProperties": False,
        "minProperties": 1,
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("room", [40, 90])
def test_random_walks_end_in_instances(name: str, room: int) -> None:
    check = InstanceCheck(SCHEMAS[name])
    for seed in range(3):
        tokens = walk(start(room, json=SCHEMAS[name]), Random(seed))
        assert tokens[-1] in (END, OTHER_END), (text_of(tokens), len(tokens))
        assert check.accepts(text_of(tokens).encode()), text_of(tokens)


def test_a_string_that_must_hold_a_pattern_somewhere_is_ended_in_time() -> None:
    """Seen from inside of the string nothing tells which bytes begin the pattern: anything may come there."""
    date = {"type": "string", "pattern": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}.\d{6}"}
    schema = {"type": "object", "properties": {"a": date, "b": {"type": "string"}, "c": date}, "required": ["a", "c"]}
    for seed in range(6):
        tokens = walk(start(200, json=schema), Random(seed))
        assert tokens[-1] in (END, OTHER_END), text_of(tokens)
        assert InstanceCheck(schema).accepts(text_of(tokens).encode())


def test_looking_for_an_end_of_what_has_ended() -> None:
    """After this text only the end may come, which is no byte."""
    grammar = GRAMMARS.compile(StructuredOutputs(json={"type": "array", "items": {"type": "integer"}}))
    assert grammar.bytes is not None
    at_end = grammar.bytes.deep_copy()
    assert at_end.consume_tokens(list(b"[7]")) and grammar.completion(at_end, b"[7]", (False, False)) == b""


@pytest.mark.parametrize(
    "wanted", [{"json": SCHEMAS["unique"]}, {"json": SCHEMAS["object"]}, {"regex": r"(ab|c)*[0-9]{3}"}]
)
def test_a_matcher_made_from_tokens_is_equal_to_the_one_that_saw_them(wanted: dict[str, object]) -> None:
    for seed in range(4):
        tokens = walk(start(60, **wanted), Random(seed))
        seen = start(60, **wanted)
        for count, token in enumerate(tokens[:-1]):
            rebuilt = start(60, **wanted)
            for before in tokens[:count]:
                rebuilt.advance(before)
            assert allowed(rebuilt) == allowed(seen)
            assert [rebuilt.admits(t) for t in sorted(allowed(rebuilt))[:9]] == [
                seen.admits(t) for t in sorted(allowed(seen))[:9]
            ]
            seen.admits(next(iter(allowed(seen))))  # a look at another token leaves no trace
            seen.advance(token)


def test_room_is_used_to_the_last_token_and_no_further() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}
    shortest = len(walk(start(20, json=schema, disable_any_whitespace=True), Random(0)))
    for room in range(8, 20):
        tokens = walk(start(room, json=schema, disable_any_whitespace=True), Random(room))
        assert tokens[-1] in (END, OTHER_END), (room, text_of(tokens))
        assert json.loads(text_of(tokens)) is not None
    assert shortest <= 20
    cut = walk(start(5, json=schema), Random(1))  # no instance is so short: it is cut, and was not steered
    assert len(cut) == 5 and cut[-1] not in (END, OTHER_END)


def test_what_has_no_text_and_what_is_special_is_masked() -> None:
    free = allowed(start(regex="(.|\n)*"))
    assert NAMELESS not in free and not free & set(range(len(TABLE), ROWS))
    assert {END, OTHER_END} <= free and set(b"ab\n") <= free
    assert not {END, OTHER_END} & allowed(start(regex="a+"))


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        ('start: "a" digit+\ndigit: /[0-9]/', "a01"),
        ('root ::= "a" digit+\ndigit ::= [0-9]', "a01"),
        ('root  ::= select " from " ("x" | "y")\nselect ::= "select a"', "select a from y"),
    ],
)
def test_both_notations_of_a_grammar(grammar: str, word: str) -> None:
    matcher = start(grammar=grammar)
    for byte in word.encode():
        assert byte in allowed(matcher)
        matcher.advance(byte)
    assert matcher.may_end


def test_a_grammar_may_name_a_special_token() -> None:
    matcher = GRAMMARS.matcher(StructuredOutputs(grammar="start: <stop> /a+/"), 10, (END,))
    assert allowed(matcher) == {OTHER_END}
    matcher.advance(OTHER_END)
    assert ord("a") in allowed(matcher)


def test_instances_count_in_any_order_of_names() -> None:
    grammar = GRAMMARS.compile(StructuredOutputs(json=SCHEMAS["object"]))
    assert grammar.check is None
    assert grammar.accepts({"b": "ab", "a": 1}) and grammar.accepts({"a": 1, "b": "abc", "c": None})
    assert not grammar.accepts({"a": 1}) and not grammar.accepts({"b": "abcd"}) and not grammar.accepts([])


@pytest.mark.parametrize("extra", [True, False])
def test_an_instance_is_found_whatever_the_order_of_its_names(extra: bool) -> None:
    """Each object wants its own order; permutations tried one by one would be 8! in each of the items."""
    names = [f"p{i}" for i in range(8)]
    schema = {
        "type": "object",
        "properties": {
            "there": {"type": "object", "properties": {name: {"type": "integer"} for name in names}},
            "back": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {name: {"type": "integer"} for name in reversed(names)},
                    "required": names[3:5],
                    "additionalProperties": extra,
                },
            },
        },
    }
    item: dict[str, object] = {name: i for i, name in enumerate(names)}
    value = {"back": [item | ({"other": 0} if extra else {})] * 4, "there": item}
    grammar = GRAMMARS.compile(StructuredOutputs(json=schema))
    assert grammar.check is None and grammar.accepts(value)
    assert not grammar.accepts({"back": [{**item, "p7": "7"}]})


def test_wider_grammars_are_narrowed_by_validation() -> None:
    for name, good, bad in (
        ("unique", ["a", "ab"], ["a", "a"]),
        ("contains", [1, 7], [1, 2]),
        ("not", {"b": 1}, {"a": 1}),
        ("if", {"a": True, "b": 0}, {"a": True}),
        ("dependencies", {"b": 1}, {"a": 1}),
        ("names", {"ab": 1}, {"ba": 1}),
        ("one of", {"a": 1}, {"a": 1, "b": 1}),
        ("overlapping names", {"ab": 3}, {"ab": 2}),
        ("lookahead", "abc1", "tmp1"),
    ):
        grammar = GRAMMARS.compile(StructuredOutputs(json=SCHEMAS[name]))
        assert grammar.check is not None, name
        assert grammar.accepts(good) and not grammar.accepts(bad), name


def test_look_ahead_comes_off_the_front_only() -> None:
    assert lookaheads("^(?=.*[0-9])(?!a(b)[)])x$") == (["^(?:.*[0-9])"], ["^(?:a(b)[)])"], "^x$")
    for pattern in ("a(?=b)", "^a", "^(?=a", "^(?=a)*b", r"\^(?=a)"):
        assert lookaheads(pattern) == ([], [], pattern)


@pytest.mark.parametrize(
    ("wanted", "code", "named"),
    [
        ({"json": "false"}, "unsupported_schema", ""),
        ({"json": {"type": "strin"}}, "unsupported_schema", "strin"),
        ({"json": {"$ref": "http://example.org/other.json"}}, "unsupported_schema", "example.org"),
        ({"json": {"$ref": "#/$defs/missing"}}, "unsupported_schema", "missing"),
        ({"json": {"$ref": "#"}}, "infinite_schema", "#"),
        ({"json": False}, "unsupported_schema", ""),
        ({"json": {"allOf": [{"type": "string"}, {"not": {"type": "string"}}]}}, "unsupported_schema", "not"),
        ({"json": {"pattern": "a(?<=b)c"}}, "unsupported_schema", "look-around"),
        ({"json": {"properties": {"a": {"pattern": "("}}}}, "unsupported_schema", "("),
        ({"json": {"uniqueItems": True, "pattern": "(?<!a)b"}}, "unsupported_schema", "look-around"),
        ({"regex": "a("}, "invalid_regex", ""),
        ({"regex": "(?=a)b"}, "invalid_regex", "look-around"),
        ({"regex": "\\"}, "invalid_regex", "backslash"),
        ({"regex": "^a\\\\\\"}, "invalid_regex", "backslash"),
        ({"json": {"properties": {"a": {"type": "string", "pattern": "b\\"}}}}, "unsupported_schema", "backslash"),
        ({"grammar": "start: %json {"}, "invalid_grammar", "%json"),
        ({"grammar": "begin: 'a'"}, "invalid_grammar", ""),
        ({"grammar": "root ::= missing"}, "invalid_grammar", "missing"),
        ({"grammar": "root ::= ("}, "invalid_grammar", ""),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_words(wanted: dict[str, object], code: str, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        start(**wanted)
    assert caught.value.code == code and caught.value.why and named in str(caught.value)


LOOP = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
PAIR = {"type": "array", "items": {"$ref": "#/$defs/a%20b"}, "minItems": 1}
EITHER = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}


@pytest.mark.parametrize(
    ("endless", "finite"),
    [
        (LOOP, {**LOOP, "required": []}),
        (LOOP, {**LOOP, "type": ["object", "null"]}),
        ({"$defs": {"a b": PAIR}, **PAIR}, {"$defs": {"a b": {**PAIR, "minItems": 0}}, **PAIR}),
        (
            {
                "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {**LOOP, "additionalProperties": EITHER}},
                **EITHER,
            },
            {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"const": 1}}, **EITHER},
        ),
        (
            {"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2},
            {"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 1},
        ),
        (
            {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]},
            {"type": "object", "additionalProperties": {"$ref": "#"}, "properties": {"x": {}}, "required": ["x"]},
        ),
    ],
)
def test_a_schema_that_requires_itself_is_refused(endless: dict[str, object], finite: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        start(json=endless)
    assert caught.value.code == "infinite_schema" and "'#" in caught.value.why
    closing = start(json=finite).grammar.closing
    assert closing is not None and InstanceCheck(finite).accepts(closing)


def test_a_model_without_an_end_token_is_told_so() -> None:
    endless = Grammars(lambda: TokenTable(PIECES, special=[], end_ids=[]))
    with pytest.raises(InvalidRequest, match="no_end_token"):
        endless.compile(StructuredOutputs(choice=["a"]))


def test_a_choice_is_taken_by_the_letter_and_may_be_large() -> None:
    odd = ["a.b*", "a\\d", 'é"\n\t', "[x]{2}|^$", "(?i)a", "日本"]
    for text in odd:
        matcher = start(choice=odd)
        for byte in text.encode():
            assert byte in allowed(matcher)
            matcher.advance(byte)
        assert matcher.may_end
    many = [f"{i * 7919 % 10_000:04d} of many" for i in range(10_000)]
    assert text_of(walk(start(choice=many), Random(1))) in many


def test_equal_requests_share_a_grammar() -> None:
    one, other = StructuredOutputs(json='{"type": "null"}'), StructuredOutputs(json={"type": "null"})
    assert one == other and GRAMMARS.compile(one) is GRAMMARS.compile(other)
