"""Why requests end that an engine process had: it is dead for good, or they are the cause; and why it has no model."""

from __future__ import annotations

from penstock.base import EngineError


def dead(why: str) -> EngineError:
    return EngineError("engine_dead", "The engine stopped", why=why, fix="restart it and report the log")


def load_timeout(seconds: float) -> EngineError:
    return EngineError(
        "load_timeout",
        "The engine hung while it loaded its model, and was killed",
        why=f"it told nothing for {seconds:g} s",
        fix="see whether the disk of the model answers; if it is only slow, raise --load-timeout",
    )


def quarantined(deaths: int) -> EngineError:
    return EngineError(
        "request_quarantined",
        "The engine process died while the request ran",
        why=f"{deaths} did in all, the last when it had let this one in alone: it may be the cause",
        fix="do not send it again as it is; report it",
    )
