"""The scheduler: which tokens of which requests are computed in the next step.

There are no phases. A request has tokens known and tokens computed, and a step computes some of the gap: a
whole prompt, a chunk of one, one decoded token, or what a preemption or a failed step took back.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from penstock.base import InvalidRequest, PenstockError
from penstock.core.admission import Counters, Limits, final_length
from penstock.core.kv.groups import KVCache
from penstock.core.plan import StepFailed, StepPlan, StepResult
from penstock.core.policy import SchedulingPolicy
from penstock.core.request import Phase, Request
from penstock.core.service import Status, Submission, Update
from penstock.spec import FinishReason, TokenLogprobs, Vocabulary

_NONE: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class InFlight:
    """A plan that was handed out, and what must be undone if it fails."""

    plan: StepPlan
    requests: list[Request] = field(default_factory=list)
    filling: list[bytes] = field(default_factory=list)
    copied: list[tuple[Request, int]] = field(default_factory=list)  # first position that rests on a copy
    starved: bool = False  # somebody found no blocks, so nobody new is let in


class Scheduler:
    """``plan`` decides one step, ``commit`` takes in what became of the oldest one. Neither blocks nor knows a clock.

    ``outbox`` collects the news for callers; whoever drives the scheduler empties it.
    """

    def __init__(self, kv: KVCache, limits: Limits, vocabulary: Vocabulary, policy: SchedulingPolicy) -> None:
        if not 1 <= limits.max_batch_requests <= limits.max_batch_tokens:
            raise ValueError("max_batch_requests must be from 1 to max_batch_tokens")
        self.kv = kv
        self.limits = limits
        self.vocabulary = vocabulary
        self.policy = policy
        self.running: list[Request] = []  # in policy order
        self.waiting: list[Request] = []  # heap in policy order; ended requests are dropped when they surface
        self.suspects: list[Request] = []
        self.samples: dict[str, list[Request]] = {}  # of the submissions that are not finished
        self.inflight: deque[InFlight] = deque()
        self.outbox: list[Update] = []
        self.counters = Counters()
        self._leaving = 0  # preempted requests whose blocks are not back yet
        self._waiting_count = 0
        self._next_id = 0
        self._draft = InFlight(StepPlan(0))

    # -- arrivals and departures ---------------------------------------------------------------------

    def add(self, submission: Submission, now: float) -> None:
        """Queues all samples of a submission.

        Raises:
            InvalidRequest: it could not run even on an idle engine.
        """
        if submission.id in self.samples:
            raise InvalidRequest("duplicate_request_id", f"A request with id {submission.id!r} is still running")
        limit = final_length(submission, self.limits, self.vocabulary, self.kv)
        place = self.policy.place(submission, now)
        params = submission.params
        eos = frozenset() if params.ignore_eos else self.vocabulary.eos_ids
        root = self.kv.names.root(submission.tenant, submission.adapter)
        family: list[Request] = []
        for sample in range(params.n):
            request = Request(
                id=self._next_id,
                submission=submission,
                sample=sample,
                order=(place, self._next_id),
                tokens=list(submission.tokens),
                limit=limit,
                stop_ids=eos.union(params.stop_token_ids or ()),
                root=root,
                tables=[[] for _ in self.kv.pools],
                leader=family[0] if sample else None,
            )
            self._next_id += 1
            family.append(request)
            self._queue(request)
        self.samples[submission.id] = family
        self.counters.prompt_tokens += len(submission.tokens)

    def abort(self, id: str, sample: int | None = None) -> None:
        """Ends one sample of a submission, or all. Unknown ids are ignored: they may have just finished."""
        for request in self.samples.get(id, ()):
            if request.phase is not Phase.DONE and sample in (None, request.sample):
                self._finish(request, Update(id, request.sample, finish_reason="abort"))

    @property
    def idle(self) -> bool:
        return not self.samples and not self.inflight

    def status(self) -> Status:
        c = self.counters
        return Status(
            running=len(self.running),
            waiting=self._waiting_count + self._leaving,
            blocks_total=self.kv.total,
            blocks_used=self.kv.used,
            steps=c.steps,
            prompt_tokens=c.prompt_tokens,
            generated_tokens=c.generated_tokens,
            prefix_hit_tokens=c.prefix_hit_tokens,
            preemptions=c.preemptions,
            failed_steps=c.failed_steps,
        )

    # -- planning ------------------------------------------------------------------------------------

    def plan(self, now: float, only: Request | None = None) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a step in flight lands.

        Requests are served in policy order. Every running request after the current one is promised one
        token of the budget, so that a long prompt never holds up those who decode.
        """
        if only is None and self.suspects:
            return None if self.inflight else self._plan_suspect(now)
        draft, index, budget = self._draft, 0, self.limits.max_batch_tokens
        while budget > 0 and only is None:
            request = self._candidate(index)
            if request is None:
                break
            later = len(self.running) - index - 1
            budget -= self._advance(request, max(1, budget - later))
            index += 1
        if only is not None:
            self._advance(only, budget)
        if not draft.plan.slices:
            draft.starved = False
            return None  # what the draft says of blocks and departures stays for the next one
        self.inflight.append(draft)
        self.counters.steps += 1
        self._draft = InFlight(StepPlan(draft.plan.number + 1))
        return draft.plan

    def _candidate(self, index: int) -> Request | None:
        """Next in policy order: the running request at ``index``, or the head of the line put in its place."""
        running, waiting = self.running, self.waiting
        while waiting and waiting[0].phase is not Phase.WAITING:
            heappop(waiting)
        request = running[index] if index < len(running) else None
        if not waiting or self._draft.starved or (request is not None and request.order < waiting[0].order):
            return request
        if len(running) == self.limits.max_batch_requests:
            if request is None:
                return None
            self._preempt(running[-1])
        request = heappop(waiting)
        request.phase = Phase.RUNNING
        self._waiting_count -= 1
        running.insert(index, request)
        return request

    def _advance(self, request: Request, allowance: int) -> int:
        """Plans as much of a request's gap as allowance and blocks permit; returns the positions planned."""
        ahead = len(request.tokens) + request.owed
        if ahead >= request.limit or ahead <= request.planned or not self._ready(request):
            return 0
        start, size, draft = request.planned, self.kv.block_size, self._draft
        count = min(ahead - start, allowance)
        if start == request.computed and start % size == 0 and self.kv.prefix_cache:
            if gained := self._adopt(request):
                start += gained
                count = min(ahead - start, allowance)
            elif self.kv.being_computed(request) and request.waits < self.limits.max_prefix_waits:
                request.waits += 1
                return 0
        if count > 1 or start % size == 0 or request.tail_shared:
            copies = len(draft.plan.copies)
            while not (got := self.kv.grow(request, count, draft.plan)):
                if not self._make_room(request):
                    draft.starved = True
                    return 0
            count = got
            if len(draft.plan.copies) > copies:
                draft.copied.append((request, start // size * size))
                self.counters.copies += len(draft.plan.copies) - copies
        if not request.resident:
            request.resident = True
            draft.plan.new.append(request.introduction())
        draft.plan.slices.append((request.id, start, count))
        draft.requests.append(request)
        request.planned = start + count
        request.inflight += 1
        if request.planned == ahead:
            request.owed += 1
        if (start + count) // size > start // size:
            draft.filling += self.kv.announce(request, start, count)
        return count

    def _ready(self, request: Request) -> bool:
        """Whether a request may be planned now: a follower waits for its leader's prompt, a suspect to be alone."""
        if request.suspect and (not self.suspects or self.suspects[0] is not request):
            if request not in self.suspects:
                insort(self.suspects, request)
            return False
        if (leader := request.leader) is None:
            return True
        shared = request.prompt_len - 1
        if leader.phase is Phase.RUNNING and leader.computed < shared:
            return False
        request.leader = None
        if leader.phase is Phase.RUNNING and shared and self.kv.fork(leader, request, shared):
            request.cached = leader.cached
        return True

    def _adopt(self, request: Request) -> int:
        gained = self.kv.adopt(request, self._draft.plan)
        if gained:
            request.waits = 0
            self.counters.prefix_hit_tokens += gained
            if not request.emitted:
                request.cached += gained
        return gained

    def _make_room(self, request: Request) -> bool:
        """Preempts the last in line for one that comes before it. False if no block is had before a step lands."""
        victim = self.running[-1]
        if victim is request or self._leaving:
            return False  # it waits with what it holds, or for blocks that are on their way back
        self._preempt(victim)
        return victim.phase is Phase.WAITING

    def _preempt(self, victim: Request) -> None:
        self.running.remove(victim)
        if victim in self.suspects:
            self.suspects.remove(victim)
        if victim.planned:
            self.counters.preemptions += 1
        self._evict(victim)
        victim.phase = Phase.LEAVING
        self._leaving += 1
        self._settle(victim)

    def _evict(self, request: Request) -> None:
        """Tells the executor to forget a request. Plans are executed in order, so earlier steps still know it."""
        if request.resident:
            request.resident = False
            draft = self._draft.plan
            draft.gone.append(request.id)
            draft.blocks = [write for write in draft.blocks if write.request != request.id]

    def _settle(self, request: Request) -> None:
        """Takes a departed request's blocks back once no step in flight touches them."""
        if request.inflight:
            return
        self.kv.truncate(request, 0)
        request.planned = request.computed = request.sealed = request.waits = 0
        request.tail_shared = False
        if request.phase is Phase.LEAVING:
            self._leaving -= 1
            self._queue(request)

    def _queue(self, request: Request) -> None:
        request.phase = Phase.WAITING
        self._waiting_count += 1
        heappush(self.waiting, request)

    # -- committing ----------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult | StepFailed) -> None:
        """Takes in the oldest step in flight: tokens are accepted, full blocks sealed, ended requests released."""
        if self.inflight[0].plan is not plan:
            raise ValueError(f"plan {plan.number} is not the oldest in flight")
        if isinstance(result, StepFailed):
            self._roll_back(result.error)
            return
        record = self.inflight.popleft()
        self.kv.landed(record.filling)
        size, windowed = self.kv.block_size, bool(self.kv.windowed)
        for index, request in enumerate(record.requests):
            _, start, count = plan.slices[index]
            request.inflight -= 1
            if request.phase is not Phase.DONE:
                request.computed = start + count
                if windowed or request.computed // size > request.sealed:
                    self.kv.keep(request)
                if error := result.failed.get(index):
                    self._fail(request, error)
                elif tokens := result.tokens[index]:
                    request.owed -= 1
                    self._accept(request, tokens, result.logprobs.get(index, _NONE))
            if request.phase is not Phase.RUNNING:
                self._settle(request)
        if self.suspects and record.requests[0] is self.suspects[0]:
            self.suspects.pop(0).suspect = False

    def _accept(self, request: Request, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        reason: FinishReason | None = None
        stop: int | None = None
        for taken, token in enumerate(tokens, 1):
            request.tokens.append(token)
            if token in request.stop_ids and request.emitted > request.submission.params.min_tokens:
                reason, stop = "stop", token if token in (request.submission.params.stop_token_ids or ()) else None
            elif len(request.tokens) >= request.limit:
                reason = "length"
            if reason:
                tokens, logprobs = tokens[:taken], logprobs[:taken]
                break
        self.counters.generated_tokens += len(tokens)
        id = request.submission.id
        update = Update(id, request.sample, tokens, logprobs, reason, stop, None, request.cached)
        if reason:
            self._finish(request, update)
        else:
            self.outbox.append(update)

    def _fail(self, request: Request, error: PenstockError) -> None:
        self._finish(request, Update(request.submission.id, request.sample, finish_reason="error", error=error))

    def _finish(self, request: Request, update: Update) -> None:
        """Ends a request wherever it stands; its blocks follow once nothing in flight touches them."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
        elif request.phase is Phase.WAITING:
            self._waiting_count -= 1
        else:
            self._leaving -= 1
        request.phase = Phase.DONE
        if request in self.suspects:
            self.suspects.remove(request)
        self._evict(request)
        self._settle(request)
        self.outbox.append(update)
        family = self.samples[update.id]
        if all(sample.phase is Phase.DONE for sample in family):
            del self.samples[update.id]

    # -- failed steps --------------------------------------------------------------------------------

    def _roll_back(self, error: PenstockError) -> None:
        """Undoes the oldest plan and all later ones. Its requests rerun alone, so that only the guilty one fails."""
        self.counters.failed_steps += 1
        present = self.inflight[0].requests
        accused = [r for r in present if r.phase is not Phase.DONE]
        forgotten: dict[int, None] = {}
        touched: dict[Request, None] = {}
        lowest: dict[Request, int] = {}
        for record in self.inflight:
            forgotten.update(dict.fromkeys(record.plan.gone))
            for request, start in record.copied:  # the copy may not have been made
                lowest[request] = min(start, lowest.get(request, start))
            for request in record.requests:
                request.inflight -= 1
                touched[request] = None
        self.inflight.clear()
        self.kv.pending.clear()
        for request in self.running:
            self._evict(request)
            self.kv.rewind(request, min(request.computed, lowest.get(request, request.computed)))
            request.planned, request.owed = request.computed, 0
        forgotten.update(dict.fromkeys(self._draft.plan.gone))
        self._draft = InFlight(StepPlan(self._draft.plan.number, gone=list(forgotten)))
        for request in touched:
            if request.phase is not Phase.RUNNING:
                request.owed = 0
                self._settle(request)
        if len(present) == 1:
            for guilty in accused:  # nobody, if it ended while the step ran
                self._fail(guilty, error)
        else:
            for request in accused:
                request.suspect = True
                if request.phase is Phase.RUNNING and request not in self.suspects:
                    insort(self.suspects, request)

    def _plan_suspect(self, now: float) -> StepPlan | None:
        """Plans the first suspect alone. One that finds no room goes back to the line and is met again there."""
        suspect = self.suspects[0]
        if plan := self.plan(now, only=suspect):
            return plan
        self._preempt(suspect)
        return self.plan(now)
