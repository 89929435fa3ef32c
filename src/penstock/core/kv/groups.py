"""KVCache: the pools of all KV groups, and every request's hold on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.core.kv.blocks import BlockPool
from penstock.core.kv.prefix import BlockNames
from penstock.core.plan import NO_BLOCK, BlockCopy, StepPlan, TableWrite
from penstock.core.request import Request


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One KV group's pool: how many blocks there are, and the window of its layers (None: full attention)."""

    blocks: int
    window: int | None = None


class KVCache:
    """A request holds, in each group, the blocks of positions [computed - window + 1, planned).

    Every method that changes a table of a resident request writes the change into the plan being drafted.
    """

    def __init__(self, specs: Sequence[PoolSpec], names: BlockNames, prefix_cache: bool = True) -> None:
        self.specs = tuple(specs)
        self.names = names
        self.block_size = names.block_size
        self.prefix_cache = prefix_cache
        self.pools = tuple(BlockPool(spec.blocks) for spec in specs)
        self.windowed = tuple((g, spec.window) for g, spec in enumerate(specs) if spec.window is not None)
        self.pending: set[bytes] = set()  # blocks that steps in flight, or the one being drafted, will fill

    # -- can it ever run ---------------------------------------------------------------------------

    def shortage(self, length: int) -> tuple[int, int] | None:
        """(needed, total) blocks of the first group that could not hold a lone request of ``length`` tokens."""
        size = self.block_size
        for spec in self.specs:
            needed = -(-length // size)
            if spec.window is not None:
                needed = min(needed, -(-(spec.window - 1) // size) + 1)
            if needed > spec.blocks:
                return needed, spec.blocks
        return None

    # -- taking ------------------------------------------------------------------------------------

    def grow(self, request: Request, count: int, draft: StepPlan) -> int:
        """Finds blocks to write positions planned .. planned + count - 1; returns how many of them it could.

        A block that others may read is copied before the request writes to it.
        """
        start, size = request.planned, self.block_size
        for pool, table in zip(self.pools, request.tables, strict=True):
            room, spare = len(table) * size - start, pool.available
            if room > 0 and pool.refs[table[start // size]] > 1:
                spare -= 1
            count = min(count, room + spare * size if spare >= 0 else 0)
        if count <= 0:
            return 0
        for group, (pool, table) in enumerate(zip(self.pools, request.tables, strict=True)):
            first = start // size
            if first < len(table):
                self._own(request, group, first, draft)
            first = len(table)
            table.extend(pool.take() for _ in range(first, -(-(start + count) // size)))
            if len(table) > first:
                self._write(request, group, first, draft)
        request.tail_shared = False
        return count

    def _own(self, request: Request, group: int, index: int, draft: StepPlan) -> None:
        pool, table = self.pools[group], request.tables[group]
        block = table[index]
        if pool.refs[block] == 1:
            pool.reopen(block)
            return
        table[index] = pool.take()
        pool.drop(block)
        draft.copies.append(BlockCopy(group, block, table[index]))
        self._write(request, group, index, draft)

    def _write(self, request: Request, group: int, first: int, draft: StepPlan) -> None:
        if request.resident:
            draft.blocks.append(TableWrite(request.id, group, first, tuple(request.tables[group][first:])))

    # -- finding -----------------------------------------------------------------------------------

    def adopt(self, request: Request, draft: StepPlan) -> int:
        """Takes over sealed blocks that continue the request's prefix; returns the positions so gained.

        The gain is the longest at which every group still holds what the next position would read. It never
        goes past what the request may find.
        """
        size = self.block_size
        first, last = request.planned // size, request.findable // size
        if last <= first:
            return 0
        self._name(request, last)
        found = self._longest(request, first, last)
        if found == first:
            return 0
        for group, (pool, spec) in enumerate(zip(self.pools, self.specs, strict=True)):
            table = request.tables[group]
            live = 0 if spec.window is None else max(0, found * size - spec.window + 1) // size
            for i in range(first, found):
                block = pool.by_key[request.names[i]] if i >= live else NO_BLOCK
                if block != NO_BLOCK:
                    pool.share(block)
                table.append(block)
            self._write(request, group, first, draft)
        request.computed = request.planned = found * size
        request.sealed = found
        self._slide(request)
        return (found - first) * size

    def _longest(self, request: Request, first: int, last: int) -> int:
        """The most blocks that can be taken as computed, ``first`` of which the request holds already."""
        runs = [0] * len(self.pools)  # blocks in a row, up to here, that each group has
        best = first
        for i in range(first, last):
            name = request.names[i]
            for group, pool in enumerate(self.pools):
                runs[group] = runs[group] + 1 if name in pool.by_key else 0
            if any(spec.window is None and run <= i - first for spec, run in zip(self.specs, runs, strict=True)):
                break
            if all(run >= self._needed(i + 1, first, spec) for spec, run in zip(self.specs, runs, strict=True)):
                best = i + 1
        return best

    def _needed(self, found: int, first: int, spec: PoolSpec) -> int:
        """Blocks below index ``found``, not held yet, that position found * block_size reads."""
        if spec.window is None:
            return found - first
        live = max(0, found * self.block_size - spec.window + 1) // self.block_size
        return found - max(live, first)

    def being_computed(self, request: Request) -> bool:
        """Whether the next full block of the request is on its way through another request's step."""
        i = request.planned // self.block_size
        return i < request.findable // self.block_size and request.names[i] in self.pending

    def announce(self, request: Request, start: int, count: int) -> list[bytes]:
        """Notes which findable blocks a slice will fill; the caller hands them to ``landed`` afterwards."""
        stop = min(start + count, len(request.tokens)) // self.block_size
        if not self.prefix_cache or stop <= start // self.block_size:
            return []
        self._name(request, stop)
        names = request.names[start // self.block_size : stop]
        self.pending.update(names)
        return names

    def landed(self, names: Iterable[bytes]) -> None:
        self.pending.difference_update(names)

    def _name(self, request: Request, count: int) -> None:
        self.names.extend(request.names, request.root, request.tokens, count)

    # -- sharing between samples -------------------------------------------------------------------

    def fork(self, leader: Request, request: Request, length: int) -> bool:
        """Lets ``request`` read the leader's blocks of its first ``length`` positions, a partly filled one included.

        False, and nothing changed, if the leader's window has already moved past what it would read.
        """
        count = -(-length // self.block_size)
        for group, window in self.windowed:
            live = max(0, length - window + 1) // self.block_size
            if NO_BLOCK in leader.tables[group][live:count]:
                return False
        for pool, mine, theirs in zip(self.pools, request.tables, leader.tables, strict=True):
            mine[:] = theirs[:count]
            for block in mine:
                if block != NO_BLOCK:
                    pool.share(block)
        request.computed = request.planned = length
        request.sealed = length // self.block_size
        request.names = leader.names[: request.sealed]
        request.tail_shared = leader.tail_shared = True
        return True

    # -- keeping and giving back -------------------------------------------------------------------

    def keep(self, request: Request) -> None:
        """After a step landed: seals what became full and drops what no later position will read."""
        size = self.block_size
        full = request.computed // size
        if full > request.sealed:
            if self.prefix_cache:
                self._seal(request, full)
            request.sealed = full
        self._slide(request)

    def _slide(self, request: Request) -> None:
        size = self.block_size
        for group, window in self.windowed:
            pool, table = self.pools[group], request.tables[group]
            i = (request.computed - window + 1) // size - 1
            while i >= 0 and table[i] != NO_BLOCK:
                pool.drop(table[i])
                table[i] = NO_BLOCK
                i -= 1

    def _seal(self, request: Request, full: int) -> None:
        self._name(request, full)
        for pool, table in zip(self.pools, request.tables, strict=True):
            for i in range(request.sealed, full):
                if table[i] != NO_BLOCK:
                    pool.seal(table[i], request.names[i], request.root)

    def truncate(self, request: Request, length: int) -> None:
        """Gives back the blocks past ``length`` positions, last first, so that a prefix outlives its tail."""
        count = -(-length // self.block_size)
        for pool, table in zip(self.pools, request.tables, strict=True):
            while len(table) > count:
                block = table.pop()
                if block != NO_BLOCK:
                    pool.drop(block)

    def intact(self, request: Request, torn: set[tuple[int, int]]) -> int:
        """Computed positions before the first that rests on one of the ``torn`` (group, block)."""
        indices = [
            index
            for group, table in enumerate(request.tables)
            for index, block in enumerate(table)
            if (group, block) in torn
        ]
        return min(request.computed, min(indices) * self.block_size) if indices else request.computed

    def condemn(self, request: Request) -> None:
        """Makes sure that nobody finds what a failed request computed and nobody else reads yet."""
        for pool, table in zip(self.pools, request.tables, strict=True):
            for block in table:
                if block != NO_BLOCK and pool.refs[block] == 1:
                    pool.reopen(block)

    def rewind(self, request: Request, length: int) -> None:
        """Takes back what was computed past ``length``; everything, if a window has dropped what must be read again."""
        for group, window in self.windowed:
            live = max(0, length - window + 1) // self.block_size
            if NO_BLOCK in request.tables[group][live : -(-length // self.block_size)]:
                length = 0
        self.truncate(request, length)
        request.computed = length
        request.sealed = min(request.sealed, length // self.block_size)

    # -- books -------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return sum(pool.total for pool in self.pools)

    @property
    def used(self) -> int:
        return sum(pool.total - pool.available for pool in self.pools)

    def check(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless every block is accounted for by the tables of ``requests``."""
        tables = [request.tables for request in requests]
        for group, pool in enumerate(self.pools):
            readers: dict[int, int] = {}
            for held in tables:
                for block in held[group]:
                    if block != NO_BLOCK:
                        readers[block] = readers.get(block, 0) + 1
            pool.check(readers)
