"""SentencePiece models (``tokenizer.model``): a ModelProto, read without protobuf (google/sentencepiece,
sentencepiece_model.proto)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from penstock.base import ModelFormatError
from penstock.formats.charsmap import Charsmap
from penstock.formats.files import read_bytes
from penstock.formats.protobuf import Value, WireError, fields, signed

MAX_MODEL_BYTES = 16 << 20
MAX_PIECES = 1 << 20
MAX_PIECE_CHARS = 512


class PieceKind(IntEnum):
    """What a piece is; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """Attributes:
    pieces: the id of a piece is its place.
    byte_fallback: characters that have no piece become pieces of one byte each.
    unk_id, bos_id, eos_id: -1 where there is none.
    charsmap: normalization rules, None for none.
    add_dummy_prefix: a text begins with a blank.
    remove_extra_whitespaces: blanks at both ends are dropped, runs of them become one.
    escape_whitespaces: a blank is written U+2581 in pieces.
    whitespace_is_suffix: the mark of a word is at its end.
    """

    pieces: tuple[Piece, ...]
    algorithm: Algorithm = Algorithm.UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    charsmap: Charsmap | None = None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_is_suffix: bool = False


def looks_like_sentencepiece(start: bytes) -> bool:
    """A ModelProto begins with its first piece: field 1, length-delimited. No line of base64 begins with that byte."""
    return start.startswith(b"\x0a")


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a model file.

    Raises:
        ModelFormatError: (file_missing) it cannot be read; (tokenizer_invalid) it is no such model.
    """
    data = read_bytes(path, MAX_MODEL_BYTES, "tokenizer_invalid")
    try:
        return parse_sentencepiece(data)
    except ValueError as error:  # a WireError and a UnicodeDecodeError are ValueErrors
        raise ModelFormatError(
            "tokenizer_invalid",
            f"{path} is not a usable SentencePiece model",
            why=str(error)[:300],
            fix="download the file again",
        ) from None


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Raises: ValueError: it is no such model."""
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in fields(data):
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer |= dict(fields(_message(value)))
        elif number == 3:
            normalizer |= dict(fields(_message(value)))
    check_pieces(pieces)
    charsmap = _message(normalizer.get(2, b""))
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=Algorithm(signed(trainer.get(3, Algorithm.UNIGRAM))),
        byte_fallback=_flag(trainer, 35, False),
        unk_id=_id(trainer, 40, 0, pieces),
        bos_id=_id(trainer, 41, 1, pieces),
        eos_id=_id(trainer, 42, 2, pieces),
        charsmap=Charsmap(charsmap) if charsmap else None,
        add_dummy_prefix=_flag(normalizer, 3, True),
        remove_extra_whitespaces=_flag(normalizer, 4, True),
        escape_whitespaces=_flag(normalizer, 5, True),
        whitespace_is_suffix=_flag(trainer, 24, False),
    )


def _piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceKind.NORMAL
    for number, value in fields(message):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3:
            kind = PieceKind(signed(value))
    return Piece(text, score, kind)


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises: ValueError: no tokenizer can have these."""
    if not pieces:
        raise ValueError("it has no pieces")
    ids: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if not piece.text or len(piece.text) > MAX_PIECE_CHARS:
            raise ValueError(f"piece {i} has {len(piece.text)} characters; 1 to {MAX_PIECE_CHARS} are possible")
        if not math.isfinite(piece.score):
            raise ValueError(f"piece {i} has the score {piece.score}")
        if ids.setdefault(piece.text, i) != i:
            raise ValueError(f"pieces {ids[piece.text]} and {i} are both {piece.text[:40]!r}")


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise WireError("a number stands where a message was expected")
    return value


def _flag(spec: dict[int, Value], number: int, default: bool) -> bool:
    return bool(signed(spec.get(number, default)))


def _id(spec: dict[int, Value], number: int, default: int, pieces: list[Piece]) -> int:
    value = signed(spec.get(number, default))
    if number in spec and value >= len(pieces):
        raise ValueError(f"special id {value} is not among its {len(pieces)} pieces")
    return value if 0 <= value < len(pieces) else -1
