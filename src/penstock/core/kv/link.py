"""KVLink: the one way KV blocks travel, to a tier, to a peer, or over a priced wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block by content and place. ``key`` is its chained hash; ``block`` its index at the place."""

    group: int
    key: bytes
    block: int


class MoveTicket(Protocol):
    def wait(self) -> Sequence[bool]:
        """For each block whether it arrived whole (its checksum agreed). Never raises for a lost block."""
        ...


class KVLink(Protocol):
    def move(self, blocks: Sequence[BlockRef], source: str, target: str) -> MoveTicket:
        """Starts copying sealed blocks from one place to another; returns at once.

        Sources and targets are place names such as "device", "host", "disk" or a replica's id.
        """
        ...
