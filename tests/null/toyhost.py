"""An engine process whose model is a hash: ``penstock.host`` with the toy executor in it. Also faults on demand."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.assemble import Loaded
from penstock.base import ConfigError
from penstock.core.admission import Limits
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan
from penstock.core.setup import EngineSetup
from penstock.host import main
from penstock.sim.toy import Done, ToyExecutor
from penstock.spec import EngineConfig, Vocabulary

VOCAB, DEADLY, ENDLESS, LATE = 64, 64, 65, 66
"""A prompt with the token DEADLY kills the process that computes it; with ENDLESS, its step never ends. With LATE the
process dies of its 300th token."""

SETUP = EngineSetup(
    pools=(PoolSpec(512),),
    block_size=8,
    numerics_id=b"toy",
    limits=Limits(max_batch_tokens=64, max_batch_requests=16, max_model_len=512),
    vocabulary=Vocabulary(size=VOCAB + 3),
    depth=2,
)


late = set[int]()  # requests with LATE in their prompts


class Slow(ToyExecutor):
    """Takes its time, so that requests are running when a test acts."""

    def submit(self, plan: StepPlan) -> Done:
        time.sleep(0.003)
        late.update(new.id for new in plan.new if LATE in new.tokens)
        due = any(request in late and start + count >= 300 for request, start, count in plan.slices)
        if due or any(DEADLY in new.tokens for new in plan.new):
            os._exit(7)
        if any(ENDLESS in new.tokens for new in plan.new):
            time.sleep(600)
        return super().submit(plan)


def load(config: EngineConfig, told: Callable[[float | None], None], taken: int) -> tuple[Any, Loaded]:
    """``config.model`` says how it fails to load: "refuse", "exit", or "once:FILE", which works once; "ever" tells of
    progress and does not end, "ever:FILE" the second time; "fetch" is silent for a while, and says that it may be."""
    how, _, place = (config.model or "").partition(":")
    if how == "refuse":
        raise ConfigError("too_small", "The toy cannot be loaded", why="1 < 2", fix="buy another")
    if how == "exit" or (how == "once" and Path(place).exists()):
        os._exit(3)
    while how == "ever" and (not place or Path(place).exists()):
        told(0.25)
        time.sleep(0.1)
    if how == "fetch":
        told(None)
        time.sleep(4.0)
    if place:
        Path(place).touch()
    told(0.5)
    executor = Slow(SETUP.pools, SETUP.block_size, VOCAB)
    config = replace(config, max_model_len=SETUP.limits.max_model_len)
    return None, Loaded(config=config, spec=None, setup=SETUP, executor=executor, one_answer=True, held=taken + 1)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], load)
