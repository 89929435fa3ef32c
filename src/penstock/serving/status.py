"""GET /status: what the server is doing, for people and for ``penstock ps``."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.context import context_of
from penstock.serving.edge import as_json
from penstock.serving.gate import Caller
from penstock.serving.limits import MAX_SHOWN


async def status(request: Request) -> Response:
    context = context_of(request)
    engine, admission = context.llm.engine.service.status(), context.gate.admission
    return as_json(
        {
            "model": context.name,
            "draining": context.draining,
            "alive": context.llm.engine.service.alive,
            "queue": {"requests": admission.running, "tokens": admission.held, "tokens_limit": admission.budget},
            "requests": [_progress(caller) for caller in sorted(context.gate.live, key=_arrival)[:MAX_SHOWN]],
            "tenants": {name or "-": count for name, count in admission.held_by().items() if count},
            "engine": {
                "running": engine.running,
                "waiting": engine.waiting,
                "kv_blocks": engine.blocks_total,
                "kv_blocks_used": engine.blocks_used,
                "steps": engine.counters.steps,
                "prompt_tokens": engine.counters.prompt_tokens,
                "generated_tokens": engine.counters.generated_tokens,
                "prefix_hit_tokens": engine.counters.prefix_hit_tokens,
                "preemptions": engine.counters.preemptions,
            },
        }
    )


def _arrival(caller: Caller) -> float:
    return caller.arrived


def _progress(caller: Caller) -> dict[str, object]:
    """A request before its first token has not been computed yet, or its prompt is being computed."""
    now = time.monotonic()
    return {
        "id": caller.id,
        "tenant": caller.tenant or None,
        "phase": "upload" if caller.model is None else "prompt" if caller.first_token is None else "decode",
        "seconds": round(now - caller.arrived, 3),
        "prompt_tokens": caller.prompt_tokens,
        "completion_tokens": caller.completion_tokens,
    }
