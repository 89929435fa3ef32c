"""The scheduler: which tokens of which requests are computed in the next step.

There are no phases. A request has tokens known and tokens computed, and a step computes some of the gap: a
whole prompt, a chunk of one, one decoded token, or what a preemption or a failed step took back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from penstock.base import PenstockError
from penstock.core.admission import Limits, final_length
from penstock.core.kv.groups import KVCache
from penstock.core.plan import StepFailed, StepPlan, StepResult
from penstock.core.policy import SchedulingPolicy
from penstock.core.request import Phase, Request, StepRecord
from penstock.core.service import Counters, Status, Submission, Update, duplicate_id
from penstock.core.suspects import Suspects
from penstock.spec import FinishReason, TokenLogprobs, Vocabulary

_NONE: tuple[TokenLogprobs, ...] = ()


class Scheduler:
    """``plan`` decides one step, ``commit`` takes in what became of the oldest one. Neither blocks nor knows a clock.

    ``outbox`` collects the news for callers, ``ended`` the requests that have; whoever drives the scheduler empties
    them.
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
        self.suspects = Suspects()
        self.samples: dict[str, list[Request]] = {}  # of the submissions that are not finished
        self.inflight: deque[StepRecord] = deque()
        self.outbox: list[Update] = []
        self.ended: list[tuple[Request, FinishReason]] = []
        self.counters = Counters()
        self._leaving = 0  # preempted requests whose blocks are not back yet
        self.in_line = 0
        self._next_id = 0
        self._now = 0.0  # of the plan being drafted
        self._draft = StepRecord(StepPlan(0))

    # -- arrivals and departures ---------------------------------------------------------------------

    def add(self, submission: Submission, now: float) -> None:
        """Queues all samples of a submission.

        Raises:
            InvalidRequest: it could not run even on an idle engine.
        """
        if submission.id in self.samples:
            raise duplicate_id(submission.id)
        limit = final_length(submission, self.limits, self.vocabulary, self.kv)
        place = self.policy.place(submission, now)
        params = submission.params
        eos = frozenset() if params.ignore_eos else self.vocabulary.eos_ids
        root = self.kv.names.root(submission.tenant, submission.adapter)
        family: list[Request] = []
        for sample, emitted in submission.unfinished:
            request = Request(
                id=self._next_id,
                submission=submission,
                sample=sample,
                order=(place, self._next_id),
                tokens=[*submission.tokens, *emitted],
                limit=limit,
                stop_ids=eos.union(params.stop_token_ids or ()),
                root=root,
                tables=[[] for _ in self.kv.pools],
                leader=family[0] if family else None,
                arrived=now,
                since=now,
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
        return Status(
            running=len(self.running),
            waiting=self.in_line + self._leaving,
            blocks_total=self.kv.total,
            blocks_used=self.kv.used,
            counters=replace(self.counters),
        )

    # -- planning ------------------------------------------------------------------------------------

    def plan(self, now: float, only: Sequence[Request] = ()) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a step in flight lands.

        Requests are served in policy order. Every running request after the current one is promised one
        token of the budget, so that a long prompt never holds up those who decode.
        """
        self._now = now
        if not only and self.suspects:
            return None if self.inflight else self._plan_suspects(now)
        draft, index, budget = self._draft, 0, self.limits.budget([request.emitted for request in self.running])
        while budget > 0 and not only:
            request = self._candidate(index)
            if request is None:
                break
            later = 0 if self.limits.whole else len(self.running) - index - 1
            if request.suspect:  # preempted before its turn came, and met again
                self.suspects.accuse(request)
            else:
                budget -= self._advance(request, max(1, budget - later))
            index += 1
        for suspect in only:
            if budget > 0 and suspect in self.suspects:  # or it gave its blocks to one before it
                budget -= self._advance(suspect, budget)
        if not draft.plan.slices:  # what it says of blocks and departures stays for the next one
            draft.starved = False
            return self._plan_suspects(now) if not only and self.suspects and not self.inflight else None
        for request in draft.requests:
            if request.since is not None:
                request.resume(now)
        self.inflight.append(draft)
        self.counters.steps += 1
        self.counters.copies += len(draft.plan.copies)
        self._draft = StepRecord(StepPlan(draft.plan.number + 1))
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
        self.in_line -= 1
        running.insert(index, request)
        return request

    def _advance(self, request: Request, allowance: int) -> int:
        """Plans as much of a request's gap as allowance and blocks permit; returns the positions planned."""
        ahead = len(request.tokens) + request.owed
        if ahead >= request.limit or ahead <= request.planned or not self._ready(request):
            return 0
        start, size, draft = request.planned, self.kv.block_size, self._draft
        count = min(ahead - start, allowance)
        if self.limits.whole and count < ahead:
            return 0
        if start == request.computed and start % size == 0 and self.kv.prefix_cache:
            if gained := self._adopt(request):
                start += gained
                count = min(ahead - start, allowance)
            elif self.kv.being_computed(request) and request.waits < self.limits.max_prefix_waits:
                request.waits += 1
                return 0
        if count > 1 or start % size == 0 or request.tail_shared:
            while not (got := self.kv.grow(request, count, draft.plan)):
                if not self._make_room(request):
                    draft.starved = True
                    request.since = self._now if request.since is None else request.since
                    return 0
            count = got
        if not request.resident:
            request.resident = True
            draft.plan.new.append(request.introduction())
        draft.plan.slices.append((request.id, start, count))
        draft.requests.append(request)
        request.planned = start + count
        request.inflight += 1
        request.waits = 0
        if request.planned == ahead:
            request.owed += 1
        if (start + count) // size > start // size:
            draft.filling += self.kv.announce(request, start, count)
        return count

    def _ready(self, request: Request) -> bool:
        """Whether a request may be planned now: a follower waits for its leader's prompt."""
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
            self.counters.prefix_hit_tokens += gained
            if not request.emitted:  # what it had found before a preemption or a failed step may be gone
                request.cached = min(request.cached, request.computed - gained) + gained
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
        self.suspects.leave(victim)
        if victim.planned:
            self.counters.preemptions += 1
            victim.preempted += 1
        victim.since = self._now if victim.since is None else victim.since
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
        self.in_line += 1
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
            if request.phase is Phase.DONE:
                pass
            elif error := result.failed.get(index):
                self._fail(request, error)
            else:
                request.computed = start + count
                if windowed or request.computed // size > request.sealed:
                    self.kv.keep(request)
                if result.prompt_logprobs and (news := request.report(start, result.prompt_logprobs.get(index, _NONE))):
                    self.outbox.append(Update(request.submission.id, request.sample, prompt_logprobs=news))
                if tokens := result.tokens[index]:
                    request.owed -= 1
                    self._accept(request, tokens, result.logprobs.get(index, _NONE))
                elif (vector := result.vectors.get(index)) is not None:
                    id, cached = request.submission.id, request.cached
                    self._finish(request, Update(id, 0, finish_reason="stop", cached_tokens=cached, vector=vector))
            if request.phase is not Phase.RUNNING:
                self._settle(request)
        if self.suspects and record.requests[0].suspect:  # then all of them are
            self.suspects.passed(record.requests)

    def _accept(self, request: Request, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        reason: FinishReason | None = None
        stop: int | None = None
        for taken, token in enumerate(tokens, 1):
            request.tokens.append(token)
            if token in request.stop_ids and request.emitted > request.submission.params.min_tokens:
                reason, stop = "stop", None if self._is_eos(request, token) else token
            elif len(request.tokens) >= request.limit:
                reason = "length"
            if reason:
                tokens, logprobs = tokens[:taken], logprobs[:taken]
                break
        self.counters.generated_tokens += len(tokens)
        update = Update(request.submission.id, request.sample, tokens, logprobs, reason, stop, None, request.cached)
        if reason:
            self._finish(request, update)
            return
        if request.resumed:
            request.resumed, update.timing = False, request.timing
        self.outbox.append(update)

    def _is_eos(self, request: Request, token: int) -> bool:
        return token in self.vocabulary.eos_ids and not request.submission.params.ignore_eos

    def _sweep(self) -> None:
        """Drops ended requests from the waiting heap when they are most of it; they hold their prompts."""
        if len(self.waiting) > 2 * self.in_line + 64:
            self.waiting = [request for request in self.waiting if request.phase is Phase.WAITING]
            heapify(self.waiting)

    def _fail(self, request: Request, error: PenstockError) -> None:
        self.kv.condemn(request)
        self._finish(request, Update(request.submission.id, request.sample, finish_reason="error", error=error))

    def _finish(self, request: Request, update: Update) -> None:
        """Ends a request wherever it stands; its blocks follow once nothing in flight touches them."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
        elif request.phase is Phase.WAITING:
            self.in_line -= 1
            self._sweep()
        else:
            self._leaving -= 1
        request.phase = Phase.DONE
        assert update.finish_reason is not None
        self.ended.append((request, update.finish_reason))
        update.timing = request.timing
        self.suspects.leave(request)
        self._evict(request)
        self._settle(request)
        self.outbox.append(update)
        family = self.samples[update.id]
        if all(sample.phase is Phase.DONE for sample in family):
            del self.samples[update.id]

    # -- failed steps --------------------------------------------------------------------------------

    def _roll_back(self, error: PenstockError) -> None:
        """Undoes the oldest plan and all later ones. Its requests rerun in halves until the guilty is alone."""
        self.counters.failed_steps += 1
        present = self.inflight[0].requests
        accused = [r for r in present if r.phase is not Phase.DONE]
        forgotten: dict[int, None] = {}
        touched: dict[Request, None] = {}
        torn = {(copy.group, copy.dst) for record in self.inflight for copy in record.plan.copies}
        for record in self.inflight:
            forgotten.update(dict.fromkeys(record.plan.gone))
            for request in record.requests:
                request.inflight -= 1
                touched[request] = None
        self.inflight.clear()
        self.kv.pending.clear()
        for request in self.running:
            self._evict(request)
            # What was pooled so far is lost with the executor's memory of the request.
            self.kv.rewind(request, 0 if request.pools_all else self.kv.intact(request, torn))
            request.planned, request.owed = request.computed, 0
        forgotten.update(dict.fromkeys(self._draft.plan.gone))
        self._draft = StepRecord(StepPlan(self._draft.plan.number, gone=list(forgotten)))
        for request in touched:
            if request.phase is not Phase.RUNNING:
                request.owed = 0
                self._settle(request)
        self.suspects.failed(len(present))
        for request in accused:  # nobody, if it ended while the step ran
            if len(present) == 1:
                self._fail(request, error)
            elif request.phase is Phase.RUNNING:
                self.suspects.accuse(request)
            else:
                request.suspect = True

    def _plan_suspects(self, now: float) -> StepPlan | None:
        """Plans the first suspects and nobody else. If none finds room, the first goes back to the line."""
        if plan := self.plan(now, only=self.suspects.lineup()):
            return plan
        self._preempt(self.suspects.lineup()[0])
        return self.plan(now)
