"""What a model's text turns out to be: content, thoughts, calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the thoughts before it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; its arguments follow. Calls are numbered from 0 as they begin."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as the model wrote them: JSON text of an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole, and its arguments are a JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class CallDropped:
    """It was no call after all: it broke off, or is not JSON. All of its text comes as content."""

    index: int


Event = Content | Reasoning | CallStart | Arguments | CallEnd | CallDropped


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of one kind joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        match last, event:
            case Content(a), Content(b):
                joined[-1] = Content(a + b)
            case Reasoning(a), Reasoning(b):
                joined[-1] = Reasoning(a + b)
            case Arguments(i, a), Arguments(j, b) if i == j:
                joined[-1] = Arguments(i, a + b)
            case _:
                joined.append(event)
    return joined


class Parser(Protocol):
    """Reads one text in pieces. However it is cut, the merged events are the same."""

    @property
    def thinking(self) -> bool:
        """What is being read are thoughts."""
        ...

    def feed(self, text: str) -> list[Event]:
        """What is certain after this much of the text."""
        ...

    def finish(self) -> list[Event]:
        """What the end of the text made certain."""
        ...
