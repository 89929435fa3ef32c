"""The ledger of one pool of KV blocks. This file alone changes the state of a block.

free    holds nothing
open    taken by requests and still being filled, or full but not (or not yet) findable
sealed  full, findable under its hash, read by requests
idle    sealed and read by nobody; kept for a prefix hit until its place is needed
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """``total`` blocks, of which ``free + open + sealed + idle == total`` at any moment."""

    __slots__ = ("by_key", "free", "idle", "keys", "refs", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.refs = [0] * total
        self.keys: list[bytes | None] = [None] * total
        self.by_key: dict[bytes, int] = {}
        self.free = list(range(total - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # the least recently used comes first

    @property
    def available(self) -> int:
        """Blocks that ``take`` can still hand out."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A block to write to: a free one, else the one idle for longest, which is forgotten."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            self.reopen(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reader of an open, sealed or idle block."""
        if self.refs[block] == 0:
            del self.idle[block]
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One reader less; the last one leaves the block idle if it can be found again, else free."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self.keys[block] is None:
                self.free.append(block)
            else:
                self.idle[block] = None

    def seal(self, block: int, key: bytes) -> None:
        """Makes a full block findable. A twin of a block already sealed stays open: nobody needs it twice."""
        if key not in self.by_key:
            self.keys[block] = key
            self.by_key[key] = block

    def reopen(self, block: int) -> None:
        """Makes a block unfindable again."""
        key = self.keys[block]
        if key is not None:
            del self.by_key[key]
            self.keys[block] = None

    def counts(self) -> dict[str, int]:
        sealed = len(self.by_key) - len(self.idle)
        held = sum(1 for refs in self.refs if refs)
        return {"free": len(self.free), "open": held - sealed, "sealed": sealed, "idle": len(self.idle)}

    def check(self, readers: dict[int, int]) -> None:
        """Raises AssertionError unless the books balance with ``readers``, block -> references found outside."""
        assert all(self.refs[b] == readers.get(b, 0) for b in range(self.total)), "references disagree"
        assert sum(self.counts().values()) == self.total, f"{self.counts()} do not add up to {self.total}"
        assert all(not self.refs[b] and self.keys[b] is None for b in self.free), "a free block is in use"
        assert all(not self.refs[b] and self.keys[b] is not None for b in self.idle), "an idle block is in use"
        assert all(self.keys[b] == key for key, b in self.by_key.items()), "the index points at another block"
        assert len(set(self.free)) == len(self.free), "a block is free twice"
