"""One batch: its file is read, its lines are answered, its outputs are written; from wherever it stands."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from penstock.base import PenstockError, Unavailable
from penstock.core.service import MAX_PRIORITY
from penstock.serving.answers import size_of, told
from penstock.serving.batch_table import Batch, Complaint, Done, Line, Status
from penstock.serving.chat_schemas import ChatChoice, ChatCompletion
from penstock.serving.context import Context
from penstock.serving.database import StoredFile, not_found
from penstock.serving.edge import off_loop, parse
from penstock.serving.errors import ErrorBody, HTTPError, body_of, internal_error, log_fault
from penstock.serving.files import write
from penstock.serving.gate import Caller, current
from penstock.serving.limits import MAX_BATCH_LINES, MAX_BODY_BYTES, MAX_COMPLAINTS
from penstock.serving.priorities import rank
from penstock.serving.response_items import ResponseObject
from penstock.serving.schemas import Completion, GenerationRequest, ModelRequest, Usage
from penstock.serving.store import Store
from penstock.serving.vectors import Ranking, VectorList, VectorUsage

BEHIND = 1000
"""Levels of priority by which a batch stands behind requests whose clients wait: by default those of 10,000 seconds."""
AT_ONCE = 2
"""Requests of a batch that are taken in, in steps of ``max_num_seqs``: one running, one in line. Those that wait for
their model to be loaded do not count, and of each model no more than that wait."""
COMMIT_SECONDS, COMMIT_LINES = 0.25, 64
"""Answers are committed together: what a kill may make the engine do again, and how often the disk is written."""
TURN_SECONDS = 10.0
"""After which a batch gives way to one of another tenant."""
LOOK_SECONDS = 1.0
"""How often others are looked at meanwhile."""
READ_LINES = 256
RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


Answer = ResponseObject | Completion | ChatCompletion[ChatChoice] | VectorList[Any] | Ranking
"""What a line is answered with."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """What may stand in a batch: the requests of a path, and the answer to one that is not streamed."""

    decode: Callable[[bytes], ModelRequest]
    answer: Callable[[Any, Context], Awaitable[Answer]]


class BatchLine(msgspec.Struct, kw_only=True):
    """A line of a batch's file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Annotated[str, Meta(max_length=64)]
    body: msgspec.Raw


