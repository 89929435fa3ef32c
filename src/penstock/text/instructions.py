"""What a conversation opens with, for chat templates that know no developer, or read one such message alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

MOST_PROBED = 4


def instructed(
    messages: Sequence[dict[str, Any]], *, knows_developer: bool, reads: Callable[[tuple[str, ...]], bool]
) -> list[dict[str, Any]]:
    """The same conversation so that nothing a developer says at its start is lost; without a developer, as it is.

    Later ones are the template's to render or to refuse: moved to the start they would say something else.

    Args:
        knows_developer: the template tells messages of that role from others; else they are the system's.
        reads: whether it shows each of the messages of these roles, where a conversation begins with them.
    """
    if all(message["role"] != "developer" for message in messages):
        return list(messages)
    told = [
        {**message, "role": "system"} if message["role"] == "developer" and not knows_developer else message
        for message in messages
    ]
    first = list(takewhile(lambda message: message["role"] in ("system", "developer"), told))
    if len(first) < 2 or reads(tuple(message["role"] for message in first[:MOST_PROBED])):
        return told
    text = "\n\n".join(text for message in first if (text := message.get("content")))
    return [{**first[0], "content": text}, *told[len(first) :]]


def shows_all(roles: tuple[str, ...], render: Callable[[list[Mapping[str, Any]]], str]) -> bool:
    """Every text of a conversation of these roles and a user is in what ``render`` makes of it."""
    texts = [f"{i}-{role}" for i, role in enumerate(roles)]
    messages: list[Mapping[str, Any]] = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    rendered = render([*messages, {"role": "user", "content": "Hi"}])
    return all(text in rendered for text in texts)
