"""Frames: a length of four bytes, little-endian, then so many bytes."""

from __future__ import annotations

import socket
from contextlib import suppress

from penstock.base import EngineError

MAX_FRAME = 64 << 20
"""Bytes of one frame. The largest there are hold the tokens of a prompt, or the log-probabilities of one."""

_LENGTH = 4


class WireError(EngineError):
    """What came over a wire cannot be read. The connection it came over is of no use any more."""


def bad_frame(why: str) -> WireError:
    return WireError("bad_frame", "A frame cannot be read", why=why, fix="report this")


class Connection:
    """One end of a socket. Any thread may send, one at a time; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb", buffering=1 << 16)

    def be_patient(self, seconds: float) -> None:
        """The other end counts as dead when it takes or says nothing for so long."""
        self._sock.settimeout(seconds)

    def send(self, payload: bytes) -> None:
        """Waits until the other end has room. Raises OSError if there is none any more."""
        self._sock.sendall(len(payload).to_bytes(_LENGTH, "little") + payload)

    def receive(self) -> bytes | None:
        """The next frame; None when the other end has closed or has died.

        Raises:
            WireError: (bad_frame) a frame above MAX_FRAME, or the end of the stream within one.
        """
        head = self._read(_LENGTH)
        if not head:
            return None
        length = int.from_bytes(head, "little")
        if len(head) == _LENGTH and length > MAX_FRAME:
            raise bad_frame(f"it says it has {length} bytes, and at most {MAX_FRAME} are taken")
        payload = self._read(length)
        if len(head) < _LENGTH or len(payload) < length:
            raise bad_frame("the stream ended within it")
        return payload

    def close(self) -> None:
        """Wakes whoever receives, at either end."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()  # the reader's buffer holds on to it until it has seen the end

    def _read(self, count: int) -> bytes:
        try:
            payload: bytes = self._reader.read(count)
            return payload
        except (OSError, ValueError):  # reset by the other end, or closed at this one
            return b""
