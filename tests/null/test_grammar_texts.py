"""A tool's input that follows a grammar: its form within quotes, against the same grammar without them."""

from __future__ import annotations

import json
import time
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from penstock.base import InvalidRequest
from penstock.grammar import Grammars, Matcher, TokenTable
from penstock.grammar.grammar import BYTES
from penstock.grammar.texts import text_grammar
from penstock.spec import StructuredOutputs

END = 256
GRAMMARS = Grammars(lambda: TokenTable([*(bytes([i]) for i in range(256)), b"<end>"], special=[END], end_ids=[END]))
REGEXES = [
    r"[^x]+", r".*", r"(?s:.*)", r"(?s).a.", r"(?:(?s:.)|b).", r"\W*", r"[\s\S]{0,9}", r"\S+", r"\D*", r"[^\n]*\n.*",
    r'"[^"]*"', r"\\+", r"[\\/]*", r'a|"|\n', r"\x22\x5c\x0a", r'\u0022|\U0000005c|\x{1f}', r"[]a]+", r'[^]"]+',
    r"[[:cntrl:]a]+", r'[a-z&&[^b]]+|[\x00-"]+', r"\p{L}+", r"\P{L}+", r"\pL|\n", r"(?i:n\n)+", r"(?i)\t(N|u)", r"\.\(",
    r"(?P<quote>\")a", r"a{2,3}\n?", r"/*", r"[/\"]*", "a\nb\t\"", r"\a\f\v", r"é|😀|\x{1F600}\"",
]  # fmt: skip
LARK = {
    r"""
    start: "say" " " quoted ("," quoted)*  // a comment with "a quote
    quoted: "\"" WORDS? "\""   # and another's
    WORDS: /[a-z \n\/]+/
    """: (['say "a\nb"', 'say "","c/d"'], ['say "a', 'say "A"', "say a"]),
    'start: (low | HIGH | ESCAPE)+\nlow: " ".."~"\nHIGH: "\\u00e0".."\\u00ff"\nESCAPE: "\\\\" "n"i "\\x0a"': (
        ['"\\~', "éà", "\\N\n", "a\\"], ["\n", "\\\n", "\\N\nɐ"],
    ),
    "start: _list\n_list: [item (WS item)*]\nitem: ESCAPED_STRING | INT -> number\n"
    "%import common (ESCAPED_STRING, INT)\n%import common.WS": (
        ['"a \\" b"\t\n12', "", "7"], ["12 ", '"a', "a"],
    ),
    "start: term (PLUS term)*\nterm: NUMBER | \"(\" start \")\"\nPLUS: /[+\\n]/\n%import common.INT -> NUMBER": (
        ["1+(2\n(3))", "12"], ["1+", "(1", "1\t2"],
    ),
    'start: "*** Begin" LF hunk+ "*** End" LF?\nhunk: file change+\nfile: "*** " /(.+)/ LF -> name\n'
    'change: ("+" | "-") /(.*)/ LF\n%import common.LF': (
        ['*** Begin\n*** a"b\n+\t\\\n-\n*** c\n-"\n*** End'],
        ["*** Begin\n*** a\n*** End", "*** Begin\n*** a\n+\n*"],
    ),
    '?start: pair | list\nlist: "(" start* ")"\n!pair: "<" STRING ">"\nSTRING: "\\"" /[a-z\\n]*/ "\\""': (
        ['(<"a\n">(<"">))', "()"], ['<"a">)', '(<"A">)'],
    ),
    'start: "a"i /b\\.\\n/is ("\\t"{2,3})': (["AB.\n\t\t", "ab.\n\t\t\t"], ["ab.\n\t", "ab..\t\t"]),
    'start: sum\nsum: N ("+" N)*\nN: /[0-9]+/\n%ignore /[ \\n]+/': (["1 +\n2", "1+2"], ["1 2", "1 +"]),
}  # fmt: skip


def in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@cache
def compiled(lark: str) -> LLMatcher:
    return LLMatcher(BYTES.backend, LLMatcher.grammar_from_lark(lark), log_level=0)


def accepts(lark: str, text: str) -> bool:
    matcher, ids = compiled(lark).deep_copy(), list(text.encode())
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.mark.parametrize("regex", REGEXES)
def test_an_expression_within_quotes_matches_what_it_matches_without(regex: str) -> None:
    plain, quoted = (text_grammar("regex", regex, quoted=quoted) for quoted in (False, True))
    seen = set()

    @given(st.text('ab"\\\n\t\x01\x1f/[].(]xnNuU1 é😀', max_size=4))
    def run(text: str) -> None:
        seen.add(accepts(plain, text))
        assert accepts(quoted, in_json(text)) == accepts(plain, text)
        if in_json(text) != text:
            assert not accepts(quoted, text) or accepts(plain, json.loads(f'"{text}"'))

    run()
    assert seen


