"""The ledger of one pool of KV blocks. This file alone changes the state of a block.

free    holds nothing
open    taken by requests and still being filled, or full but not (or not yet) findable
sealed  full, findable under its hash, read by requests
idle    sealed and read by nobody; kept for a prefix hit until its place is needed
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict


class BlockPool:
    """``total`` blocks, of which ``free + open + sealed + idle == total`` at any moment.

    Idle blocks are kept by owner, those least recently used first. Who has the most of them loses the next one: whoever
    floods the cache evicts what is his own.
    """

    __slots__ = ("by_key", "free", "idle", "idle_count", "keys", "owners", "refs", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.refs = [0] * total
        self.keys: list[bytes | None] = [None] * total
        self.by_key: dict[bytes, int] = {}
        self.free = list(range(total - 1, -1, -1))
        self.owners = [b""] * total  # of blocks with a key
        self.idle: defaultdict[bytes, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self.idle_count = 0

    @property
    def available(self) -> int:
        """Blocks that ``take`` can still hand out."""
        return len(self.free) + self.idle_count

    def take(self) -> int:
        """A block to write to: a free one, else the one idle for longest of those whose owner has the most, which is
        forgotten."""
        if self.free:
            block = self.free.pop()
        else:
            owner = max(self.idle, key=lambda owner: len(self.idle[owner]))
            block = next(iter(self.idle[owner]))
            self._leave(block)
            self.reopen(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reader of an open, sealed or idle block."""
        if self.refs[block] == 0:
            self._leave(block)
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One reader less; the last one leaves the block idle if it can be found again, else free."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self.keys[block] is None:
                self.free.append(block)
            else:
                self.idle[self.owners[block]][block] = None
                self.idle_count += 1

    def seal(self, block: int, key: bytes, owner: bytes = b"") -> None:
        """Makes a full block findable. A twin of a block already sealed stays open: nobody needs it twice."""
        if key not in self.by_key:
            self.keys[block] = key
            self.by_key[key] = block
            self.owners[block] = owner

    def reopen(self, block: int) -> None:
        """Makes a block unfindable again."""
        key = self.keys[block]
        if key is not None:
            del self.by_key[key]
            self.keys[block] = None

    def _leave(self, block: int) -> None:
        """It is idle no more."""
        blocks = self.idle[self.owners[block]]
        del blocks[block]
        self.idle_count -= 1
        if not blocks:
            del self.idle[self.owners[block]]

    def counts(self) -> dict[str, int]:
        sealed = len(self.by_key) - self.idle_count
        held = sum(1 for refs in self.refs if refs)
        return {"free": len(self.free), "open": held - sealed, "sealed": sealed, "idle": self.idle_count}

    def check(self, readers: dict[int, int]) -> None:
        """Raises AssertionError unless the books balance with ``readers``, block -> references found outside."""
        assert all(self.refs[b] == readers.get(b, 0) for b in range(self.total)), "references disagree"
        assert sum(self.counts().values()) == self.total, f"{self.counts()} do not add up to {self.total}"
        assert all(not self.refs[b] and self.keys[b] is None for b in self.free), "a free block is in use"
        assert self.idle_count == sum(map(len, self.idle.values())), "idle blocks are miscounted"
        idle = [(owner, b) for owner, blocks in self.idle.items() for b in blocks]
        assert all(not self.refs[b] and self.keys[b] is not None for _, b in idle), "an idle block is in use"
        assert all(self.owners[b] == owner for owner, b in idle), "an idle block is not its owner's"
        assert all(self.keys[b] == key for key, b in self.by_key.items()), "the index points at another block"
        assert len(set(self.free)) == len(self.free), "a block is free twice"
