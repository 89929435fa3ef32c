"""Long lists out of a body, piece by piece: others may have a turn of the interpreter in between.

Decoded in one piece, 8 MB of them hold up the event loop for 60 ms, whichever thread decodes them, and 20 ms more when
they are freed as a list.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import msgspec
import numpy as np

from penstock.serving.edge import unescaped
from penstock.serving.errors import HTTPError
from penstock.serving.limits import INLINE_BYTES, MAX_JSON_VALUES, MAX_TEXTS

PIECE = 16 << 10
"""Bytes decoded at a time: 0.2 ms."""

_ONE, _SEVERAL = msgspec.Raw(b"[0]"), msgspec.Raw(b"[[0]]")
_SPACE = b" \t\r\n"


def take_ids(
    fields: Mapping[str, msgspec.Raw], names: tuple[str, ...]
) -> tuple[dict[str, msgspec.Raw], dict[str, array[int] | list[array[int]]]]:
    """The fields of a body, a short list in the place of many ids, and those ids.

    Args:
        names: fields that may be a list of ids, or several lists. What is of neither form stays where it is.
    """
    taken = {}
    for name in names:
        if len(raw := memoryview(fields.get(name, b""))) > INLINE_BYTES:
            ids = _one_or_several(bytes(raw))
            if ids:  # an empty list is for the shape to judge
                taken[name] = ids
    short = {name: _ONE if isinstance(ids, array) else _SEVERAL for name, ids in taken.items()}
    return {**fields, **short}, taken


def _one_or_several(raw: bytes) -> array[int] | list[array[int]] | None:
    if raw[:1] != b"[" or raw[1:100].lstrip(_SPACE)[:1] != b"[":
        return _ids(raw)
    if raw.count(b"[") > MAX_TEXTS + 1:
        return None
    lists = [_ids(bytes(each)) for each in msgspec.json.decode(raw, type=list[msgspec.Raw])]
    return None if None in lists else [each for each in lists if each is not None]


def _ids(raw: bytes) -> array[int] | None:
    """None if it is something else than a list of numbers that can be ids."""
    if raw[:1] != b"[":
        return None
    ids, start, end = array("I"), 1, len(raw) - 1
    try:
        while start < end:
            cut = raw.find(b",", start + PIECE, end)
            cut = end if cut < 0 else cut
            ids.extend(msgspec.json.decode(b"[" + raw[start:cut] + b"]", type=list[int]))
            start = cut + 1
    except (msgspec.DecodeError, OverflowError):
        return None
    return ids


def refuse_many_values(body: bytes, sign: bytes) -> None:
    """Raises HTTPError: (too_many_values) it has more than MAX_JSON_VALUES of a sign that stands between values."""
    if body.count(sign) <= MAX_JSON_VALUES:
        return
    values, quoted = 0, False
    for text in unescaped(body):
        inside = np.bitwise_xor.accumulate(text == ord('"')) ^ quoted
        values, quoted = values + int(np.count_nonzero((text == ord(sign)) & ~inside)), bool(inside[-1])
    if values > MAX_JSON_VALUES:
        raise HTTPError(
            "too_many_values",
            "The body has too many values",
            why=f"{values}, and at most {MAX_JSON_VALUES} that are not token ids (0 to {2**32 - 1}) of a prompt",
            fix="split it into several requests",
        )
