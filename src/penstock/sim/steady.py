"""A scheduler in a steady state, to measure what it costs: a full batch decoding, others waiting, some arriving."""

from __future__ import annotations

from penstock.core.admission import Limits
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan, StepResult
from penstock.core.service import Submission
from penstock.core.setup import EngineSetup
from penstock.spec import SamplingParams, Vocabulary

PROMPT, VOCAB = 128, 32_000


class SteadyState:
    """``running`` requests of which each decodes ``max_tokens`` tokens, and ``waiting`` more in line.

    With ``refill`` every request that ends is replaced by a new one at once.
    """

    def __init__(self, running: int, waiting: int, max_tokens: int, *, refill: bool = False) -> None:
        self.setup = EngineSetup(
            pools=(PoolSpec((PROMPT + max_tokens) // 16 * (running + 1)),),
            block_size=16,
            numerics_id=b"steady",
            limits=Limits(
                max_batch_tokens=max(1024, 2 * running), max_batch_requests=running, max_model_len=PROMPT + max_tokens
            ),
            vocabulary=Vocabulary(size=VOCAB),
        )
        self.scheduler = self.setup.scheduler()
        self.refill, self.max_tokens, self.count = refill, max_tokens, 0
        self.known: dict[int, int] = {}
        for i in range(running + waiting):
            # With refill they start at different points of their lives, so that some end at every step.
            self.arrive(1 + i * max_tokens // running if refill and i < running else max_tokens)

    def arrive(self, max_tokens: int) -> None:
        i = self.count
        tokens = tuple((i * 7919 + 31 * p) % VOCAB for p in range(PROMPT - i % 16))
        params = SamplingParams(max_tokens=min(max_tokens, self.max_tokens), temperature=0.0)
        self.scheduler.add(Submission(id=str(i), tokens=tokens, params=params, seed=0), float(i))
        self.count += 1

    def plan(self) -> StepPlan | None:
        return self.scheduler.plan(0.0)

    def result(self, plan: StepPlan) -> StepResult:
        """What an executor would answer: a token from each slice that reaches the last known one."""
        self.known.update((new.id, len(new.tokens)) for new in plan.new)
        tokens: list[tuple[int, ...]] = []
        for request, start, count in plan.slices:
            draws = start + count == self.known[request]
            self.known[request] += draws
            tokens.append((7,) if draws else ())
        return StepResult(tokens)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        self.scheduler.commit(plan, result)

    def next(self) -> None:
        """Takes the news in and lets others arrive; not part of a step's cost."""
        ended = sum(update.finish_reason is not None for update in self.scheduler.outbox)
        self.scheduler.outbox.clear()
        for _ in range(ended if self.refill else 0):
            self.arrive(self.max_tokens)
