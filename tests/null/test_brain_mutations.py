"""The random lives notice faults: each of these bugs, put into the brain on purpose, must fail them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings

from brain import Life, live, lives, verify
from penstock.base import PenstockError
from penstock.core.kv.blocks import BlockPool
from penstock.core.kv.groups import KVCache
from penstock.core.kv.prefix import BlockNames
from penstock.core.plan import NO_BLOCK
from penstock.core.request import Request
from penstock.core.scheduler import Scheduler

Patch = Callable[[pytest.MonkeyPatch], None]


def write_to_shared_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCache, "_own", lambda self, request, group, index, draft: None)


def hit_on_the_last_token(patch: pytest.MonkeyPatch) -> None:
    def longest(self: KVCache, request: Request, first: int, last: int) -> int:
        count = len(request.tokens) // self.block_size
        self._name(request, count)
        return original(self, request, first, count)

    original = KVCache._longest
    patch.setattr(KVCache, "_longest", longest)


def free_while_in_flight(patch: pytest.MonkeyPatch) -> None:
    def evict(self: Scheduler, request: Request) -> None:
        original(self, request)
        self.kv.truncate(request, 0)

    original = Scheduler._evict
    patch.setattr(Scheduler, "_evict", evict)


def window_too_narrow(patch: pytest.MonkeyPatch) -> None:
    def keep(self: KVCache, request: Request) -> None:
        original(self, request)
        for group, window in self.windowed:
            i = max(0, request.computed - window + 1) // self.block_size
            if (i + 1) * self.block_size <= request.computed and request.tables[group][i] != NO_BLOCK:
                self.pools[group].drop(request.tables[group][i])
                request.tables[group][i] = NO_BLOCK

    original = KVCache.keep
    patch.setattr(KVCache, "keep", keep)


def hash_without_parent(patch: pytest.MonkeyPatch) -> None:
    def extend(self: BlockNames, names: list[bytes], root: bytes, tokens: Any, count: int) -> None:
        for i in range(len(names), count):
            original(self, one := [root] * i, root, tokens, i + 1)
            names.append(one[-1])

    original = BlockNames.extend
    patch.setattr(BlockNames, "extend", extend)


def copies_forgotten_in_rollback(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCache, "intact", lambda self, request, torn: request.computed)


def hits_counted_twice(patch: pytest.MonkeyPatch) -> None:
    def adopt(self: Scheduler, request: Request) -> int:
        before = request.cached
        gained = original(self, request)
        request.cached = before + gained
        return gained

    original = Scheduler._adopt
    patch.setattr(Scheduler, "_adopt", adopt)


def rows_forgotten_in_rollback(patch: pytest.MonkeyPatch) -> None:
    def roll_back(self: Scheduler, error: Any) -> None:
        for request in self.running:
            request.resident = False
        original(self, error)

    original = Scheduler._roll_back
    patch.setattr(Scheduler, "_roll_back", roll_back)


def share_without_counting(patch: pytest.MonkeyPatch) -> None:
    def share(self: BlockPool, block: int) -> None:
        if self.refs[block] == 0:
            original(self, block)

    original = BlockPool.share
    patch.setattr(BlockPool, "share", share)


def idle_blocks_never_reused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "available", property(lambda self: len(self.free)))


def convict_whoever_is_there(patch: pytest.MonkeyPatch) -> None:
    def roll_back(self: Scheduler, error: Any) -> None:
        accused = list(self.inflight[0].requests)
        original(self, error)
        for request in accused:
            if request.phase.value == "running":
                self._fail(request, error)

    original = Scheduler._roll_back
    patch.setattr(Scheduler, "_roll_back", roll_back)


def stop_token_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "emitted", property(lambda self: 0))


def found_what_must_be_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "findable", property(lambda self: len(self.tokens) - 1))


def prompt_reported_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "report", lambda self, start, entries: entries)


def pooled_from_the_middle(patch: pytest.MonkeyPatch) -> None:
    def roll_back(self: Scheduler, error: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Request, "pools_all", property(lambda self: False))
            original(self, error)

    original = Scheduler._roll_back
    patch.setattr(Scheduler, "_roll_back", roll_back)


MUTATIONS: list[Patch] = [
    write_to_shared_blocks,
    hit_on_the_last_token,
    free_while_in_flight,
    window_too_narrow,
    hash_without_parent,
    copies_forgotten_in_rollback,
    hits_counted_twice,
    rows_forgotten_in_rollback,
    share_without_counting,
    idle_blocks_never_reused,
    convict_whoever_is_there,
    stop_token_forgotten,
    found_what_must_be_computed,
    prompt_reported_again,
    pooled_from_the_middle,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_bug_is_noticed(mutate: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)

    @settings(max_examples=3000, phases=[Phase.generate], report_multiple_bugs=False)
    @given(lives())
    def run(life: Life) -> None:
        verify(life, live(life, max_launches=600))

    with pytest.raises((AssertionError, KeyError, IndexError, ValueError, TypeError, PenstockError)):
        run()
