"""Who is asking, what they may, and what they are charged for it.

The verdict on a request depends on its headers' key and on nothing else: neither its path nor its Host is asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from penstock.assemble import Assembled
from penstock.base import PenstockError
from penstock.core.service import MAX_PRIORITY
from penstock.fleet import Admission, Rates, Visit
from penstock.serving.errors import HTTPError
from penstock.serving.keys import MAX_KEY_LENGTH, Key, Keyring, process_key, read_keys
from penstock.serving.texts import Texts
from penstock.spec import Timing

Access = Literal["public", "inference", "tenant", "admin"]
"""What a route asks of its caller. "tenant": that what it keeps is not everybody's, as all strangers are one tenant."""

Headers = Iterable[tuple[bytes, bytes]]
POOLS_QUEUED = 8
FIRST_TOKENS = 1 << 16
"""Admitted at a time, by the bytes of their bodies, before it is known what the first engine has room for."""

_log = logging.getLogger(__name__)


def queue_budget(engine: Assembled) -> int:
    """Tokens admitted at a time by default: as many as fit POOLS_QUEUED KV pools; steps of full length without one."""
    setup = engine.setup
    pools = [pool.blocks * setup.block_size for pool in setup.pools if pool.window is None]
    pools = pools or [pool.blocks * setup.block_size for pool in setup.pools]
    return POOLS_QUEUED * (min(pools) if pools else setup.limits.max_batch_requests * setup.limits.max_model_len)


@dataclass(slots=True, eq=False)
class Caller:
    """One request as the books have it, from its first byte to its last.

    Attributes:
        id: of the request.
        key: that it came with; None if it brought none that is good, or if this server asks for none.
        refusal: why it may use nothing but what is public.
        tenant: whose request it is.
        booked: False for a line of a batch, which is bounded where it comes from and stands behind all others; only its
            tokens count at its tenant's rate.
        body: bytes of its body, but for the first INLINE_BYTES, until it is charged: what waits to be tokenized counts.
        ahead: requests under way when it came.
        waits, load: for its model to be loaded; how many seconds it has.
        let_go: what gives up the model that it uses, and whatever else it holds; any of it may have been given up.
        model, ..., stalls: what became of it, for the log; times in seconds of ``time.monotonic``.
        starved_first: how much of ``starved`` was before its first token.
        stalls: since when and for how many seconds its client did not take what was written.
        answer: the id of what it is answered, by which the engine's requests are named.
        texts: what it was given and answered, where that is kept.
    """

    gate: Gate
    id: str
    key: Key | None = None
    refusal: HTTPError | None = None
    tenant: str = ""
    booked: bool = True
    arrived: float = field(default_factory=time.monotonic)
    body: int = 0
    visit: Visit | None = None
    ahead: int = 0
    waits: bool = False
    load: float = 0.0
    let_go: list[Callable[[], None]] = field(default_factory=list)
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    admitted: float | None = None
    started: float | None = None
    first_token: float | None = None
    longest_gap: float = 0.0
    preempted: int = 0
    starved: float = 0.0
    starved_first: float = 0.0
    stalls: list[tuple[float, float]] = field(default_factory=list)
    answer: str | None = None
    texts: Texts | None = None
    finish: str | None = None

    def require(self, access: Access) -> None:
        """Raises HTTPError: (no_api_key, invalid_api_key, key_revoked, role_not_allowed, no_tenant)."""
        if access == "public":
            return
        if self.refusal is not None:
            raise self.refusal
        if access == "admin" and not self.administers:
            raise _no_administrator(self.key)
        if access == "tenant" and self.key is None and self.gate.public:
            raise HTTPError(
                "no_tenant",
                "This server keeps nothing for who has no key",
                why="others than its machine can reach it, and whoever has no key could read and delete what it keeps",
                fix="serve with --keys, and send one",
                status=403,
            )

    def sees(self, tenant: str | None) -> bool:
        """Whether it may be told of a tenant's requests. Administrators are told of all."""
        return self.administers or (self.key is not None and self.key.tenant == tenant)

    @property
    def administers(self) -> bool:
        """Who needs no key does, where nobody but this machine can reach the server."""
        if self.key is None:
            return self.gate.ring is None and not self.gate.public
        return self.key.role == "admin"

    @property
    def least_priority(self) -> int:
        """The lowest that its request may have: what its key says, else any for who administers, and 0 for others."""
        if self.key is not None and self.key.min_priority is not None:
            return self.key.min_priority
        return -MAX_PRIORITY if self.administers else 0

    def enter(self) -> None:
        """Counts it among its tenant's requests. Raises OverLimit, as ``Admission.enter``."""
        ring, admission = self.gate.ring, self.gate.admission
        rates = Rates() if ring is None else ring.rates(self.tenant)
        if not self.booked:
            self.visit = admission.stand_behind(self.tenant, rates, time.monotonic())
            return
        self.visit = admission.enter(self.tenant, rates, time.monotonic())
        self.ahead = len(self.gate.live)
        self.gate.live.add(self)

    def charge(self, prompt: int, completions: int = 0, longest: int = 0, max_tokens: int | None = None) -> None:
        """As ``Admission.size`` and ``Admission.charge``, whose errors it raises."""
        if self.visit is None:
            self.enter()
        assert self.visit is not None
        admission = self.gate.admission
        now = time.monotonic()
        admission.charge(self.visit, admission.size(prompt, completions, longest, max_tokens), now)
        self.admitted = self.admitted or now
        self.prompt_tokens += prompt
        self.put_down()

    def put_down(self) -> None:
        """Gives back the place in memory that its body has."""
        self.gate.uploading -= self.body
        self.body = 0

    def reserve(self, tokens: int) -> None:
        """Takes room in the queue until ``release``, before it is known how long it can get. Raises Unavailable."""
        self.waits = True
        if self.visit is not None:
            self.gate.admission.reserve(self.visit, tokens, time.monotonic())

    def release(self) -> None:
        self.waits = False
        if self.visit is not None and not self.visit.left:
            self.gate.admission.release(self.visit)

    def began(self, timing: Timing | None) -> None:
        """A first token is here, and what the engine says of the time before it."""
        if self.first_token is None:
            self.first_token = time.monotonic()
            if self.admitted is not None and timing is not None:
                self.started = min(self.admitted + timing.queued, self.first_token)
                self.starved_first = timing.starved

    def waited(self, timing: Timing) -> None:
        """Of several samples the one that waited most speaks for all: they run at the same time."""
        self.preempted = max(self.preempted, timing.preempted)
        self.starved = max(self.starved, timing.starved)

    def allowances(self) -> list[tuple[bytes, bytes]]:
        """What its tenant has left, as headers (OpenAI's API reference, "Rate limits"), of what is limited."""
        if self.key is None:
            return []
        headers = []
        for name, left in self.gate.admission.allowances(self.tenant, time.monotonic()).items():
            values = {"limit": left.limit, "remaining": left.remaining, "reset": f"{left.full_after:.3f}s"}
            headers += [(f"x-ratelimit-{what}-{name}".encode(), str(value).encode()) for what, value in values.items()]
        return headers

    def leave(self) -> None:
        while self.let_go:
            self.let_go.pop()()
        self.put_down()
        if self.visit is not None:
            used = self.prompt_tokens + self.completion_tokens
            self.gate.admission.leave(self.visit, time.monotonic(), used)
            self.gate.live.discard(self)


