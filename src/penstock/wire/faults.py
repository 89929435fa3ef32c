"""Why requests end that an engine process had: it is dead for good, or they are the cause."""

from __future__ import annotations

from penstock.base import EngineError


def dead(why: str) -> EngineError:
    return EngineError("engine_dead", "The engine stopped", why=why, fix="restart it and report the log")


def quarantined(deaths: int) -> EngineError:
    return EngineError(
        "request_quarantined",
        f"The engine process died {deaths} times while the request ran",
        why="the request may be the cause",
        fix="send it again alone, and report it if that fails",
    )