@pytest.mark.parametrize("grammar", LARK, ids=range(len(LARK)))
def test_a_grammar_within_quotes_is_that_without(grammar: str) -> None:
    good, bad = LARK[grammar]
    plain, quoted = (text_grammar("lark", grammar, quoted=quoted) for quoted in (False, True))
    for lark, written in ((plain, str), (quoted, in_json)):
        assert [text for text in good if not accepts(lark, written(text))] == []
        assert [text for text in bad if accepts(lark, written(text))] == []


def tags(kind: str, definition: str, **more: Any) -> StructuredOutputs:
    structure = {"begin": '<call>{"input": "', kind: definition, "end": '"}</call>'}
    return StructuredOutputs(structural_tag={"structures": [structure], "triggers": ["<call>"], **more})


def drawn(wanted: StructuredOutputs, seed: int, room: int = 300) -> str:
    """What comes of random bytes, of which some are quotes and backslashes."""
    matcher, random, text = GRAMMARS.matcher(wanted, room, (END,)), Random(seed), b""
    while not matcher.ended and matcher.room:
        choice = [i for i, bit in enumerate(matcher.mask(END + 1).tolist()) if bit]
        quotes = [i for i in choice if i in (34, 92)] if random.random() < 0.2 else []
        token = random.choice(quotes or [i for i in choice if i < 128] or choice)
        if not matcher.admits(token) and (known := matcher.next_token()) is not None:
            token = known
        matcher.advance(token)
        text += bytes([token]) if token != END else b""
    return text.decode(errors="ignore")


@pytest.mark.parametrize(
    ("kind", "definition"), [("regex", regex) for regex in REGEXES[:12]] + [("lark", grammar) for grammar in LARK]
)
def test_whatever_is_drawn_is_a_call_whose_input_follows(kind: str, definition: str) -> None:
    plain = text_grammar(kind, definition, quoted=False)
    for seed in range(3):
        call = drawn(tags(kind, definition, at_least=1, at_most=1), seed)
        if not call.endswith("</call>"):  # some come to no end by chance
            assert "Begin" in definition
            continue
        assert call.startswith("<call>")
        assert accepts(plain, json.loads(call.removeprefix("<call>").removesuffix("</call>"))["input"])


def admits(wanted: StructuredOutputs, text: str) -> bool:
    matcher, ids = GRAMMARS.compile(wanted).tokens.deep_copy(), list(text.encode())
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


def test_texts_stand_beside_each_other_and_in_free_text() -> None:
    """Their names and what they ignore are their own."""
    grammars = ['start: X\nX: "x"', 'start: X X\nX: "y"\n%ignore " "']
    tools = [("a", "lark", grammars[0]), ("b", "lark", grammars[1]), ("c", "regex", "z+|é")]
    structures = [{"begin": f'<call>{name} "', kind: form, "end": '"</call>'} for name, kind, form in tools]
    wanted = StructuredOutputs(structural_tag={"structures": structures, "triggers": ["<call>"]})
    for text in ('<call>a "x"</call>', 'hi <call>b "y y"</call>, <call>c "zz"</call>!', '<call>c "é"</call>', "no"):
        assert admits(wanted, text), text
    for text in ('<call>a "y"</call>', '<call> a "x"</call>', '<call>b "y"</call>', '<call>a "x x"</call>', "<call>d"):
        assert not admits(wanted, text), text


def test_a_text_may_be_written_plainly() -> None:
    field = ["<p=input>\n", "\n</p>\n"]
    structure = {"begin": "<call>f\n", "regex": '^([a-z<]|"|\n)+$', "end": "</call>", "field": field}
    wanted = StructuredOutputs(structural_tag={"structures": [structure], "at_least": 1})
    good = '<call>f\n<p=input>\na<"\nb\n</p>\n</call>'
    assert admits(wanted, good)
    for old, new in (('"', '\\"'), ("b", "B"), ("b", "</p>b"), ("\nb", "7")):
        assert not admits(wanted, good.replace(old, new)), new


