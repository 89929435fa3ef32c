"""The prefix cache of several tenants: a flood of one evicts its own blocks, not those of others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.kv.blocks import BlockPool

TOTAL = 24


def cached(pool: BlockPool, key: bytes, owner: bytes) -> None:
    """A block that was computed, sealed and read by nobody any more."""
    block = pool.take()
    pool.seal(block, key, owner)
    pool.drop(block)


def test_a_flood_leaves_others_what_they_have() -> None:
    pool = BlockPool(TOTAL)
    for i in range(8):
        cached(pool, b"birch %d" % i, b"birch")
    for i in range(1000):
        cached(pool, b"acme %d" % i, b"acme")
        pool.check({})
    assert [b"birch %d" % i in pool.by_key for i in range(8)] == [True] * 8
    assert [b"acme %d" % i in pool.by_key for i in range(1000 - 16, 1000)] == [True] * 16  # its own latest ones


def test_both_flood_and_have_half_each() -> None:
    pool = BlockPool(TOTAL)
    for i in range(300):
        cached(pool, b"acme %d" % i, b"acme")
        cached(pool, b"acme again %d" % i, b"acme")
        cached(pool, b"birch %d" % i, b"birch")
    kept = [key.split()[0] for key in pool.by_key]
    assert kept.count(b"birch") >= TOTAL // 2 - 1 and len(kept) == TOTAL


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 40), st.booleans()), max_size=200))
def test_the_books_balance(events: list[tuple[bytes, int, bool]]) -> None:
    """And whoever has no more than a third never loses a block to others."""
    pool, held = BlockPool(TOTAL), list[int]()
    for owner, number, keep in events:
        key = owner + b" %d" % number
        before = {who: set(blocks) for who, blocks in pool.idle.items()}
        if (block := pool.by_key.get(key)) is not None:
            pool.share(block)
        elif not pool.available:
            pool.drop(held.pop())
            continue
        else:
            largest = max(map(len, before.values()), default=0)
            evicts = not pool.free
            block = pool.take()
            lost = [who for who, blocks in before.items() if block in blocks]
            assert not evicts or len(before[lost[0]]) == largest
            pool.seal(block, key, owner)
        if keep and len(held) < TOTAL - 1:
            held.append(block)
        else:
            pool.drop(block)
        pool.check({block: held.count(block) for block in held})
