"""The one text that is the input of a tool, held to a regular expression or a grammar in Lark, as a call writes it.

Most formats write it within quotes, as a string of JSON. There a quote, a backslash and a control character are escaped
(RFC 8259, section 7), and nothing else is. An escape stands for one character, so that rules, alternatives and
repetitions stay as they are: what matches one character matches its escape instead, if it has one.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from penstock.base import InvalidRequest
from penstock.grammar.grammar import BYTES
from penstock.grammar.patterns import is_cut
from penstock.grammar.refusals import refusal, too_large, vet_levels
from penstock.grammar.tokens import LIMITS
from penstock.spec.structured import MAX_GRAMMAR_CHARS

_ESCAPES = {char: json.dumps(char)[1:-1] for char in (*map(chr, range(32)), '"', "\\")}
_ESCAPED = r'[\x00-\x1f"\\]'
_COMMON = {
    "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+", "CR": r"\r", "LF": r"\n", "NEWLINE": r"(\r?\n)+",
    "ESCAPED_STRING": r'"([^"\\]|\\.)*"', "SH_COMMENT": r"#[^\n]*", "CPP_COMMENT": r"//[^\n]*",
    "SQL_COMMENT": r"--[^\n]*",
}  # fmt: skip
"""What may be imported and has such characters in it, as Lark's own library defines it."""
_PLAIN = frozenset(
    "DIGIT HEXDIGIT INT SIGNED_INT DECIMAL _EXP FLOAT SIGNED_FLOAT NUMBER SIGNED_NUMBER LCASE_LETTER UCASE_LETTER "
    "LETTER WORD CNAME".split()
)
"""And what has none."""


def unanchored(regex: str) -> str:
    """A regular expression that a whole text matches, without the marks of its two ends.

    Raises:
        InvalidRequest: (invalid_regex) it ends within an escape.
    """
    regex = regex.removeprefix("^")
    if regex.endswith("$") and not is_cut(regex[:-1]):
        regex = regex[:-1]
    if is_cut(regex):
        why, fix = "it ends in a backslash that escapes nothing", "escape the backslash with another, or drop it"
        raise InvalidRequest("invalid_regex", "The regular expression cannot be compiled", why=why, fix=fix)
    return regex


@lru_cache(maxsize=16)
def text_grammar(kind: str, definition: str, *, quoted: bool) -> str:
    """A grammar of its own, in llguidance's Lark.

    Args:
        kind: "regex" or "lark".
        quoted: it is written as within quotes.

    Raises:
        InvalidRequest: invalid_regex, invalid_grammar, grammar_too_large.
    """
    code, what = ("invalid_regex", "regular expression") if kind == "regex" else ("invalid_grammar", "grammar")
    what = f"The {what} {reprlib.repr(definition)} of a tool's input"
    vet_levels(definition)
    regex = unanchored(definition) if kind == "regex" else ""
    try:
        if kind == "lark" and quoted:
            made = _quoted_lark(definition)
        elif kind == "lark":
            made = definition
        else:
            made = f"start: {terminal(_quoted(regex) if quoted else regex)}"
        if len(made) > MAX_GRAMMAR_CHARS:
            raise too_large(what, f"within quotes it has {len(made):,} characters, at most {MAX_GRAMMAR_CHARS:,}")
        own = LLMatcher.grammar_from_lark(definition) if kind == "lark" else LLMatcher.grammar_from_regex(regex)
        for source in (own, LLMatcher.grammar_from_lark(made)):  # what is wrong is told in its own words
            _compile(source)
    except ValueError as error:
        fix = "correct or simplify what is named"
        raise refusal(code, f"{what} cannot be compiled", error, fix=fix) from None
    return made


def terminal(regex: str) -> str:
    """As it stands in Lark."""
    return f"/(?:{regex_to_lark(regex, '')})/"


