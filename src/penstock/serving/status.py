"""GET /status: what the server is doing, for people and for ``penstock ps``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.assemble import Assembled
from penstock.base import PenstockError
from penstock.core.trace import RequestTrace
from penstock.serving.context import Context, context_of
from penstock.serving.edge import as_json
from penstock.serving.gate import Caller
from penstock.serving.limits import MAX_SHOWN
from penstock.serving.model_routes import ModelStatus, told
from penstock.serving.operations import operation

ENGINE_SECONDS = 1.0
"""After which a status does without what an engine tells; one that hangs tells of its requests all the same."""


class Progress(msgspec.Struct, kw_only=True):
    id: str
    tenant: str | None
    model: str | None
    phase: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int


class Queue(msgspec.Struct, kw_only=True):
    requests: int
    tokens: int
    tokens_limit: int


class EngineStatus(msgspec.Struct, kw_only=True):
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hit_tokens: int
    preemptions: int


class Status(msgspec.Struct, kw_only=True):
    """``requests``: those under way, the oldest of them. ``tenants``: how many each has. ``engine``: of all models."""

    model: str
    draining: bool
    alive: bool
    models: list[ModelStatus]
    queue: Queue
    requests: list[Progress]
    tenants: dict[str, int]
    engine: EngineStatus


@operation("What the server is doing.", gives=Status)
async def status(request: Request) -> Response:
    context = context_of(request)
    models, admission = context.models, context.gate.admission
    under_way = await _under_way(context)
    engine = models.status()
    return as_json(
        Status(
            model=", ".join(models.all),
            draining=context.draining,
            alive=any(map(models.may_come, models.all.values())),
            models=[told(models, model) for model in models.all.values()],
            queue=Queue(requests=admission.running, tokens=admission.held, tokens_limit=admission.budget),
            requests=[
                _progress(caller, under_way.get(caller.answer or "", ()))
                for caller in sorted(context.gate.live, key=_arrival)[:MAX_SHOWN]
            ],
            tenants={name or "-": count for name, count in admission.held_by().items() if count},
            engine=EngineStatus(
                running=engine.running,
                waiting=engine.waiting,
                kv_blocks=engine.blocks_total,
                kv_blocks_used=engine.blocks_used,
                steps=engine.counters.steps,
                prompt_tokens=engine.counters.prompt_tokens,
                generated_tokens=engine.counters.generated_tokens,
                prefix_hit_tokens=engine.counters.prefix_hit_tokens,
                preemptions=engine.counters.preemptions,
            ),
        )
    )


def _arrival(caller: Caller) -> float:
    return caller.arrived


async def _under_way(context: Context) -> dict[str, list[RequestTrace]]:
    """By the answer that they are for, what the engines have of requests that generate; nothing of an engine that does
    not tell in time.
    """
    answers = {caller.answer: caller.model for caller in context.gate.live if caller.answer is not None}
    names = set(answers.values())
    engines = [model.llm.engine for name, model in context.models.all.items() if name in names and model.llm]

    async def seen(engine: Assembled) -> Sequence[RequestTrace]:
        with suppress(PenstockError, TimeoutError):
            return (await asyncio.wait_for(asyncio.wrap_future(engine.service.look(0.0)), ENGINE_SECONDS)).requests
        return ()

    told = [request for each in await asyncio.gather(*map(seen, engines)) for request in each if request.ended is None]
    return by_answer(answers, told)


def by_answer(answers: Collection[str], requests: Iterable[RequestTrace]) -> dict[str, list[RequestTrace]]:
    """An answer's requests have its id and what tells them apart, after dashes."""
    found: dict[str, list[RequestTrace]] = {}
    for request in requests:
        name = request.id
        while name and name not in answers:
            name = name.rpartition("-")[0]
        found.setdefault(name, []).append(request)
    return found


def phase_of(caller: Caller, own: Iterable[RequestTrace]) -> str:
    """By the names of docs/how-to/dashboard.md. What no engine tells of has not come to it; of vectors, whose requests
    are not known by name, it is not told whether they are in line or being computed.
    """
    if caller.waits:
        return "load"
    if caller.admitted is None:
        return "read"
    phase = "prompt" if caller.first_token is None else "decode"
    if caller.answer is None:
        return phase
    begun = [request for request in own if request.queued is not None]
    if not begun:
        return phase if caller.first_token is not None else "queue"
    return phase if any(request.state == "running" for request in begun) else "memory"


def _progress(caller: Caller, own: Iterable[RequestTrace]) -> Progress:
    return Progress(
        id=caller.id,
        tenant=caller.tenant or None,
        model=caller.model,
        phase=phase_of(caller, own),
        seconds=round(time.monotonic() - caller.arrived, 3),
        prompt_tokens=caller.prompt_tokens,
        completion_tokens=caller.completion_tokens,
    )
