"""Who may enter: rates of tenants, and a budget of tokens for all that has been admitted and has not ended.

A request enters when it is known who sends it, and is charged when it is known how long it can get: its prompt, and for
each completion ``max_tokens``, or what completions have needed on average where it names no limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

from penstock.base import OverLimit, Unavailable
from penstock.fleet.bucket import Allowance, Bucket

FIRST_GUESS = 256
"""Tokens of a completion without a limit, before any has ended."""

MEMORY = 64
"""Completions that a running mean looks back on, roughly."""

HALF_LIFE = 10.0
"""Seconds of work in which what is known of the speed counts half."""

FAIR = 3.0
"""What a tenant holds may be so many times what is then left: one alone has three quarters of a budget at most, two
have three sevenths each, and there is always a place for who has none."""

LONGEST_WAIT = 60.0
"""Seconds; the most that a client is asked to wait where the time is an estimate."""

_EPSILON = 1e-6  # seconds: rounding may leave a bucket so little short of what it should have by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one tenant may have; None is no limit.

    Attributes:
        concurrency: requests at a time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(slots=True)
class _Tenant:
    rates: Rates
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0
    behind: int = 0
    held: int = 0

    def adjust(self, rates: Rates, now: float) -> None:
        self.rates = rates
        self.requests = _resized(self.requests, rates.requests_per_minute, now)
        self.tokens = _resized(self.tokens, rates.tokens_per_minute, now)


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if bucket is None or per_minute is None:
        return None if per_minute is None else Bucket(per_minute, now)
    if per_minute != bucket.per_minute:
        bucket.resize(per_minute, now)
    return bucket


@dataclass(slots=True, eq=False)
class Visit:
    """One request of a tenant, from its arrival to its end.

    Attributes:
        entered: when.
        charged: tokens of the budget that it holds.
        taken: tokens that its tenant's bucket gave for it so far.
        behind: it is one of a batch.
    """

    tenant: str
    entered: float
    charged: int = 0
    taken: int = 0
    behind: bool = False
    left: bool = False


class Admission:
    """Not for several threads at a time.

    Attributes:
        budget: tokens that may be charged at a time, of all tenants. A request that asks for more than that counts as
            the whole budget, so it runs when there is nothing else.
        held: tokens charged now.
        running: requests that have entered and not left.
        shared: several tenants share the budget: none may hold more than FAIR allows (dynamic thresholds of Choudhury
            and Hahne, 1998), but one that holds nothing may have one request of any size that fits.
    """

    def __init__(self, budget: int, *, shared: bool = False) -> None:
        self.budget, self.shared = budget, shared
        self.held = 0
        self.running = 0
        self._tenants: dict[str, _Tenant] = {}
        self._length = float(FIRST_GUESS)
        self._seconds, self._visits = 1.0, 0
        self._given, self._busy, self._told, self._at = 0.0, 0.0, 0.0, 0.0

    def enter(self, tenant: str, rates: Rates, now: float) -> Visit:
        """Counts one request of the tenant. A refused one counts too: asking has a price.

        Raises:
            OverLimit: (requests_over_rate, too_many_at_once).
        """
        account = self._account(tenant, rates, now)
        if account.requests is not None:
            if (wait := account.requests.wait(1, now)) > _EPSILON:
                raise OverLimit(
                    "requests_over_rate",
                    "There were too many requests",
                    why=f"at most {rates.requests_per_minute} a minute are yours",
                    fix=_again(wait),
                    retry_after=wait,
                )
            account.requests.take(1, now)
        if rates.concurrency is not None and account.running >= rates.concurrency:
            wait = max(self._next_request(account, now), min(self._seconds / rates.concurrency, LONGEST_WAIT))
            raise OverLimit(
                "too_many_at_once",
                "Too many requests are under way",
                why=f"at most {rates.concurrency} at a time are yours",
                fix=f"wait for one to end, or {_again(wait)}",
                retry_after=wait,
            )
        account.running += 1
        self.running += 1
        return Visit(tenant, now)

    def stand_behind(self, tenant: str, rates: Rates, now: float) -> Visit:
        """For a line of a batch: its tokens count at its tenant's rate, but it is no request, nor in the budget."""
        self._account(tenant, rates, now).behind += 1
        return Visit(tenant, now, behind=True)

    def _account(self, tenant: str, rates: Rates, now: float) -> _Tenant:
        account = self._tenants.setdefault(tenant, _Tenant(rates))
        account.adjust(rates, now)
        return account

    def charge(self, visit: Visit, tokens: int, now: float) -> None:
        """Takes room for what the request can grow to (``size``). Several charges add up.

        Raises:
            OverLimit: (tokens_over_rate).
            Unavailable: (queue_full, share_used).
        """
        account = self._tenants[visit.tenant]
        again = 0.0 if visit.behind else self._next_request(account, now)
        if (bucket := account.tokens) is not None and (wait := bucket.wait(tokens, now)) > _EPSILON:
            raise OverLimit(
                "tokens_over_rate",
                "There were too many tokens",
                why=f"the request counts as {tokens}, and at most {bucket.per_minute} a minute are yours",
                fix=f"lower max_tokens, or {_again(max(wait, again))}",
                retry_after=max(wait, again),
            )
        self.reserve(visit, tokens, now)
        if bucket is not None:
            taken = min(tokens, bucket.per_minute)
            bucket.take(taken, now)
            visit.taken += taken

    def reserve(self, visit: Visit, tokens: int, now: float) -> None:
        """Takes room alone: of a request that has to wait before it is known how long it can get.

        Raises:
            Unavailable: (queue_full, share_used).
        """
        if visit.behind:
            return
        account = self._tenants[visit.tenant]
        again = self._next_request(account, now)
        asked = min(tokens, self.budget - visit.charged)
        if self.held + asked > self.budget:
            wait = max(again, self._until_free(self.held + asked - self.budget, asked, now))
            raise Unavailable(
                "queue_full",
                "The server has as much to do as it takes on",
                why=f"the request counts as {asked} tokens, and {self.budget - self.held} of {self.budget} are free",
                fix=f"lower max_tokens, or {_again(wait)}",
                retry_after=wait,
            )
        left = self.budget - self.held - asked
        if self.shared and account.held > visit.charged and account.held + asked > FAIR * left:
            wait = max(again, self._until_free(asked, asked, now))
            raise Unavailable(
                "share_used",
                "Your part of the queue is in use",
                why=f"your requests hold {account.held} tokens, this one counts as {asked}, and others need room too",
                fix=f"wait for one to end, or {_again(wait)}",
                retry_after=wait,
            )
        self._pass(now)
        visit.charged += asked
        account.held += asked
        self.held += asked

    def release(self, visit: Visit) -> None:
        """Gives back what was reserved, before it is charged."""
        self.held -= visit.charged
        self._tenants[visit.tenant].held -= visit.charged
        visit.charged = 0

    def size(self, prompt: int, completions: int, longest: int, max_tokens: int | None) -> int:
        """Tokens that a request is charged.

        Args:
            prompt: tokens of all its prompts.
            completions: how many there will be, of all prompts; 0 if it generates nothing.
            longest: tokens that one completion can have at most.
        """
        return prompt + completions * min(ceil(self._length) if max_tokens is None else max_tokens, longest)

    def completed(self, tokens: int) -> None:
        """A completion that named no limit has ended after so many tokens."""
        self._length += (tokens - self._length) / MEMORY

    def leave(self, visit: Visit, now: float, used: int = 0) -> None:
        """Gives back what a request holds and settles its tenant's account. Called however it ends; once is enough.

        Args:
            used: tokens of its prompts and completions in the end.
        """
        if visit.left:
            return
        visit.left = True
        account = self._tenants[visit.tenant]
        if visit.behind:
            account.behind -= 1
        else:
            account.running -= 1
            self.running -= 1
        self._pass(now)
        self.held -= visit.charged
        account.held -= visit.charged
        if account.tokens is not None:
            account.tokens.take(used - visit.taken, now)
        if visit.charged:
            self._visits = min(self._visits + 1, MEMORY)
            self._seconds += (now - visit.entered - self._seconds) / self._visits
            self._given += visit.charged

    def allowances(self, tenant: str, now: float) -> dict[str, Allowance]:
        """What is left of a tenant's rates: of "requests" and of "tokens", where there is such a rate."""
        account = self._tenants.get(tenant)
        buckets = {} if account is None else {"requests": account.requests, "tokens": account.tokens}
        return {name: bucket.allowance(now) for name, bucket in buckets.items() if bucket is not None}

    def forget(self, known: set[str]) -> None:
        """Drops the accounts of tenants that are gone, once nothing of theirs runs."""
        idle = [tenant for tenant, account in self._tenants.items() if not account.running and not account.behind]
        for tenant in set(idle) - known:
            del self._tenants[tenant]

    def held_by(self) -> dict[str, int]:
        """Requests under way, by tenant."""
        return {tenant: account.running for tenant, account in self._tenants.items()}

    def _next_request(self, account: _Tenant, now: float) -> float:
        return 0.0 if account.requests is None else account.requests.wait(1, now)

    def _pass(self, now: float) -> None:
        """Before anything changes. Room given back and the seconds in which there was work are both forgotten by half
        in HALF_LIFE seconds of work, so that neither a start nor an idle hour makes the speed seem low.
        """
        past, self._at = now - self._at, now
        if self.held:
            kept = 0.5 ** (past / HALF_LIFE)
            self._given *= kept
            self._busy = self._busy * kept + (1.0 - kept) * HALF_LIFE / log(2.0)
        self._told = max(0.0, self._told - self._speed * past)

    @property
    def _speed(self) -> float:
        """Tokens of room given back a second, of late."""
        return self._given / self._busy if self._busy else 0.0

    def _until_free(self, missing: int, asked: int, now: float) -> float:
        """An estimate: nobody knows when the running requests will end. Those who were told to come again have a place
        before this one, up to a whole budget of them: who is refused together shall not come back together.
        """
        self._pass(now)
        speed = self._speed
        wait = (missing + self._told) / speed if speed > 0 else 1.0
        self._told = min(self._told + asked, float(self.budget))
        return min(max(wait, 1.0), LONGEST_WAIT)


def _again(seconds: float) -> str:
    return f"try again in {max(1, ceil(seconds))} s"