class Run:
    """One batch, from the state in which it is found to its end, or until it has to wait: its tenant has no tokens
    left, or a model is not there and all lines for others have been answered, or it is another tenant's turn.

    Args:
        others: looks after those in line, and tells whether one of another tenant could go on.

    Attributes:
        resume_at: when it is worth another try, by ``time.monotonic``; None if it went on to the end.
    """

    def __init__(
        self, store: Store, batch: Batch, context: Context, answerer: Answerer, others: Callable[[], Awaitable[bool]]
    ) -> None:
        self.store, self.batch, self.context, self.answerer = store, batch, context, answerer
        self._others, self._began = others, time.monotonic()
        self._looked = self._began
        self.resume_at: float | None = None
        self._stopped = False  # no line can go on, whichever model it names
        self._away: set[str] = set()  # models that could not be had: lines that name them wait for another try
        self._window = AT_ONCE * context.served.config.max_num_seqs
        self._awaited = Counter[str]()  # by model: lines that wait for it to be loaded

    async def all(self) -> None:
        try:
            file = await asyncio.to_thread(self.store.file, self.batch.tenant, self.batch.input_file_id)
            if not (path := self.store.path(file.id)).is_file():  # somebody emptied the folder
                raise not_found("file", file.id)
        except HTTPError as error:
            complaint = Complaint(error.code, error.what)
            self.batch = await self._change(lambda batch: replace(batch, errors=(complaint,)).moved("failed"))
            return
        if self.batch.status == "validating":
            await self._validate(path)
        if self.batch.status == "in_progress":
            await self._answer(path, file.sha256)
        if self.batch.status == "in_progress" and self.batch.expired_at is None and self.resume_at is not None:
            return
        if self.batch.status in ("in_progress", "finalizing", "cancelling"):
            await asyncio.to_thread(self._finish)

    async def _change(self, alter: Callable[[Batch], Batch]) -> Batch:
        return await asyncio.to_thread(self.store.batches.change, self.batch.id, alter)

    async def _validate(self, path: Path) -> None:
        lines, complaints = await asyncio.to_thread(read_lines, path, self.batch.endpoint)
        if complaints:
            self.batch = await self._change(lambda batch: replace(batch, errors=tuple(complaints)).moved("failed"))
        else:
            self.batch = await asyncio.to_thread(self.store.batches.start_lines, self.batch.id, lines)

    async def _answer(self, path: Path, sha256: str) -> None:
        """Answers lines until none is left that could be, or the batch is cancelled, or its time is over."""
        waiting, running = self._waiting(path), set[asyncio.Task[Done | None]]()
        done: list[Done] = []
        committed, exhausted = time.monotonic(), False
        deadline = committed + self.batch.expires_at - time.time()  # whatever is done to the clock from now on
        try:
            while True:
                over = self.batch.status != "in_progress" or time.monotonic() >= deadline
                if not over and not exhausted:
                    await self._look_around()
                while not (exhausted or over or self._stopped or len(running) - self._awaited.total() >= self._window):
                    following = await anext(waiting, None)
                    exhausted = following is None
                    if following is not None:
                        running.add(asyncio.create_task(self._line(*following, sha256)))
                if over or not running:
                    break
                finished, running = await asyncio.wait(
                    running, timeout=COMMIT_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                done += filter(None, [task.result() for task in finished])
                if len(done) >= COMMIT_LINES or time.monotonic() - committed >= COMMIT_SECONDS or not running:
                    self.batch = await asyncio.to_thread(self.store.batches.finish_lines, self.batch.id, done)
                    committed, done = time.monotonic(), []
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        self.batch = await asyncio.to_thread(self.store.batches.finish_lines, self.batch.id, done)
        if self.batch.status == "in_progress" and time.monotonic() >= deadline:
            await asyncio.to_thread(self._expire)

    async def _look_around(self) -> None:
        """Whoever's turn has lasted gives way if it is of use to somebody, once the lines under way are answered."""
        now = time.monotonic()
        if self._stopped or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if await self._others() and now - self._began >= TURN_SECONDS:
            self._stopped, self.resume_at = True, now

    async def _waiting(self, path: Path) -> AsyncGenerator[tuple[Line, bytes], None]:
        """(line, its bytes) of each line without an answer."""
        after = 0
        while lines := await asyncio.to_thread(self._read, path, after):
            for line, raw in lines:
                yield line, raw
            after = lines[-1][0].number

    def _read(self, path: Path, after: int) -> list[tuple[Line, bytes]]:
        lines = self.store.batches.waiting_lines(self.batch.id, after, READ_LINES)
        with path.open("rb") as file:
            return [(line, os.pread(file.fileno(), line.length, line.start)) for line in lines]

    async def _line(self, line: Line, raw: bytes, sha256: str) -> Done | None:
        """None if it has to wait: for its tenant's tokens, or until there is a model again.

        The same file gets the same answers whenever it is sent, so that a line's seed and ids are made of both.
        """
        digest = blake2b(f"{sha256}:{line.number}".encode(), digest_size=16).digest()
        seed, name = int.from_bytes(digest[:8], "little") >> 1, digest.hex()
        caller = Caller(self.context.gate, name, tenant=self.batch.tenant, booked=False)
        current.set(caller)
        try:
            body = bytes(msgspec.json.decode(raw, type=BatchLine).body)
            asked = await off_loop(len(body), partial(self.answerer.decode, body))
            rank(asked, caller.least_priority)
            model = self.batch.model if asked.model is None else asked.model
            if (context := await self._use(model, len(body))) is None:
                return None
            answer = await self.answerer.answer(self._behind(asked, seed), context)
            return await self._done(line, name, 200, answer)
        except PenstockError as error:
            # not the line's fault: it comes again, in this process or the next, and others' batches go on meanwhile
            if isinstance(error, Unavailable) or error.code in ("engine_dead", "engine_closed", "load_timeout"):
                self._stopped = True
                self._rest(error)
                return None
            log_fault(error)
            return await self._done(line, name, error.status, body_of(error))
        except Exception:
            _log.exception("line %d of batch %s failed", line.number, self.batch.id)
            return await self._done(line, name, 500, body_of(internal_error()))
        finally:
            caller.leave()

    async def _use(self, model: str, size: int) -> Context | None:
        """As ``Context.use``; None if the model cannot be had now: other lines may name another."""
        name = self.context.admit(model).name
        if name in self._away:
            return None
        if self._awaited[name] >= self._window:
            self._rest()
            return None
        self._awaited[name] += 1
        try:
            return await self.context.use(model, size)
        except Unavailable as error:
            if self.context.draining:
                raise
            self._away.add(name)
            self._rest(error)
            return None
        finally:
            self._awaited[name] -= 1

    def _rest(self, error: PenstockError | None = None) -> None:
        """There is another try when the first of what it waits for may be there."""
        seconds = error.retry_after if isinstance(error, Unavailable) else 0.0
        resume_at = time.monotonic() + max(RETRY_SECONDS, seconds)
        self.resume_at = min(resume_at, self.resume_at or resume_at)

    def _behind(self, asked: ModelRequest, seed: int) -> ModelRequest:
        if isinstance(asked, GenerationRequest):
            if asked.stream:
                raise HTTPError(
                    "invalid_parameter", "stream cannot be used in a batch", fix="leave it out", param="stream"
                )
            asked.seed = seed if asked.seed is None else asked.seed
        asked.priority = min(MAX_PRIORITY, (asked.priority or 0) + BEHIND)
        return asked

    async def _done(self, line: Line, name: str, status: int, body: Answer | ErrorBody) -> Done:
        return await off_loop(size_of(body), partial(done, line, name, status, body, self.batch.created_at))

    def _expire(self) -> None:
        error = {"code": "batch_expired", "message": "This request could not be executed before the batch expired."}
        while lines := self.store.batches.waiting_lines(self.batch.id, 0, READ_LINES):
            done = []
            for line in lines:
                name = blake2b(f"{self.batch.id}:{line.number}".encode(), digest_size=16).hexdigest()
                result = {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": None, "error": error}
                done.append(Done(line.number, True, json.dumps(result).encode() + b"\n"))
            self.batch = self.store.batches.finish_lines(self.batch.id, done)
        self.batch = self.store.batches.change(self.batch.id, lambda batch: replace(batch, expired_at=int(time.time())))

    def _finish(self) -> None:
        """Writes the outputs, in the order of the file, and ends the batch. A kill before that changes nothing."""

        def finalizing(batch: Batch) -> Batch:
            return batch.moved("finalizing") if batch.status == "in_progress" else batch

        self.batch = self.store.batches.change(self.batch.id, finalizing)
        made: dict[str, StoredFile] = {}
        for kind, failed in (("output", False), ("error", True)):
            file = self._output(kind, self.store.batches.results(self.batch.id, failed=failed))
            if file.bytes:
                made[f"{kind}_file_id"] = file
            else:
                self.store.path(file.id).unlink()

        def ended(batch: Batch) -> Batch:
            changes: dict[str, Any] = {name: file.id for name, file in made.items()}
            late = batch.expired_at is not None
            status: Status = "cancelled" if batch.status == "cancelling" else "expired" if late else "completed"
            return replace(batch, **changes).moved(status)

        self.batch = self.store.batches.finish(self.batch.id, ended, made.values())

    def _output(self, kind: str, results: Iterator[bytes]) -> StoredFile:
        name, stay = f"{self.batch.id}_{kind}.jsonl", self.batch.outputs_stay
        return write(self.store, self.batch.tenant, name, "batch_output", results, stay)


def done(line: Line, name: str, status: int, body: Answer | ErrorBody, created: int) -> Done:
    """What comes of a line. Its answer is changed to bear the line's own name and its batch's time, so that it is the
    same whenever it is made: all ids in it are made of one.

    Args:
        body: an Answer, or what is told of an error.
        created: in seconds since 1970.
    """
    tokens_in = tokens_out = 0
    if isinstance(body, dict):  # a ResponseObject
        own, used = body["id"].partition("_")[2], body["usage"] or {}
        tokens_in, tokens_out = used.get("input_tokens", 0), used.get("output_tokens", 0)
        body["id"], body["created_at"] = f"resp_{name}", created
        for item in body["output"]:
            item["id"] = item["id"].replace(own, name)
    elif not isinstance(body, ErrorBody):
        if isinstance(usage := body.usage, Usage | VectorUsage):
            tokens_in, tokens_out = usage.prompt_tokens, usage.total_tokens - usage.prompt_tokens
        body.id = f"{body.id.partition('-')[0]}-{name}"
        if not isinstance(body, Ranking):
            body.created = created
    response = {"status_code": status, "request_id": name, "body": msgspec.Raw(b"".join(told(body)))}
    result = {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": response, "error": None}
    return Done(line.number, status != 200, msgspec.json.encode(result) + b"\n", tokens_in, tokens_out)


def read_lines(path: Path, endpoint: str) -> tuple[list[Line], list[Complaint]]:
    """The lines of a batch's file, or what is wrong with it. Bodies are looked at when their turn comes."""
    lines: list[Line] = []
    complaints: list[Complaint] = []
    names = set[str]()
    start = number = 0
    with path.open("rb") as file:
        while raw := file.readline(MAX_BODY_BYTES + 1):
            number += 1
            at, start = start, start + len(raw)
            if not raw.strip():
                continue
            try:
                if len(raw) > MAX_BODY_BYTES:
                    raise HTTPError(
                        "line_too_large",
                        "The line is too large",
                        why=f"more than {MAX_BODY_BYTES} bytes",
                        fix="split its request into several",
                    )
                custom_id = _custom_id(raw, endpoint, names)
            except HTTPError as error:
                complaints.append(Complaint(error.code, str(error), error.param, number))
                if len(complaints) == MAX_COMPLAINTS or len(raw) > MAX_BODY_BYTES:
                    break
                continue
            names.add(custom_id)
            lines.append(Line(number, custom_id, at, len(raw)))
            if len(lines) > MAX_BATCH_LINES:
                complaints.append(Complaint("too_many_lines", f"The file has more than {MAX_BATCH_LINES} requests"))
                break
    if not lines and not complaints:
        complaints.append(Complaint("empty_file", "The file has no requests"))
    return lines, complaints


def _custom_id(raw: bytes, endpoint: str, taken: set[str]) -> str:
    line = parse(raw, BatchLine)
    if line.url != endpoint:
        fix = "write that there, or make a batch for each endpoint"
        raise HTTPError("mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}", fix=fix, param="url")
    if line.custom_id in taken:
        what = f"custom_id {line.custom_id!r} is used twice"
        raise HTTPError("duplicate_custom_id", what, fix="give each line its own", param="custom_id")
    return line.custom_id