current: ContextVar[Caller] = ContextVar("caller")
"""Of the request that the running task works on. The edge sets it; whatever it starts inherits it."""


class Gate:
    """The keys that open this server now, and the books of its tenants.

    Args:
        keys: a file of keys; None asks nobody for one.
        public: others than this machine can reach the server: nobody administers it without a key.
        keep_texts: the inspector shows whoever may see a request also what it said.

    Attributes:
        live: requests that have entered and not left.
        uploading: bytes of bodies that are read, parsed or wait to be tokenized.
        spooled: bytes of files that are being uploaded.

    Raises:
        ConfigError: as ``read_keys``.
    """

    def __init__(
        self, admission: Admission, keys: Path | None = None, *, public: bool = False, keep_texts: bool = False
    ) -> None:
        self.admission, self.public, self.keep_texts = admission, public, keep_texts
        self.path = keys
        self.ring = None if keys is None else Keyring(read_keys(keys))
        self.live: set[Caller] = set()
        self.uploading = self.spooled = 0
        self._found = 0
        self._share()
        self._own: tuple[Key, ...] = ()

    def widen(self, budget: int) -> None:
        """There is room for so many tokens, if that is more than was found before."""
        self.admission.budget = self._found = max(self._found, budget)

    def own_key(self) -> str | None:
        """A key of the role admin that is in no file, good until the process ends; None if nobody needs one."""
        if self.ring is None and not self.public:
            return None
        secret, record = process_key()
        self._own = (record,)
        self.ring = self.ring and Keyring([*self.ring.keys, record])
        return secret

    def reload(self) -> int:
        """Takes the file's keys as they are now, all or none, and counts them. Requests under way go on.

        Raises:
            ConfigError: as ``read_keys``; the keys from before are still good.
        """
        if self.path is None:
            return 0
        keys = read_keys(self.path)
        self.ring = Keyring([*keys, *self._own])
        self.admission.forget(self.ring.tenants)
        self._share()
        return len(keys)

    def _share(self) -> None:
        self.admission.shared = self.ring is not None and len(self.ring.tenants) > 1

    def reload_or_log(self) -> None:
        try:
            self.reload()
        except PenstockError as error:
            _log.error("the keys were not reloaded, those from before stay: %s", error)

    def caller(self, headers: Headers, id: str) -> Caller:
        """Who sends a request with these headers."""
        if self.ring is None and not self._own:
            return Caller(self, id)
        presented = _presented(headers)
        if self.ring is None:  # clients that must send a key send whatever they like
            found = (key for text in presented if (key := Keyring(self._own).find(text)))
            return Caller(self, id, next(found, None))
        if not presented:
            return Caller(self, id, refusal=_refused("no_api_key", "This server asks for a key"))
        (text, *others) = presented
        key = None if others or len(text) > MAX_KEY_LENGTH else self.ring.find(text)
        if key is None:
            return Caller(self, id, refusal=_refused("invalid_api_key", "The key is not one of this server's"))
        if key.revoked is not None:
            return Caller(self, id, refusal=_refused("key_revoked", "The key has been revoked"))
        return Caller(self, id, key, tenant=key.tenant)


def _refused(code: str, what: str) -> HTTPError:
    fix = "send a key that `penstock keys add` made, as Authorization: Bearer or x-api-key"
    return HTTPError(code, what, fix=fix, status=401)


def _no_administrator(key: Key | None) -> HTTPError:
    if key is None:
        return HTTPError(
            "role_not_allowed",
            "Nobody administers this server without a key",
            why="others than its machine can reach it",
            fix="serve with --keys, and send one of the role admin",
            status=403,
        )
    return HTTPError(
        "role_not_allowed",
        "This key is not for administration",
        why=f"its role is {key.role}",
        fix="use a key of the role admin",
        status=403,
    )


def _presented(headers: Headers) -> set[str]:
    """The keys that a request carries; several that differ are none."""
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.decode("latin-1").strip())
        elif name == b"authorization":
            scheme, _, token = value.decode("latin-1").strip().partition(" ")
            found.add(token.strip() if scheme.lower() == "bearer" else "")
    return found
