"""What the scripts of this folder share. Each runs in a venv that has one client and nothing of Penstock or its tests.

On stdin comes a JSON object: ``url`` of a server whose model says what it is told, ``says`` by name what a request must
carry for that, and ``keyed``, a server of narrow limits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

USER = {"role": "user", "content": "How is the weather in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
PARIS = {"city": "Paris", "days": 3}


def run(checks: list[Callable[[], None]]) -> None:
    """Each of them, told by name. What fails shows its traceback and ends the script."""
    for check in checks:
        check()
        print(check.__name__, flush=True)


@contextmanager
def hurried(release: Callable[[], Any]) -> Iterator[list[float]]:
    """Nobody waits before a retry: what stood in the way is released instead. Yields the seconds that were meant."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        release()

    with mock.patch("time.sleep", sleep):
        yield slept


def eventually(done: Callable[[], bool], pause: Callable[[float], None] = time.sleep) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        pause(0.1)


def given() -> dict[str, Any]:
    found: dict[str, Any] = json.load(sys.stdin)
    return found
