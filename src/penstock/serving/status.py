"""GET /status: what the server is doing, for people and for ``penstock ps``."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.context import context_of
from penstock.serving.edge import as_json
from penstock.serving.gate import Caller
from penstock.serving.limits import MAX_SHOWN
from penstock.serving.model_routes import ModelStatus, told
from penstock.serving.operations import operation


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
    engine = models.status()
    return as_json(
        Status(
            model=", ".join(models.all),
            draining=context.draining,
            alive=any(map(models.may_come, models.all.values())),
            models=[told(models, model) for model in models.all.values()],
            queue=Queue(requests=admission.running, tokens=admission.held, tokens_limit=admission.budget),
            requests=[_progress(caller) for caller in sorted(context.gate.live, key=_arrival)[:MAX_SHOWN]],
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


def _progress(caller: Caller) -> Progress:
    """A request before its first token waits for its model, or has not been computed yet, or its prompt is being."""
    phase = "upload" if caller.model is None else "load" if caller.waits else "prompt"
    return Progress(
        id=caller.id,
        tenant=caller.tenant or None,
        model=caller.model,
        phase=phase if caller.first_token is None else "decode",
        seconds=round(time.monotonic() - caller.arrived, 3),
        prompt_tokens=caller.prompt_tokens,
        completion_tokens=caller.completion_tokens,
    )
