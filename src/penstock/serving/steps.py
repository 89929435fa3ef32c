"""GET /debug/engine: the engine's last steps, its requests and its KV blocks, for the dashboard."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.base import Unavailable
from penstock.core.trace import RequestTrace, StepTrace, Trace
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json
from penstock.serving.errors import HTTPError
from penstock.serving.limits import (
    LOOK_SECONDS,
    MAX_BLOCKS_SHOWN,
    MAX_LIVE_SECONDS,
    MAX_SHOWN,
    MAX_STEPS_SHOWN,
    MAX_TRACE_SECONDS,
)
from penstock.serving.model_routes import in_memory
from penstock.serving.operations import operation

Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_TRACE_SECONDS)]


class Tokens(NamedTuple):
    """Positions that a step computed: of prompts, of tokens drawn before, and those that had been computed once."""

    prompt: int
    decode: int
    again: int


class Composition:
    """Tells what each step was made of. Steps are asked for in their order."""

    def __init__(self, requests: Iterable[RequestTrace]) -> None:
        self._prompts = {request.number: request.prompt for request in requests}
        self._reached: dict[int, int] = {}

    def of(self, step: StepTrace) -> Tokens:
        prompt = decode = again = 0
        for number, start, count in step.slices:
            end = start + count
            known = self._prompts.get(number, end if count > 1 else start)  # of one that is no longer told of: a guess
            # Where its past is not told: the tokens after a prompt come one by one, so all but the last have been here.
            reached = self._reached.get(number, start if end <= known else end - 1)
            computed = min(count, max(0, reached - start))
            first = start + computed
            fresh = max(0, min(end, known) - first)
            prompt, again, decode = prompt + fresh, again + computed, decode + end - first - fresh
            self._reached[number] = max(reached, end)
        return Tokens(prompt, decode, again)


async def look(context: Context, seconds: float, blocks: int = 0) -> Trace:
    """Raises Unavailable: (engine_stopped, engine_silent)."""
    try:
        return await asyncio.wait_for(
            asyncio.wrap_future(context.llm.engine.service.look(seconds, blocks)), LOOK_SECONDS
        )
    except TimeoutError:
        raise Unavailable(
            "engine_silent",
            "The engine does not tell what it does",
            why=f"it was asked {LOOK_SECONDS:g} s ago",
            fix="see the server's log; ask again",
        ) from None


def number_of(query: Mapping[str, str], name: str, default: float, most: float, *, whole: bool = False) -> float:
    """A number from 0 to ``most`` of a query. Raises HTTPError: (invalid_parameter)."""
    if name not in query:
        return default
    try:
        value = float(query[name])
    except ValueError:
        value = -1.0
    if not 0 <= value <= most or (whole and not value.is_integer()):
        fix = f"use a {'whole number' if whole else 'number'} from 0 to {most:g}"
        raise HTTPError("invalid_parameter", f"{name} is no number of its range", fix=fix, param=name)
    return value


class Since(msgspec.Struct, kw_only=True):
    after: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)] | None = None
    seconds: Seconds = 10.0
    model: str | None = None


@operation("The engine's last steps, its requests and its KV blocks.", query=Since, gives=dict[str, Any])
async def engine_view(request: Request) -> Response:
    """``after``: the number of the last step that is known, so that only later ones are told. ``model``: by default the
    first that is in memory.

    What was computed again is known as such if it was computed first within the ``seconds``.
    """
    query = request.query_params
    after = int(number_of(query, "after", -1.0, 2.0**53 - 1, whole=True))
    seconds = number_of(query, "seconds", 10.0, MAX_LIVE_SECONDS)
    trace = await look(in_memory(context_of(request), query.get("model")), seconds, MAX_BLOCKS_SHOWN)
    return await asyncio.to_thread(functools.partial(_told, trace, after))


def _told(trace: Trace, after: int) -> Response:
    composition = Composition(trace.requests)
    made = [(step, composition.of(step)) for step in trace.steps]
    steps = [_step(step, tokens) for step, tokens in made[-MAX_STEPS_SHOWN:] if step.number > after]
    live = [request for request in trace.requests if request.ended is None]
    requests = [_request(request, trace.now) for request in live[:MAX_SHOWN]]
    last = trace.steps[-1].number if trace.steps else after
    inflight = [{"number": step.number, "seconds": round(trace.now - step.planned, 6)} for step in trace.inflight]
    told: dict[str, Any] = {
        "now": trace.now,
        "last": last,
        "steps": steps,
        "inflight": inflight,
        "live": len(live),
        "requests": requests,
    }
    return as_json(told | {"pools": [pool._asdict() for pool in trace.pools]})


def _step(step: StepTrace, tokens: Tokens) -> dict[str, Any]:
    return {
        "number": step.number,
        "at": step.began,
        **tokens._asdict(),
        "requests": len(step.slices),
        "waiting": step.waiting,
        "free": step.free,
        "cached": step.cached,
        "failed": step.failed,
        "replayed": step.replayed,
        "us": {name: round(1e6 * seconds) for name, seconds in phases(step).items()},
    }


def phases(step: StepTrace) -> dict[str, float]:
    """Seconds of each. commit: its result is taken in; publish: the news are on their way."""
    if step.failed:
        return {"plan": step.planned - step.began}
    return {
        "plan": step.planned - step.began,
        "forward": step.forward,
        "sample": step.sample,
        "commit": step.committed - step.landed,
        "publish": step.published - step.committed,
    }


def _request(request: RequestTrace, now: float) -> dict[str, Any]:
    kept = ("id", "sample", "state", "prompt", "cached", "known", "computed", "blocks", "preempted", "queued")
    told = {name: getattr(request, name) for name in kept}
    return told | {"seconds": round(now - request.arrived, 3), "starved": round(request.starved, 3)}
