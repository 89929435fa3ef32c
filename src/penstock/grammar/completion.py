"""How a text that is begun can be ended: short completions, found by trying.

A state of the grammar is a matcher over single bytes; a copy costs half a microsecond and a step a few. The search goes
down byte by byte. Forced bytes are taken at once; where there is a choice, JSON prefers what closes (a quote, a
bracket, a short number), and everything prefers bytes that have just become possible, since they are what the grammar
waited for, then bytes that this completion has used least, so that nothing is repeated for ever. If that leads nowhere,
a second search keeps several states at a time, all with different choices before them.

Nothing here is exhaustive: a completion that is returned is one, and None says that the search gave up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import NamedTuple

from llguidance import LLMatcher

from penstock.grammar.tokens import BYTE_END

Lexer = tuple[bool, bool]
"""Whether a JSON text ends inside a string, and after a backslash there."""

MAX_COMPLETION = 4096
"""Bytes of the longest completion that is looked for."""
BYTES_A_STEP = 64
"""Forced bytes that cost as much as a step."""
MAX_STEPS = 1500
"""Steps of matchers that one search may take: some 20 ms."""
WIDTH, BRANCHES = 6, 24
"""States that the second search keeps, and bytes it tries from each."""
BROAD_TURN = 4
"""When the second search has its turn."""
GIVE_UP = 300
"""Steps with the same choice after which a way is going nowhere."""
MAX_OPENINGS = 8
"""First bytes that are tried beside the best one."""

_RARE = [0 if chr(i).isalnum() and i < 0x80 else 1 if 0x20 < i < 0x7F and i != 0x5C else 2 for i in range(BYTE_END)]
"""Letters and digits first; control characters, spaces, backslashes and parts of other characters last."""
_AFTER_VALUE = b'}],:0nftT123456789"[{-'


@dataclass(slots=True)
class _State:
    matcher: LLMatcher
    text: bytes
    lexer: Lexer
    before: int = 0  # the choice one step earlier


@dataclass(slots=True)
class Meter:
    """Steps that a search may still take, and what the grammar engine said when a way went over its limits."""

    left: int
    error: str = ""


def bits(matcher: LLMatcher) -> int:
    """The bytes that may come next, as a set of bits; the end of the sequence is bit 256."""
    return int.from_bytes(matcher.compute_bitmask(), "little")


def scan(lexer: Lexer, text: bytes) -> Lexer:
    """Follows JSON strings."""
    inside, escaped = lexer
    if not escaped and 0x5C not in text:
        return inside ^ (text.count(0x22) % 2 == 1), False
    for byte in text:
        if escaped:
            escaped = False
        elif byte == 0x22:
            inside = not inside
        else:
            escaped = inside and byte == 0x5C
    return inside, escaped


def completions(
    matcher: LLMatcher, lexer: Lexer, meter: Meter, *, is_json: bool, hints: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """Completions of the state, the likeliest to be short first, for those who must find one with another property.

    The matcher is left as it was.

    Args:
        meter: what to spend; when the likely ones have been tried, on ways at random, the same ones each time.
        hints: JSON values that a valid text may hold, the likelier ones first, to be tried on those ways.
    """
    found = set[bytes]()
    if len(matcher.compute_ff_bytes()) > MAX_COMPLETION:
        return
    if matcher.is_error():
        meter.error = matcher.get_error()
        return
    openings = _openings(matcher, lexer, is_json)
    for turn in count():
        # The best way; then, in turn, ways with hints and other first bytes; then hints alone, for as long as it takes.
        opening = b"" if turn == 0 or turn % 2 else next(openings, b"")
        wander = _Wander(Random(turn), hints) if turn > 0 and not opening else None
        opened = matcher.deep_copy()
        meter.left -= 1
        if opened.consume_tokens(list(opening)):
            rest = _dive(_State(opened, opening, scan(lexer, opening)), is_json, meter, wander)
            if rest is None and turn == BROAD_TURN:
                rest = _broad(_State(matcher, b"", lexer), is_json, meter)
            if rest is not None and rest not in found:
                found.add(rest)
                yield rest
        if meter.left <= 0:
            return


def _openings(matcher: LLMatcher, lexer: Lexer, is_json: bool) -> Iterator[bytes]:
    order = _ranked(bits(matcher), 0, lexer, is_json, {})
    yield from (bytes([byte]) for byte in order[:MAX_OPENINGS])
    if lexer[0]:  # inside a string: a letter or a digit makes it another one
        yield from (bytes([byte]) for byte in b"a0_" if byte in order[MAX_OPENINGS:])


class _Wander(NamedTuple):
    """Chooses at random: now and then a hint, else the better the likelier."""

    random: Random
    hints: Sequence[bytes]

    def step(self, state: _State, ranked: list[int]) -> bytes:
        if self.hints and not state.lexer[1] and self.random.random() < 0.5:
            hint = self.hints[int(len(self.hints) * self.random.random() ** 3)]
            hint = hint[1:] if state.lexer[0] and hint.startswith(b'"') else hint
            if state.matcher.validate_tokens(list(hint)) == len(hint):
                return hint
        return bytes([next((byte for byte in ranked if self.random.random() < 0.5), ranked[0])])


def _dive(state: _State, is_json: bool, meter: Meter, wander: _Wander | None = None) -> bytes | None:
    """Always the best byte, or one at random; goes back over none."""
    used: dict[int, int] = {}
    same = 0
    meter.left -= 1
    for _ in range(MAX_STEPS):
        meter.left -= 1
        if state.matcher.is_accepting():
            return state.text
        if meter.left <= 0:
            return None
        step = state.matcher.compute_ff_bytes()
        if not step:
            choice = bits(state.matcher)
            ranked = _ranked(choice, state.before, state.lexer, is_json, used)
            same = same + 1 if choice == state.before else 0
            if not ranked or same > GIVE_UP:
                meter.error = meter.error or state.matcher.get_error()
                return None
            step = bytes([ranked[0]]) if wander is None else wander.step(state, ranked)
            state.before = choice
            used[ranked[0]] = used.get(ranked[0], 0) + 1
        state.text += step
        meter.left -= len(step) // BYTES_A_STEP
        if len(state.text) > MAX_COMPLETION:
            return None
        state.lexer = scan(state.lexer, step)
        if not state.matcher.consume_tokens(list(step)):
            meter.error = meter.error or state.matcher.get_error()
            return None
    return None


def _broad(start: _State, is_json: bool, meter: Meter) -> bytes | None:
    """Layer by layer, the best few states of each, all with different choices before them."""
    layer = [start]
    while layer and meter.left > 0:
        following: dict[tuple[int, Lexer], _State] = {}
        for state in layer:
            if state.matcher.is_accepting():
                return state.text
            choice = bits(state.matcher)
            forced = state.matcher.compute_ff_bytes()
            ranked = _ranked(choice, state.before, state.lexer, is_json, {})
            for step in [forced] if forced else [bytes([byte]) for byte in ranked[:BRANCHES]]:
                child = state.matcher.deep_copy()
                meter.left -= 1
                if len(state.text) + len(step) <= MAX_COMPLETION and child.consume_tokens(list(step)):
                    new = _State(child, state.text + step, scan(state.lexer, step), choice)
                    following.setdefault((bits(child), new.lexer), new)
        layer = list(islice(following.values(), WIDTH))
    return None


def _ranked(choice: int, before: int, lexer: Lexer, is_json: bool, used: dict[int, int]) -> list[int]:
    """The bytes of a choice, best first."""
    liked = b""
    if is_json:
        liked = _AFTER_VALUE if not lexer[0] else b"" if lexer[1] else b'"'
    first = [byte for byte in liked if choice >> byte & 1]
    if first and is_json and not lexer[0]:
        return first
    rest = [byte for byte in range(BYTE_END) if choice >> byte & 1 and byte not in liked]
    rest.sort(key=lambda byte: (before >> byte & 1, used.get(byte, 0), _RARE[byte]))
    return first + rest