LONG = "a" * 200_000
REFUSED = {
    "look-ahead": ("regex", r"(?!a)b", "invalid_regex"),
    "unbalanced": ("regex", r"a)|(?:b", "invalid_regex"),
    "half an escape": ("regex", "a\\", "invalid_regex"),
    "a class without an end": ("regex", "[a", "invalid_regex"),
    "flags": ("regex", r"(?x: a )", "invalid_regex"),
    "nothing of it": ("regex", r"[^\x00-\x{10FFFF}]", "invalid_regex"),
    "groups": ("regex", "(" * 5000 + ")" * 5000, "grammar_too_large"),
    "dots": ("regex", "." * 200_000, "grammar_too_large"),
    "no start": ("lark", 'begin: "a"', "invalid_grammar"),
    "no grammar": ("lark", "???", "invalid_grammar"),
    "no end": ("lark", 'start: "a', "invalid_grammar"),
    "no end of an expression": ("lark", "start: /" + "\\/" * 100_000, "invalid_grammar"),
    "a schema": ("lark", 'start: %json {"type": "object"}', "invalid_grammar"),
    "a deep schema": ("lark", "start: %json " + '{"items":' * 10_000 + "{}" + "}" * 10_000, "grammar_too_large"),
    "a special token": ("lark", "start: <|im_end|>", "invalid_grammar"),
    "a token by number": ("lark", "start: <[0-255]>", "invalid_grammar"),
    "another grammar": ("lark", "start: @text_0_0", "invalid_grammar"),
    "options": ("lark", '%llguidance {"no_forcing": true}\nstart: "a"', "invalid_grammar"),
    "attributes": ("lark", 'start[stop=""]: /a*/', "invalid_grammar"),
    "an import from elsewhere": ("lark", "start: A\n%import .other.A", "invalid_grammar"),
    "an import that is not there": ("lark", "start: C_COMMENT\n%import common.C_COMMENT", "invalid_grammar"),
    "a flag": ("lark", "start: / a /x", "invalid_grammar"),
    "what a text is not": ("lark", "start: A\nA: ~/a/", "invalid_grammar"),
    "recursion, and two terminals with escapes": (
        "lark", 'start: "(" start* ")" | STRING | /[ \\n]/\nSTRING: "\\"" /[a-z]*/ "\\""', "invalid_grammar"),
    "rules": ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(5000)) + '\na5000: "x"',
              "grammar_too_large"),
    "itself": ("lark", "start: start start | start", "invalid_grammar"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_in_words_and_soon(name: str) -> None:
    kind, definition, code = REFUSED[name]
    started = time.process_time()
    with pytest.raises(InvalidRequest) as refused:
        GRAMMARS.compile(tags(kind, definition, at_least=1))
    assert (refused.value.code, bool(refused.value.why), bool(refused.value.fix)) == (code, True, True)
    assert len(str(refused.value)) < 1000
    assert time.process_time() - started < 8.0


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("regex", "((a{1,100}){1,100}){1,100}b"), ("regex", "(a|b)*a(a|b){30}c"),
        ("regex", "(((a*)*)*)*b"), ("regex", r"\x{41}" * 30_000), ("regex", LONG),
        ("regex", "".join(f"[^{chr(200 + i)}]" for i in range(900))), ("regex", "[" + LONG + '"]'),
        ("lark", "start: A\nA: " + " ".join(f"/[^{chr(200 + i)}]/" for i in range(900))),
        ("lark", "start: " + " | ".join(f'"\\n{i}"' for i in range(5000))), ("lark", 'start: "' + LONG + '\\n"'),
        ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x\\n"'),
        ("lark", "start: A\n" + "".join(f"%import common.WS -> A{i}\n" for i in range(5000)) + 'A: "a"'),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_large_costs_a_bounded_time(kind: str, definition: str) -> None:
    started = time.process_time()
    try:
        drawn(tags(kind, definition, at_least=1), 1, room=20)
    except InvalidRequest as error:
        assert error.code in ("grammar_too_large", "invalid_grammar", "invalid_regex")
    assert time.process_time() - started < 8.0


@pytest.mark.parametrize("where", ["a form of the answer", "plainly"])
def test_where_no_grammar_can_be_held_it_is_said(where: str) -> None:
    bare = {"begin": '{"name": "f", "arguments": {"input": "', "lark": 'start: "a"', "end": '"}}'}
    form: dict[str, Any] = {"structures": [bare], "answer": {"type": "object"}}
    if where == "plainly":
        form = {"structures": [bare | {"field": ["<", ">"]}], "at_least": 1}
    with pytest.raises(InvalidRequest, match=r"without marks|written plainly") as refused:
        GRAMMARS.compile(StructuredOutputs(structural_tag=form))
    assert refused.value.code == "unsupported_schema"


def test_a_matcher_of_a_text_can_be_made_again() -> None:
    """As after a preemption, in the midst of an escape."""
    wanted = tags("regex", r'[^x]{3}"', at_least=1)
    call = b'<call>{"input": "\\n\\u00'
    matchers = [GRAMMARS.matcher(wanted, 90, (END,)) for _ in range(2)]
    for matcher in matchers:
        for byte in call:
            assert matcher.mask(END + 1)[byte], call
            matcher.advance(byte)
    masks = [matcher.mask(END + 1).tolist() for matcher in matchers]
    assert masks[0] == masks[1] and isinstance(matchers[0], Matcher)
