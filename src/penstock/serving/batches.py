"""/v1/batches: files of requests that are answered when there is time, each once, whatever happens to the process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.base import Unavailable
from penstock.serving.batch_run import RETRY_SECONDS, Answerer, Run
from penstock.serving.batch_table import LIVE, Batch, Complaint
from penstock.serving.context import Context
from penstock.serving.database import Once
from penstock.serving.errors import HTTPError
from penstock.serving.files import ExpiresAfter
from penstock.serving.schemas import Metadata
from penstock.serving.store import Store

DAY = 86_400
SWEEP_SECONDS = 60.0
"""How often, at least, it is looked whether files have expired."""

_log = logging.getLogger(__name__)


class BatchRequest(msgspec.Struct, kw_only=True):
    """POST /v1/batches"""

    input_file_id: Annotated[str, Meta(max_length=64)]
    endpoint: Annotated[str, Meta(max_length=64)]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class Complaints(msgspec.Struct):
    data: tuple[Complaint, ...]
    object: str = "list"


class Counts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class BatchObject(msgspec.Struct, kw_only=True):
    """OpenAI's Batch."""

    id: str
    endpoint: str
    model: str
    errors: Complaints | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: BatchUsage
    metadata: dict[str, str] | None
    object: str = "batch"


def shown(batch: Batch) -> BatchObject:
    own = {name: getattr(batch, name) for name in BatchObject.__struct_fields__ if hasattr(batch, name)}
    tokens_in, tokens_out = batch.input_tokens, batch.output_tokens
    made = {
        "errors": Complaints(batch.errors) if batch.errors else None,
        "request_counts": Counts(batch.total, batch.completed, batch.failed),
        "usage": BatchUsage(tokens_in, tokens_out, tokens_in + tokens_out),
    }
    return BatchObject(**own | made)


class Batches:
    """Carries out the batches of one store, one at a time; tenants take turns, and so do batches that cannot go on.

    A turn ends with its batch, or after TURN_SECONDS if another tenant waits for one. A batch whose tenant has no
    tokens left, or whose model cannot be loaded, rests, and the others go on. One that is cancelled, or whose time is
    over, ends without a turn.

    Args:
        folder: of the store; made when the first thing is kept, so that a server that keeps nothing writes nothing.
        answerers: by path.
    """

    def __init__(self, context: Context, folder: Path, answerers: Mapping[str, Answerer]) -> None:
        self.context, self.folder, self.answerers = context, folder, answerers
        self._store: Store | None = None
        self._wake = asyncio.Event()
        self._turns: dict[str, int] = {}  # the last one of each tenant and of each unfinished batch
        self._resting: dict[str, float] = {}  # until when, by time.monotonic
        self._worker: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def resume(self) -> None:
        """Goes on with what an earlier process left, if there is anything."""
        if (self.folder / "store.sqlite").is_file():
            with suppress(Unavailable):  # another server has it; who asks for files is told
                await self.store()

    async def store(self) -> Store:
        """Raises Unavailable: (store_in_use), (store_unusable)."""
        async with self._opening:
            if self._store is None:
                self._store = await asyncio.to_thread(Store, self.folder)
                if not self.context.draining:
                    self._worker = asyncio.create_task(self._work())
            return self._store

    async def stop(self) -> None:
        """What is under way is given up and stays to be done. Files can still be had."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def close(self) -> None:
        await self.stop()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def create(self, asked: BatchRequest, tenant: str, key: str | None = None) -> BatchObject:
        """``key``: the client's own, under which it may ask again.

        Raises:
            HTTPError: (invalid_parameter), (file_not_found), (idempotency_key_reused).
            OverLimit: (too_many_batches).
        """
        if asked.endpoint not in self.answerers:
            why = f"it must be one of {', '.join(sorted(self.answerers))}"
            raise HTTPError("invalid_parameter", "endpoint cannot be used", why=why, param="endpoint")
        store, now = await self.store(), int(time.time())
        await asyncio.to_thread(store.file, tenant, asked.input_file_id)
        batch = Batch(
            id=store.new_id("batch"),
            tenant=tenant,
            model=self.context.name,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + DAY,
            metadata=asked.metadata,
            outputs_stay=None if asked.output_expires_after is None else asked.output_expires_after.seconds,
        )
        once = None if key is None else Once(tenant, key, f"batch {sha256(msgspec.json.encode(asked)).hexdigest()}")
        id = await asyncio.to_thread(store.batches.begin, batch, once)
        self._wake.set()
        return shown(await asyncio.to_thread(store.batches.get, tenant, id))

    async def cancel(self, tenant: str, id: str) -> BatchObject:
        """Raises HTTPError: (batch_not_found), (batch_ended)."""
        store = await self.store()
        batch = await asyncio.to_thread(store.batches.get, tenant, id)
        if batch.status not in LIVE:
            raise HTTPError(
                "batch_ended",
                "The batch has ended",
                why=f"it is {batch.status}",
                fix="make a new one of its file",
                status=409,
            )

        def cancelled(batch: Batch) -> Batch:
            return batch.moved("cancelling") if batch.status in ("validating", "in_progress") else batch

        batch = await asyncio.to_thread(store.batches.change, id, cancelled)
        self._wake.set()
        return shown(batch)

    # -- the worker

    async def _work(self) -> None:
        assert self._store is not None
        while True:
            self._wake.clear()
            try:
                batches = await self._in_line(self._store)
                rests = {batch.id: self._rest(batch) for batch in batches}
                if not (ready := [batch for batch in batches if rests[batch.id] <= 0]):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), min([SWEEP_SECONDS, *rests.values()]))
                    continue
                batch = min(ready, key=self._last_turn)
                self._turns[batch.tenant] = self._turns[batch.id] = max(self._turns.values(), default=0) + 1
                await self._go_on(self._store, batch)
            except Exception:  # a full disk, say: the batch is tried again
                _log.exception("the batches cannot go on")
                await asyncio.sleep(RETRY_SECONDS)

    async def _in_line(self, store: Store) -> list[Batch]:
        await asyncio.to_thread(store.delete_expired)
        return await asyncio.to_thread(store.batches.unfinished)

    async def _go_on(self, store: Store, batch: Batch) -> None:
        run = Run(store, batch, self.context, self.answerers[batch.endpoint], partial(self._look_after, store, batch))
        await run.all()
        if run.resume_at is not None:
            self._resting[batch.id] = run.resume_at
        else:
            self._resting.pop(batch.id, None)
            self._turns.pop(batch.id, None)

    async def _look_after(self, store: Store, current: Batch) -> bool:
        """Ends those in line that are over; whether one of a tenant but the current one's could go on."""
        others = [batch for batch in await self._in_line(store) if batch.id != current.id]
        for batch in filter(_is_over, others):
            await self._go_on(store, batch)
        return any(x.tenant != current.tenant and not _is_over(x) and self._rest(x) <= 0 for x in others)

    def _rest(self, batch: Batch) -> float:
        """Seconds that it rests from now on, or until its time is over; one that is cancelled does not."""
        if batch.status != "in_progress":
            return 0.0
        return min(self._resting.get(batch.id, 0.0) - time.monotonic(), batch.expires_at - time.time())

    def _last_turn(self, batch: Batch) -> tuple[int, int]:
        return self._turns.get(batch.tenant, 0), self._turns.get(batch.id, 0)


def _is_over(batch: Batch) -> bool:
    """It asks nothing of the engine any more."""
    return batch.status == "cancelling" or batch.expires_at <= time.time()
