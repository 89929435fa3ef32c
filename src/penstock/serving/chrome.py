"""A Trace as Perfetto and chrome://tracing read it: the Trace Event Format, complete (X) events, counters and names.

Three processes: the engine (scheduler, executor, counters), its samples (a track for each, whose slices follow one
another from its arrival to its end), and the server's requests (a track for each, likewise).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.core.trace import RequestTrace, StepTrace, Trace
from penstock.serving.context import context_of
from penstock.serving.history import Visit, phases
from penstock.serving.limits import MAX_TRACE_SECONDS
from penstock.serving.model_routes import in_memory
from penstock.serving.operations import operation
from penstock.serving.requestlog import line_of
from penstock.serving.steps import Composition, Seconds, Tokens, look, number_of

ENGINE, SAMPLES, REQUESTS = 1, 2, 3
SCHEDULER, EXECUTOR = 1, 2
STALLED = "waiting for its client"
Event = dict[str, Any]


class Slice(NamedTuple):
    """Something that took from ``start`` to ``end``, in seconds of the trace's clock."""

    name: str
    start: float
    end: float
    args: dict[str, Any] | None = None


class Last(msgspec.Struct, kw_only=True):
    seconds: Seconds = 10.0
    model: str | None = None


@operation("The engine's last steps and requests as a file for Perfetto.", query=Last, gives=dict[str, Any])
async def trace_file(request: Request) -> Response:
    """GET /debug/trace: the last ``seconds`` (10), of all that the engine and the server still know of them.

    ``model``: by default the first that is in memory. Of requests to others nothing is told.
    """
    query = request.query_params
    seconds = number_of(query, "seconds", 10.0, MAX_TRACE_SECONDS)
    context = in_memory(context_of(request), query.get("model"))
    seen = await look(context, seconds)
    visits = [visit for visit in context.history.visits if visit.arrived + visit.line.total_s >= seen.now - seconds]
    visits += [Visit.of(caller, line_of(caller, "", 0)) for caller in context.gate.live]
    visits = [visit for visit in visits if visit.line.model in (None, context.name)]
    body = await asyncio.to_thread(lambda: msgspec.json.encode(chrome_trace(seen, visits)))
    kept = {"content-disposition": 'attachment; filename="penstock-trace.json"'}
    return Response(body, headers=kept, media_type="application/json")


def chrome_trace(trace: Trace, visits: Iterable[Visit] = ()) -> dict[str, Any]:
    """The object that such a file holds. Times are in microseconds after its first event, sorted."""
    events = [*_engine(trace), *_samples(trace), *_requests(visits)]
    origin = min((event["ts"] for event in events if event["ph"] != "M"), default=0)
    for event in events:
        if event["ph"] != "M":
            event["ts"] = (event["ts"] - origin) / 1000
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0), -event.get("dur", 0)))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin_ns": origin}}


