"""The protobuf wire format, as far as model files use it (protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | float | bytes


class WireError(ValueError):
    """The bytes are not a protobuf message."""


def fields(message: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message in order: (number, value).

    A varint comes as an unsigned integer (``signed`` makes an int32 or int64 of it), a 32-bit field as a float, since
    model files use them for nothing else, a 64-bit field and a length-delimited one as bytes.

    Raises:
        WireError: the message ends early, or is not one.
    """
    data, at, end = memoryview(message), 0, len(message)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError(f"field number 0 before byte {at}")
        value: Value
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 2:
                size, at = _varint(data, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:  # groups, which nobody has written since 2008
                raise WireError(f"wire type {kind} before byte {at}")
            if size > end - at:
                raise WireError(f"field {number} ends at byte {at + size} of a message of {end} bytes")
            raw = bytes(data[at : at + size])
            value, at = (struct.unpack("<f", raw)[0] if kind == 5 else raw), at + size
        yield number, value


def signed(value: Value) -> int:
    """A varint as the int32 or int64 it encodes: negative ones are sign-extended to 64 bits.

    Raises:
        WireError: it is not a varint.
    """
    if not isinstance(value, int):
        raise WireError("a number was expected")
    return value - (1 << 64) if value >> 63 else value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[at : at + 10]:
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise WireError(f"a number does not end before byte {at}")
