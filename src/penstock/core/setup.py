"""EngineSetup: all the numbers that determine every decision of an engine; a live engine, its recording and its
simulation are built from the same value."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.admission import Limits
from penstock.core.kv.groups import KVCache, PoolSpec
from penstock.core.kv.prefix import BlockNames
from penstock.core.policy import policies
from penstock.core.scheduler import Scheduler
from penstock.spec import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """Attributes:
    pools: one per KV group, in the order of ``ModelSpec.kv_groups()``.
    numerics_id: root of every block's name (ONE_ANSWER.md).
    depth: steps in flight.
    """

    pools: tuple[PoolSpec, ...]
    block_size: int
    numerics_id: bytes
    limits: Limits
    vocabulary: Vocabulary
    policy: str = "fcfs"
    age_seconds: float = 10.0
    prefix_cache: bool = True
    depth: int = 1

    def scheduler(self) -> Scheduler:
        kv = KVCache(self.pools, BlockNames(self.numerics_id, self.block_size), self.prefix_cache)
        return Scheduler(kv, self.limits, self.vocabulary, policies.get(self.policy)(self.age_seconds))
