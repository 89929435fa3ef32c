"""That a client reads Retry-After as it is meant: where it finds no room it waits as long as told, and gets in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import hurried

LONG: dict[str, Any] = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
SLEEP = time.sleep


def check_retries(package: Any, keyed: dict[str, Any], messages: Callable[[Any], Any], prompt: Any = None) -> None:
    """``keyed``: url, and keys of a tenant that may have one request at a time, and of two others. The server's queue
    has room for one long request."""
    asked = {"model": keyed["model"], **(prompt or {"prompt": "Once upon a time"})}
    for first, second, status in (("single", "single", 429), ("acme", "birch", 503)):
        told: list[str] = []

        def note(response: Any, told: list[str] = told) -> None:
            if response.status_code != 200:
                told.append(f"{response.status_code} {response.headers['retry-after']}")

        hooks = {"response": [note]}
        make = getattr(package, "OpenAI", None) or package.Anthropic
        base = keyed["url"] + ("/v1" if make.__name__ == "OpenAI" else "")
        patient = make(
            base_url=base,
            api_key=keyed[second],
            max_retries=20,
            http_client=package.DefaultHttpxClient(event_hooks=hooks),
        )
        holder = make(base_url=base, api_key=keyed[first], max_retries=0)
        held = messages(holder).create(**asked, **LONG)
        next(iter(held))

        def release(held: Any = held) -> None:
            held.close()
            SLEEP(0.05)

        with hurried(release) as slept:
            answer = messages(patient).create(**asked, max_tokens=2)
        assert answer.id and told, told
        assert all(each.split()[0] == str(status) for each in told), told
        assert slept == [float(each.split()[1]) for each in told] and min(slept) >= 1, (slept, told)
