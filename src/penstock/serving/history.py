"""GET /requests: those that ended last, each with its phases and a sentence on what took it so long."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import count

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.errors import HTTPError
from penstock.serving.gate import Caller, current
from penstock.serving.limits import MAX_REMEMBERED, MAX_REMEMBERED_IN_ALL, MAX_VISITS
from penstock.serving.operations import operation
from penstock.serving.requestlog import Line
from penstock.serving.texts import KeptTexts, Texts

PHASES = ("read", "queue", "prompt", "decode", "memory", "client", "load")


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a trace: its line, and what else its Caller had."""

    line: Line
    arrived: float
    stalls: tuple[tuple[float, float], ...] = ()
    answer: str | None = None

    @classmethod
    def of(cls, caller: Caller, line: Line) -> Visit:
        return cls(line, caller.arrived, tuple(caller.stalls), caller.answer)


class Ended(Line, kw_only=True):
    """As in the log, and its ``phases`` in seconds. ``kept``: what it said can be had at /requests/{id}."""

    phases: dict[str, float]
    why: str
    kept: bool


class EndedList(msgspec.Struct):
    requests: list[Ended]


class History:
    """Of each tenant the last MAX_REMEMBERED requests that were computed, or failed after they were let in, as JSON.

    Beyond MAX_REMEMBERED_IN_ALL, who has most of them gives one up, so that nobody who asks much makes others' go.

    Attributes:
        visits: the last MAX_VISITS of all, for a trace.
    """

    def __init__(self) -> None:
        self._ended: dict[str | None, deque[tuple[int, msgspec.Raw, str, Texts | None]]] = {}
        self._numbers = count()
        self._size = 0
        self.visits: deque[Visit] = deque(maxlen=MAX_VISITS)

    def add(self, visit: Visit, texts: Texts | None = None) -> None:
        """What is answered from the tokenizer alone is not worth a place."""
        line = visit.line
        if line.admitted_s is None and line.status < 400:
            return
        self.visits.append(visit)
        told = Ended(**msgspec.structs.asdict(line), phases=phases(line), why=why(line), kept=texts is not None)
        own = self._ended.setdefault(line.tenant, deque())
        own.append((next(self._numbers), msgspec.Raw(msgspec.json.encode(told)), line.id, texts))
        self._size += 1
        if len(own) > MAX_REMEMBERED:
            self._forget(line.tenant)
        elif self._size > MAX_REMEMBERED_IN_ALL:  # of those that have as many, who had its oldest one first
            self._forget(max(self._ended, key=lambda tenant: (len(self._ended[tenant]), -self._ended[tenant][0][0])))

    def seen_by(self, caller: Caller) -> list[msgspec.Raw]:
        """The latest first, MAX_REMEMBERED at most."""
        seen = [each for tenant, own in self._ended.items() if caller.sees(tenant) for each in own]
        return [told for _, told, *_ in sorted(seen, key=lambda each: -each[0])[:MAX_REMEMBERED]]

    def texts(self, caller: Caller, id: str) -> Texts | None:
        """What the latest request of that id said, if the caller may see it and it was kept."""
        seen = [each for tenant, own in self._ended.items() if caller.sees(tenant) for each in own if each[2] == id]
        return max(seen, key=lambda each: each[0])[3] if seen else None

    def _forget(self, tenant: str | None) -> None:
        self._ended[tenant].popleft()
        self._size -= 1
        if not self._ended[tenant]:
            del self._ended[tenant]


