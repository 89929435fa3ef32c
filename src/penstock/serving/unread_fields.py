"""Fields of a body that its shape does not read: refused where they would change the answer; else told to the operator,
once in a while, since a client must not fill the log with their names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from penstock.serving import limits
from penstock.serving.errors import unsupported
from penstock.serving.schemas import ModelRequest

SHOWN = 300
"""Characters of names in one line."""

_IGNORED = frozenset(
    "context_management metadata prediction prompt_cache_key request_id safety_identifier store user verbosity".split()
)
"""Fields that cannot make an answer wrong. ``context_management`` has Anthropic's servers edit the history of a long
conversation; here the model reads all of it."""


def unknown_fields(fields: Iterable[str], shape: type[ModelRequest]) -> list[str]:
    """Those this server has never heard of, and ignores."""
    return sorted(set(fields) - set(shape.__struct_fields__) - set(shape.HARMLESS) - _IGNORED)


def refuse_unsupported(fields: Mapping[str, object], shape: type[ModelRequest]) -> None:
    """Raises HTTPError(unsupported_parameter) rather than answering as if the field had not been sent."""
    for name, harmless in shape.HARMLESS.items():
        value = fields.get(name)
        value = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
        if value is not None and not any(value == one and _is_flag(value) == _is_flag(one) for one in harmless):
            raise unsupported(name)


def _is_flag(value: object) -> bool:
    """To Python, 0 is false."""
    return isinstance(value, bool)


class NotedFields:
    """Names that were told in the last NOTED_SECONDS, MAX_FIELDS_NOTED of them at most. Any thread may ask.

    Args:
        says: what a line says of them.
    """

    def __init__(self, says: str = "a request carries unknown fields, which are ignored") -> None:
        self._says = says
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._until = 0.0
        self._untold = 0

    def line(self, names: Sequence[str], now: float | None = None) -> str | None:
        """What the log shall say of a request that carries such fields; None if it is known, or too much.

        Args:
            now: seconds of a clock that never goes back; the monotonic one by default.
        """
        if not names:
            return None
        now = time.monotonic() if now is None else now
        with self._lock:
            if now >= self._until:
                self._until, untold = now + limits.NOTED_SECONDS, self._untold
                self._told.clear()
                self._untold = 0
            else:
                untold = 0
            fresh = [name for name in names if name[:SHOWN] not in self._told]
            room = max(0, limits.MAX_FIELDS_NOTED - len(self._told))
            self._untold += len(fresh[room:])
            fresh = fresh[:room]
            self._told.update(name[:SHOWN] for name in fresh)
        if not fresh and not untold:
            return None
        before = f" (and {untold} more in the time before)" if untold else ""
        return f"{self._says}{before}: {fresh!r:.{SHOWN}}"
