"""What is asked: sessions of turns, whose prompts are pieces of pseudo-random content or text that was given."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.bench.load.lengths import Lengths

WORDS = """
the of and a to in he was that it his her with as had for she not at but be on they have him which said from all this
by there were one out so when them would into up who what will no then more about could now some little only like time
two very see over man down way its good made must day know before great after come old other how did might never long
where here came than any house again too first went hand eyes much their thought most well night looked away door
""".split()


@dataclass(frozen=True, slots=True)
class Piece:
    """So many tokens of content that ``name`` decides: two pieces of one name begin alike."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Attributes:
    pieces: of the prompt, one after another; empty if ``text`` is given.
    output: tokens asked for.
    """

    pieces: tuple[Piece, ...]
    output: int
    text: str = ""

    @property
    def asked(self) -> int | None:
        """Tokens of the prompt, without those of turns before; None for a text, whose tokens the server counts."""
        return sum(piece.tokens for piece in self.pieces) if self.pieces else None


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one conversation, each sent when the one before has been answered. ``at``: seconds at which a trace lets
    it begin."""

    turns: tuple[Turn, ...]
    at: float | None = None


class Writer(Protocol):
    """Turns pieces into a prompt as it is sent."""

    def __call__(self, pieces: Sequence[Piece]) -> str | list[int]: ...


@dataclass(frozen=True)
class TokenWriter:
    """Prompts of random token ids: exactly as long as asked."""

    vocabulary: int

    def __call__(self, pieces: Sequence[Piece]) -> list[int]:
        return [token for piece in pieces for token in _tokens(piece.name, piece.tokens, self.vocabulary)]


@dataclass(frozen=True)
class WordWriter:
    """Prompts of plain words, about as long as asked. ``per_word``: tokens of a word, as the server counts them;
    ``fixed``: tokens that it adds to each prompt."""

    per_word: float
    fixed: float = 0.0

    def __call__(self, pieces: Sequence[Piece]) -> str:
        words: list[str] = []
        owed = -self.fixed
        for piece in pieces:
            owed += piece.tokens
            count = max(0, round((owed - len(words) * self.per_word) / self.per_word))
            words += _words(piece.name, count)
        return " ".join(words) or WORDS[0]


@functools.lru_cache(1024)
def _tokens(name: str, count: int, vocabulary: int) -> tuple[int, ...]:
    rng = random.Random(name)
    return tuple(rng.randrange(vocabulary) for _ in range(count))


@functools.lru_cache(1024)
def _words(name: str, count: int) -> tuple[str, ...]:
    rng = random.Random(name)
    return tuple(rng.choice(WORDS) for _ in range(count))


def synthetic(
    count: int,
    inputs: Lengths,
    outputs: Lengths,
    seed: int,
    *,
    content: str = "",
    turns: int = 1,
    shared: int = 0,
    groups: int = 1,
) -> list[Session]:
    """Sessions of random content.

    Args:
        count: sessions.
        seed: of the lengths.
        content: names what the prompts say, so that a server's cache of prefixes knows none of them from a run before.
        inputs: tokens that each turn adds to the prompt, the shared ones not counted.
        shared: tokens at the head of each session that all of its group have in common.
        groups: sessions belong to them in turn.
    """
    rng = random.Random(f"workload {seed}")
    sessions = []
    for i in range(count):
        head = (Piece(f"{content} shared {i % groups}", shared),) if shared else ()
        made = []
        for j in range(turns):
            own = Piece(f"{content} own {i} {j}", inputs.draw(rng))
            made.append(Turn((*head, own) if j == 0 else (own,), outputs.draw(rng)))
        sessions.append(Session(tuple(made)))
    return sessions


def from_texts(texts: Iterable[Sequence[str]], outputs: Lengths, seed: int) -> list[Session]:
    """Sessions whose turns ask these texts."""
    rng = random.Random(f"workload {seed}")
    return [Session(tuple(Turn((), outputs.draw(rng), text) for text in turns)) for turns in texts]


def fitted(sessions: Sequence[Session], longest: int | None) -> tuple[list[Session], int]:
    """Sessions that fit into a context of ``longest`` tokens, and how many turns were cut or left out for it. A turn
    that does not fit loses tokens of its prompt, at the end; those after it are dropped."""
    if longest is None:
        return list(sessions), 0
    out, cut = [], 0
    for session in sessions:
        turns, history = [], 0
        for turn in session.turns:
            output = min(turn.output, max(1, longest - 1))
            room = longest - history - output
            if turn.asked is not None and turn.asked > room and room < 1:
                break
            pieces = _cut(turn.pieces, room)
            cut += pieces != turn.pieces or output != turn.output
            turns.append(Turn(pieces, output, turn.text))
            history += (turn.asked or 0) + output
        cut += len(session.turns) - len(turns)
        if turns:
            out.append(Session(tuple(turns), session.at))
    return out, cut


def _cut(pieces: tuple[Piece, ...], room: int) -> tuple[Piece, ...]:
    kept = []
    for piece in pieces:
        if room < 1:
            break
        kept.append(Piece(piece.name, min(piece.tokens, room)))
        room -= kept[-1].tokens
    return tuple(kept)