def phases(line: Line) -> dict[str, float]:
    """Seconds of each of PHASES that it came to; their sum is ``total_s``.

    read: until its body was here, its prompt in tokens, and room in the server's queue; queue: until the engine took it
    up; prompt: until its first token; decode: until its end. Three are taken out of those that they lie in: memory,
    when it was not computed for want of KV blocks; client, when its client did not take what was written; load, when
    its model was not in memory.
    """
    started = line.started_s
    if started is None and line.status < 400:  # vectors: when the engine began with them is not told
        started = line.admitted_s
    spans, since = {}, 0.0
    for phase, mark in zip(PHASES[:4], (line.admitted_s, started, line.first_token_s, line.total_s), strict=True):
        end = line.total_s if mark is None else mark
        spans[phase] = round(end - since, 6)
        if mark is None:
            break
        since = mark
    last = next(reversed(spans))
    first = line.starved_first_s if last == "decode" else line.starved_s
    for taken, phase, seconds in (
        ("memory", "prompt", first),
        ("memory", "decode", line.starved_s - first),
        ("client", last, line.client_s),
        ("load", "read", line.load_s),
    ):
        if seconds > 0 and phase in spans:
            part = min(seconds, spans[phase])
            spans[phase] = round(spans[phase] - part, 6)
            spans[taken] = round(spans.get(taken, 0.0) + part, 6)
    return spans


def why(line: Line) -> str:
    """What most of its time went to, from its own numbers."""
    spans = phases(line)
    phase = max(spans, key=lambda name: spans[name])
    head, tokens = f"{spans[phase]:.3f} of {line.total_s:.3f} s ", line.completion_tokens
    others = f"{line.ahead or 'no'} other request{'s were' if line.ahead != 1 else ' was'} under way when it came"
    if line.admitted_s is None:
        return f"{head}passed until it was refused with status {line.status}."
    if phase == "memory":
        times = f"{line.preempted} time{'s' if line.preempted != 1 else ''}"
        return f"{head}passed while KV blocks were short: it was preempted {times}; {others}."
    if phase == "client":
        return f"{head}passed until its client took what was written for it: {tokens} tokens."
    if phase == "load":
        return f"{head}passed until its model was in memory; {others}."
    if phase == "read":
        return f"{head}passed until its body was here and in tokens, {line.prompt_tokens} of them."
    if phase == "queue":
        awaited = "the engine took it up" if line.started_s else "it ended, before its first token"
        return f"{head}passed until {awaited}; {others}."
    if phase == "prompt":
        computed = line.prompt_tokens - line.cached_tokens
        rate = (computed + (0 if line.first_token_s else tokens)) / max(spans[phase], 1e-6)
        written = f" and its {tokens} tokens" if tokens and not line.first_token_s else ""  # told in one piece
        return (
            f"{head}went into its prompt{written}: {computed} of {line.prompt_tokens} prompt tokens were not in the "
            f"cache, {rate:.0f} tokens were computed a second; {others}."
        )
    mean = spans[phase] / max(1, tokens - 1)
    slowest = f", one of which took {line.longest_gap_s:.3f} s" if line.longest_gap_s > 5 * mean else ""
    return f"{head}went into writing {tokens} tokens, {1 / max(mean, 1e-6):.0f} a second{slowest}; {others}."


@operation("The requests that ended last.", gives=EndedList)
async def finished(request: Request) -> Response:
    """To a key of a tenant only that tenant's."""
    history: History = request.app.state.context.history
    body = msgspec.json.encode({"requests": history.seen_by(current.get())})
    return Response(body, media_type="application/json")


@operation("What a request that has ended was given and answered, where that is kept.", gives=KeptTexts)
async def texts_of(request: Request) -> Response:
    """To a key of a tenant only of that tenant's. Raises HTTPError: (texts_not_kept)."""
    history: History = request.app.state.context.history
    if (texts := history.texts(current.get(), request.path_params["id"])) is None:
        raise HTTPError(
            "texts_not_kept",
            "What this request said is not kept",
            why="it is none of the last that ended, or the server keeps no texts",
            fix="see GET /requests, or serve with --keep-texts and send it again",
            status=404,
        )
    told = await asyncio.to_thread(lambda: msgspec.json.encode(texts.shown()))
    return Response(told, media_type="application/json")