def _complete(pid: int, tid: int, piece: Slice) -> Event:
    start, end = round(1e9 * piece.start), round(1e9 * piece.end)
    event = {"name": piece.name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": max(0, end - start) / 1000}
    return event | {"args": piece.args or {}}


def _named(pid: int, name: str, tid: int | None = None) -> Event:
    kind = "process_name" if tid is None else "thread_name"
    return {"name": kind, "ph": "M", "pid": pid, "args": {"name": name}} | ({} if tid is None else {"tid": tid})


# -- the engine ---------------------------------------------------------------------------------------------------


def _engine(trace: Trace) -> Iterator[Event]:
    yield _named(ENGINE, "engine")
    yield _named(ENGINE, "scheduler", SCHEDULER)
    yield _named(ENGINE, "executor", EXECUTOR)
    composition, total = Composition(trace.requests), sum(pool.total for pool in trace.pools)
    for index, step in enumerate(trace.steps):
        tokens = composition.of(step)
        yield _complete(ENGINE, SCHEDULER, Slice(f"plan {step.number}", step.began, step.planned))
        if not step.failed:
            yield _complete(ENGINE, SCHEDULER, Slice(f"commit {step.number}", step.landed, step.committed))
            yield _complete(ENGINE, SCHEDULER, Slice(f"publish {step.number}", step.committed, step.published))
        following = trace.steps[index + 1] if index + 1 < len(trace.steps) else None
        for piece in _executed(step, following, tokens):
            yield _complete(ENGINE, EXECUTOR, piece)
        used = max(0, total - step.free - step.cached)
        yield _counter("KV blocks", step, {"used": used, "cached": step.cached})
        yield _counter("tokens of the step", step, tokens._asdict())
        yield _counter("samples", step, {"in the step": len(step.slices), "waiting": step.waiting})
    for step in trace.inflight[:1]:  # those after it wait for it
        since = max(step.planned, trace.steps[-1].landed if trace.steps else 0.0)
        yield _complete(ENGINE, EXECUTOR, Slice(f"step {step.number} in flight", since, trace.now))


def _counter(name: str, step: StepTrace, values: dict[str, int]) -> Event:
    return {"name": name, "ph": "C", "pid": ENGINE, "tid": 0, "ts": round(1e9 * step.planned), "args": values}


def _executed(step: StepTrace, following: StepTrace | None, tokens: Tokens) -> Iterator[Slice]:
    """The step and, within it, its phases; it ends before the next one begins, as they are computed in order."""
    start = _start(step)
    end = start + step.forward + step.sample if step.started else step.landed
    if following is not None:
        end = max(start, min(end, _start(following)))
    failed = " failed" if step.failed else ""
    args = {"requests": len(step.slices), **tokens._asdict(), "replayed": step.replayed}
    yield Slice(f"step {step.number}{failed}", start, end, args)
    if step.started:
        middle = min(end, start + step.forward)
        yield Slice("forward", start, middle)
        yield Slice("sample", middle, end)


def _start(step: StepTrace) -> float:
    return step.started or step.planned


# -- samples -------------------------------------------------------------------------------------------------------


def _samples(trace: Trace) -> Iterator[Event]:
    yield _named(SAMPLES, "samples")
    parts: dict[int, list[tuple[int, int, int]]] = {}  # (index of the step, start, count)
    departures: dict[int, list[int]] = {}
    for index, step in enumerate(trace.steps):
        for number, start, count in step.slices:
            parts.setdefault(number, []).append((index, start, count))
        for number in step.gone:
            departures.setdefault(number, []).append(index)
    for tid, request in enumerate(trace.requests, 1):
        yield _named(SAMPLES, f"{request.id} #{request.sample}", tid)
        for piece in lifetime(request, trace, parts.get(request.number, []), departures.get(request.number, [])):
            yield _complete(SAMPLES, tid, piece)


def lifetime(
    request: RequestTrace, trace: Trace, parts: Sequence[tuple[int, int, int]], gone: Sequence[int]
) -> list[Slice]:
    """Slices that follow one another without a gap, from its arrival to its end, or to now if it has not ended.

    Args:
        parts: (index of a step, position, count), of the steps that it was part of.
        gone: indices of the steps with which the executor forgot it.
    """
    end = trace.now if request.ended is None else request.ended
    if not parts:
        begun = end if request.queued is None else min(end, request.arrived + request.queued)
        return _joined([Slice("queue", request.arrived, begun), Slice("earlier", begun, end)])
    first = trace.steps[parts[0][0]].now
    taken = first if request.queued is None else request.arrived + request.queued
    if first - taken < 1e-6:  # the same moment, added up
        taken = first
    out = [Slice("queue", request.arrived, taken), Slice("earlier", taken, first)]
    for place, (index, start, count) in enumerate(parts):
        step = trace.steps[index]
        following = parts[place + 1][0] if place + 1 < len(parts) else None
        until = end if following is None else trace.steps[following].now
        done = until  # the time between two steps is part of the first
        if index + 1 < (len(trace.steps) if following is None else following):
            done = min(until, step.published)
        name = "decode" if start >= request.prompt else "prefill"
        args = {"position": start, "tokens": count}
        out.append(Slice("failed step" if step.failed else name, step.now, done, args))
        later = (at for at in gone if index < at <= (following or at))  # forgotten after its end, it was not preempted
        lost = not step.failed and any(trace.steps[at].now < end for at in later)
        out.append(Slice("preempted" if lost else "wait", done, until))
    return _joined(out)


def _joined(pieces: Iterable[Slice]) -> list[Slice]:
    """Without those of no length, and decoding in one piece until something else comes."""
    out: list[Slice] = []
    for piece in pieces:
        if round(1e9 * piece.end) <= round(1e9 * piece.start):
            continue
        last = out[-1] if out else piece
        if last is not piece and last.name == piece.name == "decode" and last.args and piece.args:
            tokens = last.args["tokens"] + piece.args["tokens"]
            out[-1] = last._replace(end=piece.end, args=last.args | {"tokens": tokens})
        else:
            out.append(piece)
    return out


# -- the server's requests -----------------------------------------------------------------------------------------


def _requests(visits: Iterable[Visit]) -> Iterator[Event]:
    yield _named(REQUESTS, "requests")
    for tid, visit in enumerate(visits, 1):
        line = visit.line
        yield _named(REQUESTS, line.id, tid)
        args = {
            "answer": visit.answer, "path": line.path, "status": line.status, "prompt_tokens": line.prompt_tokens,
            "cached_tokens": line.cached_tokens, "completion_tokens": line.completion_tokens, "finish": line.finish,
            "preempted": line.preempted, "phases_s": phases(line),
        }  # fmt: skip
        since, end = visit.arrived, visit.arrived + line.total_s
        yield _complete(REQUESTS, tid, Slice("request", since, end, args))
        told = line.started_s is not None or not 0 < line.status < 400  # of vectors it is not
        started = line.started_s if told else line.admitted_s
        marks = (("read", line.admitted_s), ("queue", started), ("prefill", line.first_token_s))
        for name, mark in (*marks, ("decode", line.total_s)):
            until = end if mark is None else visit.arrived + mark
            yield _complete(REQUESTS, tid, Slice(name, since, until))
            since = until
            if mark is None:
                break
        for start, seconds in visit.stalls:
            yield _complete(REQUESTS, tid, Slice(STALLED, start, min(end, start + seconds)))
