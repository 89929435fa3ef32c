"""Request: one sample of a submission, as the scheduler sees it. StepRecord: a step, likewise."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from penstock.core.plan import NewRequest, StepPlan
from penstock.core.service import Submission
from penstock.spec import Timing, TokenLogprobs

Order = tuple[float, int]
"""Place in the line; smaller goes first. It never changes while a request lives (docs/decisions/0002)."""


class Phase(Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    LEAVING = "leaving"  # preempted; keeps its blocks until the last step in flight that touches it has landed
    DONE = "done"  # ended; likewise


@dataclass(slots=True, eq=False)
class Request:
    """Tokens known, computed, and owed by steps in flight.

        0 ........ computed ........ planned ........ len(tokens) + owed
          KV landed        in flight          the gap

    A step computes some of the gap; a slice that closes it draws a token, which is owed until it lands.

    Attributes:
        tokens: known tokens: the prompt, then what was emitted, by an engine before this one too.
        limit: length at which it ends for lack of room.
        tables: for each KV group the block of each block index, NO_BLOCK for those outside the window for good.
        names: hashes of its full blocks, as far as they were needed.
        sealed: block indices below this were offered to the prefix index.
        inflight: steps in flight that touch it.
        resident: the executor knows its tokens and tables.
        tail_shared: its last block may be read by others, so look before writing.
        leader: the sample whose prompt blocks it will share, until it does.
        waits: plans it sat out because another request was computing its next block.
        suspect: it was part of a step that failed, and runs among suspects alone until a step of theirs succeeds.
        arrived, queued: when it came, and how long it then was until a step took it up for the first time.
        since: when it began to wait to be taken up, or for KV blocks; None while it does not.
        preempted, starved: as of ``Timing``; resumed: they are to be told with its next token.
        reported: prompt positions whose log-probabilities were delivered, if it reports any.
    """

    id: int
    submission: Submission
    sample: int
    order: Order
    tokens: list[int]
    limit: int
    stop_ids: frozenset[int]
    root: bytes
    tables: list[list[int]]
    leader: Request | None = None
    phase: Phase = Phase.WAITING
    computed: int = 0
    planned: int = 0
    owed: int = 0
    inflight: int = 0
    sealed: int = 0
    waits: int = 0
    cached: int = 0
    resident: bool = False
    tail_shared: bool = False
    suspect: bool = False
    reported: int = 0
    arrived: float = 0.0
    queued: float | None = None
    since: float | None = None
    preempted: int = 0
    starved: float = 0.0
    resumed: bool = False
    names: list[bytes] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.submission.tokens)

    @property
    def emitted(self) -> int:
        return len(self.tokens) - len(self.submission.tokens)

    @property
    def generates(self) -> bool:
        return self.submission.task == "generate"

    @property
    def pools_all(self) -> bool:
        """Its vector is made of all positions, in one go from the first."""
        return self.submission.task in ("mean", "cls")

    @property
    def findable(self) -> int:
        """Positions that may be found in the prefix cache; what must be reported has to be computed."""
        if self.pools_all:
            return 0
        if self.reports and self.reported < self.prompt_len - 1:
            return self.reported
        return len(self.tokens) - 1  # somebody must compute the logits of the last known token

    @property
    def reports(self) -> bool:
        """Whether it brings the log-probabilities of the prompt: sample 0 does so for all."""
        return self.sample == 0 and self.submission.params.prompt_logprobs is not None

    def report(self, start: int, entries: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        """Those of the entries of positions ``start ..`` that are news; after a preemption some come again."""
        news = entries[max(0, self.reported - start) :]
        self.reported += len(news)
        return news

    def resume(self, now: float) -> None:
        """It is part of a step again."""
        assert self.since is not None
        if self.queued is None:
            self.queued = now - self.arrived
        else:
            self.starved += now - self.since
        self.since, self.resumed = None, True

    @property
    def timing(self) -> Timing:
        return Timing(self.queued or 0.0, self.preempted, self.starved)

    def __lt__(self, other: Request) -> bool:
        return self.order < other.order

    def introduction(self) -> NewRequest:
        """What an executor needs to know to take it on, now or again."""
        return NewRequest(
            id=self.id,
            tokens=tuple(self.tokens),
            prompt_len=self.prompt_len,
            tables=tuple(tuple(table) for table in self.tables),
            params=self.submission.params,
            seed=self.submission.seed,
            sample=self.sample,
            stop_ids=tuple(sorted(self.stop_ids)),
            limit=self.limit,
            task=self.submission.task,
        )


@dataclass(slots=True)
class StepRecord:
    """A plan being drafted or in flight, and what the scheduler must remember of it."""

    plan: StepPlan
    requests: list[Request] = field(default_factory=list)
    filling: list[bytes] = field(default_factory=list)
    starved: bool = False  # somebody found no blocks, so nobody new is let in
