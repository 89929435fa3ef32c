"""Answers as JSON, piece by piece: others may have a turn of the interpreter in between.

Encoded in one go, 4 MB of log-probabilities hold up the event loop for 55 ms, whichever thread encodes them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import msgspec
from starlette.responses import Response, StreamingResponse

from penstock.serving.edge import as_json, off_loop
from penstock.serving.limits import INLINE_BYTES, JOINED_BYTES

PIECE = 16 << 10
"""Bytes encoded at a time, about: 0.2 ms."""

VALUES = 4096
"""Numbers, or four times as many characters, encoded at a time."""

_LEAST = 8
"""Bytes that a value is taken to have at least, its name or comma with it."""

_NUMBERS = (int, float)
_encode = msgspec.json.Encoder().encode


async def answered(value: object) -> Response:
    """A whole answer. A long one is encoded in a thread."""
    if (size := size_of(value)) <= INLINE_BYTES:
        return as_json(value)
    return in_pieces(await off_loop(size, partial(told, value)))


def size_of(value: object, most: int = INLINE_BYTES) -> int:
    """About how many bytes of JSON it makes. What is longer than ``most`` is looked at no further, so that it costs
    little to ask.
    """
    size, rest = 0, [value]
    while rest and size <= most:
        one = rest.pop()
        size += _LEAST
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, msgspec.Raw):
            size += len(memoryview(one))
        elif isinstance(one, list):
            size += _LEAST * len(one)
            if size <= most and not _of_numbers(one):
                rest += one
        elif isinstance(one, dict):
            size += sum(map(len, one))
            rest += one.values()
        elif isinstance(one, msgspec.Struct):
            rest += [getattr(one, name) for name in one.__struct_fields__]
        elif hasattr(one, "__next__"):  # quicker than to ask whether it is an Iterator
            return most + 1
    return size


def told(value: object) -> list[bytes]:
    """The JSON of a value, in pieces. Names of members are texts; an iterator makes a list that is never there as a
    whole."""
    out: list[bytes] = []
    parts: list[bytes] = []
    size = 0
    for part in _pieces(value):
        parts.append(part)
        size += len(part)
        if size > PIECE:
            out.append(b"".join(parts))
            parts, size = [], 0
    return [*out, b"".join(parts)]


def _pieces(value: object) -> Iterator[bytes]:
    if size_of(value, PIECE) <= PIECE:
        yield _encode(value)
    elif isinstance(value, str):
        texts = (_encode(value[at : at + 4 * VALUES])[1:-1] for at in range(0, len(value), 4 * VALUES))
        yield from (b'"', *texts, b'"')
    elif isinstance(value, Iterator):
        yield from _sliced(value)
    elif isinstance(value, list):
        yield from _sliced(iter(value)) if _of_numbers(value) else _items(value)
    elif isinstance(value, dict):
        yield from _members(value.items())
    elif isinstance(value, msgspec.Struct) and not (
        value.__struct_config__.omit_defaults or value.__struct_config__.tag
    ):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        members = ((name, getattr(value, field)) for name, field in names)
        yield from _members((name, member) for name, member in members if member is not msgspec.UNSET)
    else:
        yield _encode(value)


def _sliced(values: Iterator[object]) -> Iterator[bytes]:
    before = b"["
    while some := list(islice(values, VALUES)):
        yield before + _encode(some)[1:-1]
        before = b","
    yield b"[]" if before == b"[" else b"]"


def _items(values: list[object]) -> Iterator[bytes]:
    """Those that are short together, as many as make a piece."""
    before, some, size = b"[", list[object](), 0
    for value in values:
        more = size_of(value, PIECE)
        if some and size + more > PIECE:
            yield before + _encode(some)[1:-1]
            before, some, size = b",", [], 0
        if more > PIECE:
            yield before
            yield from _pieces(value)
            before = b","
        else:
            some.append(value)
            size += more
    yield (before + _encode(some)[1:-1] if some else b"") + b"]"


def _members(members: Iterable[tuple[str, object]]) -> Iterator[bytes]:
    before = b"{"
    for name, member in members:
        yield before + _encode(name) + b":"
        yield from _pieces(member)
        before = b","
    yield b"}"


def _of_numbers(values: list[object]) -> bool:
    """The last tells: where some are missing, it is the first."""
    return bool(values) and isinstance(values[-1], _NUMBERS)


def in_pieces(body: Sequence[bytes]) -> Response:
    """An answer that is sent as its client takes it: a long one in one piece would be copied twice on its way."""
    size = sum(map(len, body))
    if size <= JOINED_BYTES:
        return Response(b"".join(body), media_type="application/json")

    async def each() -> AsyncGenerator[bytes, None]:
        for piece in body:
            yield piece

    return StreamingResponse(each(), headers={"content-length": str(size)}, media_type="application/json")
