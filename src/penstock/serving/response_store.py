"""Responses that were asked to be kept, and the conversations that led to them: in memory, the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec

from penstock.serving.errors import HTTPError
from penstock.serving.gate import current
from penstock.serving.limits import MAX_RESPONSE_BYTES, MAX_STORED_RESPONSES


class Stored(NamedTuple):
    """A response as it was sent, the items of its request, and all items of the conversation before that."""

    response: dict[str, Any]
    before: list[dict[str, Any]]
    given: list[dict[str, Any]]

    @property
    def items(self) -> list[dict[str, Any]]:
        """What a response that follows this one goes on from."""
        return [*self.before, *self.given, *self.response["output"]]

    def size(self) -> int:
        """In bytes, as JSON. Of a long conversation it takes milliseconds."""
        return len(msgspec.json.encode(self))


class ResponseStore:
    """What the caller's tenant has had kept; of others there is nothing."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[Stored, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, stored: Stored, size: int) -> None:
        """One that is larger than all there may be is not kept."""
        self._kept[_own(stored.response["id"])] = stored, size
        self._bytes += size
        while len(self._kept) > MAX_STORED_RESPONSES or self._bytes > MAX_RESPONSE_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1][1]

    def get(self, identifier: str, param: str | None = None) -> Stored:
        """Raises HTTPError: (response_not_found)."""
        if _own(identifier) not in self._kept:
            raise HTTPError(
                "response_not_found",
                f"There is no response {identifier[:64]!r}",
                why=f"it was not stored, or was deleted, or is not among the last {MAX_STORED_RESPONSES}",
                fix="send the whole conversation as input",
                param=param,
                status=404,
            )
        return self._kept[_own(identifier)][0]

    def delete(self, identifier: str) -> None:
        """Raises HTTPError: (response_not_found)."""
        self.get(identifier)
        self._bytes -= self._kept.pop(_own(identifier))[1]


def _own(identifier: str) -> tuple[str, str]:
    return current.get().tenant, identifier
