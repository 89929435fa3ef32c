"""Responses that were asked to be kept, and the conversations that led to them: in memory, the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec

from penstock.serving.errors import HTTPError
from penstock.serving.gate import current
from penstock.serving.limits import MAX_RESPONSE_BYTES, MAX_STORED_RESPONSES
from penstock.serving.response_items import ResponseObject


class Stored(NamedTuple):
    """A response as it was sent, the items of its request, and all items of the conversation before that."""

    response: ResponseObject
    before: list[dict[str, Any]]
    given: list[dict[str, Any]]

    @property
    def items(self) -> list[dict[str, Any]]:
        """What a response that follows this one goes on from."""
        return [*self.before, *self.given, *self.response["output"]]

    def size(self) -> int:
        """In bytes, as JSON. Of a long conversation it takes milliseconds."""
        return len(msgspec.json.encode(self))


class _Share:
    """What one tenant has: by id, the oldest first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self.bytes = 0

    def drop(self, identifier: str | None = None) -> int:
        """One, or the oldest; how many bytes it had."""
        size = (self.kept.popitem(last=False)[1] if identifier is None else self.kept.pop(identifier))[1]
        self.bytes -= size
        return size


class ResponseStore:
    """What the caller's tenant has had kept; of others there is nothing.

    Where there is no more room, the tenant that has the most of it loses its oldest: nobody empties another's share.
    """

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._bytes = self._count = 0

    def __len__(self) -> int:
        return self._count

    def keep(self, stored: Stored, size: int) -> None:
        """One that is larger than all there may be is not kept."""
        share = self._shares.setdefault(current.get().tenant, _Share())
        share.kept[stored.response["id"]] = stored, size
        share.bytes += size
        self._bytes += size
        self._count += 1
        while self._count > MAX_STORED_RESPONSES:
            self._drop(max(self._shares, key=lambda tenant: len(self._shares[tenant].kept)))
        while self._bytes > MAX_RESPONSE_BYTES:
            self._drop(max(self._shares, key=lambda tenant: self._shares[tenant].bytes))

    def get(self, identifier: str, param: str | None = None) -> Stored:
        """Raises HTTPError: (response_not_found)."""
        share = self._shares.get(current.get().tenant)
        if share is None or identifier not in share.kept:
            raise HTTPError(
                "response_not_found",
                f"There is no response {identifier[:64]!r}",
                why=f"it was not stored, or was deleted, or is not among the last {MAX_STORED_RESPONSES}",
                fix="send the whole conversation as input",
                param=param,
                status=404,
            )
        return share.kept[identifier][0]

    def delete(self, identifier: str) -> None:
        """Raises HTTPError: (response_not_found)."""
        self.get(identifier)
        self._drop(current.get().tenant, identifier)

    def _drop(self, tenant: str, identifier: str | None = None) -> None:
        share = self._shares[tenant]
        self._bytes -= share.drop(identifier)
        self._count -= 1
        if not share.kept:
            del self._shares[tenant]