def _compile(source: str) -> LLMatcher:
    """Raises ValueError."""
    matcher = LLMatcher(BYTES.backend, source, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    if not any(matcher.compute_bitmask()) or (matcher.is_stopped() and not matcher.is_accepting()):
        raise ValueError("nothing satisfies it")
    return matcher


# -- regular expressions -----------------------------------------------------------------------------------------------

_PIECE = re.compile(
    r"""
    (?P<code>\\(?:[xuU]\{(?P<long>[0-9a-fA-F]{1,8})\}|x(?P<two>[0-9a-fA-F]{2})|u(?P<four>[0-9a-fA-F]{4})
              |U(?P<eight>[0-9a-fA-F]{8})))
    | (?P<control>\\[nrtfva])
    | (?P<set>\\(?:[dDwWsS]|[pP](?:\{[^}]*\}|.)))
    | (?P<escape>\\.)
    | (?P<flags>\(\?(?P<letters>[a-zA-Z-]+)(?P<scope>[:)]))
    | (?P<class>\[)
    | (?P<dot>\.)
    | (?P<bracket>[()])
    | (?P<literal>[\x00-\x1f"])
    | [^\\\[.()\x00-\x1f"]+
    """,
    re.VERBOSE | re.DOTALL,
)
_CONTROLS = dict(zip("nrtfva", "\n\r\t\f\v\a", strict=True))


def _quoted(regex: str, *, all_dots: bool = False) -> str:
    """Of the strings whose texts match it. ``all_dots``: a dot is a new line, too. Raises ValueError."""
    parts, dots, at = list[str](), [all_dots], 0
    while at < len(regex):
        found = _PIECE.match(regex, at)
        if found is None:  # a backslash at its end
            raise ValueError("the expression ends in a backslash")
        piece, kind = found[0], found.lastgroup
        if kind == "class":
            piece = regex[at : _class_end(regex, at)]
        elif kind == "flags":
            dots = _scoped(dots, found["letters"], found["scope"])
        elif piece == "(":
            dots.append(dots[-1])
        elif piece == ")" and len(dots) > 1:
            dots.pop()
        at += len(piece)
        parts.append(_piece(found, piece, dots[-1]))
    return "".join(parts)


def _piece(found: re.Match[str], piece: str, all_dots: bool) -> str:
    match found.lastgroup:
        case "code":
            number = int(found["long"] or found["two"] or found["four"] or found["eight"], 16)
            char = chr(number) if number < 128 else ""
        case "control":
            char = _CONTROLS[piece[1]]
        case "escape":
            char = piece[1]
        case "literal":
            char = piece
        case "set" | "class":
            return _set(piece)
        case "dot":
            return _set(r"[\x{0}-\x{10FFFF}]" if all_dots else r"[^\n]")
        case _:
            return piece
    return _escaped(char) if char in _ESCAPES else piece


def _scoped(dots: list[bool], letters: str, scope: str) -> list[bool]:
    """What a dot is after flags, in each group that is open: ``(?s:`` opens one, ``(?s)`` changes the innermost."""
    on, _, off = letters.partition("-")
    if not set(on + off) <= set("ims"):
        raise ValueError(f"the flags {letters[:16]!r} cannot be held in a string of JSON")
    now = ("s" in on or dots[-1]) and "s" not in off
    return [*dots, now] if scope == ":" else [*dots[:-1], now]


def _class_end(regex: str, at: int) -> int:
    """Index after the class that begins there. A bracket that would close it at once is one of its characters."""
    depth = 0
    while at < len(regex):
        char = regex[at]
        at += 1 + (char == "\\")
        if char == "[":
            depth += 1
            at += regex.startswith("^", at)
            at += regex.startswith("]", at)
        elif char == "]":
            depth -= 1
            if depth == 0:
                return at
    raise ValueError("a class of characters is not closed")


def _set(one: str) -> str:
    """Of what matches one character."""
    return _small_set(one) if len(one) < 100 else _small_set.__wrapped__(one)


@lru_cache(maxsize=1024)
def _small_set(one: str) -> str:
    """Which of those with an escape it matches, the grammar engine says."""
    mask = _compile(LLMatcher.grammar_from_regex(one)).compute_bitmask()
    first = {byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1}
    escaped = [char for char in _ESCAPES if ord(char) in first]
    if not escaped:
        return one
    return f"(?:[{one}--{_ESCAPED}]|{_escaped(escaped)})" if len(first) > len(escaped) else _escaped(escaped)


def _escaped(chars: Iterable[str]) -> str:
    """The expression of their escapes, whose letters are small whatever flags there are."""
    escapes = [_ESCAPES[char] for char in chars]
    short = "".join(escape[1] for escape in escapes if len(escape) == 2).replace("\\", "\\\\")
    options = [f"[{short}]"] if short else []
    for start in ("u000", "u001"):
        if digits := "".join(escape[-1] for escape in escapes if escape[1:-1] == start):
            options.append(f"{start}[{digits}]")
    return rf"(?-i:\\(?:{'|'.join(options)}))"


# -- grammars ----------------------------------------------------------------------------------------------------------

_STRING = r'"(?:\\.|[^"\\\n])*"'
_TOKEN = re.compile(
    rf"""
    (?P<range>(?P<low>{_STRING})[ \t]*\.\.[ \t]*(?P<high>{_STRING}))
    | (?P<string>{_STRING}i?)
    | (?P<comment>(?:\#|//)[^\n]*)
    | (?P<regex>/(?:\\.|[^/\\])+/[a-z]*)
    | (?P<open>["/])
    | (?P<import>%import\b[^\n\#/]*)
    | (?P<beyond>@[\w-]+|<[^<>\s]+>|%(?!ignore\b)\w+)
    | [^"\#/@<%]+ | .
    """,
    re.VERBOSE | re.DOTALL,
)
_IMPORT = re.compile(
    r"%import\s+common\s*(?:\.\s*(?P<one>\w+)\s*(?:->\s*(?P<alias>\w+)\s*)?|\((?P<many>[\w\s,]+)\)\s*)"
)
_ATTRIBUTES = re.compile(r"^[ \t]*[?!]*_?[a-z][\w-]*[ \t]*\[", re.MULTILINE)
_NEGATION = re.compile(r"~(?![ \t]*\d)")


def _quoted_lark(text: str) -> str:
    """A grammar whose terminals are as they are written within quotes.

    All escapes begin alike, and the grammar engine's lexer never goes back: where one terminal may end or go on with an
    escape, another cannot begin with one. So a grammar without recursion becomes a single terminal.

    Raises:
        ValueError: it has more than texts in it; or recursion, and several terminals with escapes.
    """
    pieces = []
    for found in _TOKEN.finditer(f"\n{text}"):
        if found.lastgroup == "open":  # at once: to go on from there would take quadratic time
            raise ValueError(f"what begins with {found[0]} at character {found.start() - 1} has no end")
        pieces.append((found.lastgroup, found[0], found))
    bare = "".join(piece if kind is None else " " for kind, piece, _ in pieces)
    if attributes := _ATTRIBUTES.search(bare):
        raise ValueError(f"the attributes of {attributes[0].strip()[:-1][:64]} cannot be held within a call")
    if _NEGATION.search(bare):  # it would match quotes
        raise ValueError("the operator ~ cannot be held in a string of JSON")
    quoted = [(kind, _token(kind, piece, found)) for kind, piece, found in pieces]
    if "%ignore" not in bare:
        single = "".join(_as_terminals(piece) if kind is None else piece for kind, piece in quoted)
        try:
            _compile(LLMatcher.grammar_from_lark(made := f"{single}\nstart: RULE_START\n"))
            return made
        except ValueError as error:
            if "circular" not in str(error):
                raise
    if len(own := _with_escapes(pieces, [piece for _, piece in quoted])) > 1:
        why = "within a string of JSON a grammar with recursion or %ignore may have quotes, backslashes and control"
        raise ValueError(f"{why} characters in one terminal, not in {len(own)}: {', '.join(sorted(own))[:120]}")
    return "".join(piece for _, piece in quoted)


def _as_terminals(rules: str) -> str:
    """Rules, without their strings and expressions, as terminals: names are capitals, and have no marks or aliases."""
    unmarked = re.sub(r"(?<=\n)[ \t]*[!?]+", "", re.sub(r"->[ \t]*[\w-]+", "", rules))
    return re.sub(r"(?<![\w-])_?[a-z][a-z0-9_-]*", lambda name: f"RULE_{name[0].upper()}", unmarked)


def _with_escapes(pieces: Iterable[tuple[str | None, str, Any]], quoted: Iterable[str]) -> set[str]:
    """Terminals, by their names if they have one, that are other ones within quotes."""
    found, current = set[str](), ""
    for (kind, piece, _), now in zip(pieces, quoted, strict=True):
        if kind is None:
            heads = re.findall(r"\n[ \t]*[?!]*(\w[\w-]*)[ \t]*:", piece)
            current = heads[-1] if heads else "" if piece == "%" else current
        elif kind == "import":
            found |= _COMMON.keys() & re.findall(r"\w+", piece)
        elif kind != "comment" and piece != now:
            found.add(current if current.isupper() else piece)
    return found


def _token(kind: str | None, piece: str, found: re.Match[str]) -> str:
    match kind:
        case "comment":
            return ""
        case "string":
            return _string(piece)
        case "regex":
            regex, _, flags = piece[1:].rpartition("/")
            if "x" in flags:
                raise ValueError(f"the flags {flags[:16]!r} cannot be held in a string of JSON")
            return f"/{_quoted(regex, all_dots='s' in flags)}/{flags}"
        case "range":
            low, high = _text_of(found["low"]), _text_of(found["high"])
            if len(low) != 1 or len(high) != 1:
                raise ValueError(f"the range {piece[:64]} is not of two characters")
            return f"/{_set(f'[{_code(low)}-{_code(high)}]')}/"
        case "import":
            return _imported(piece)
        case "beyond":
            raise ValueError(f"{piece[:64]} cannot stand in a text that is written as JSON")
    return piece


def _code(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def _text_of(literal: str) -> str:
    """Of a string as Lark writes it: as JSON does, and with two hexadecimal digits."""
    as_json = re.sub(r"\\(?:x([0-9a-fA-F]{2})|.)", lambda m: f"\\u00{m[1]}" if m[1] else m[0], literal)
    text: str = json.loads(as_json)
    return text


def _string(literal: str) -> str:
    flag = "i" if literal.endswith("i") else ""
    text = _text_of(literal.removesuffix("i"))
    if not any(char in _ESCAPES for char in text):
        return literal
    parts = [_escaped(char) if char in _ESCAPES else char if char.isalnum() else _code(char) for char in text]
    return f"/{''.join(parts)}/{flag}"


def _imported(statement: str) -> str:
    found = _IMPORT.fullmatch(statement)
    if found is None:
        raise ValueError(f"{statement.strip()[:64]} is no import of Lark's common terminals")
    made = []
    for name in [found["one"]] if found["one"] else re.findall(r"\w+", found["many"]):
        local = found["alias"] or name
        if name in _COMMON:
            made.append(f"{local}: {terminal(_quoted(_COMMON[name]))}")
        elif name in _PLAIN:
            made.append(f"%import common.{name} -> {local}")
        else:
            raise ValueError(f"common.{name[:64]} cannot be imported here: write out what it is")
    return "\n".join(made)
