"""Thoughts at the start of a text, split off what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.text.completion import StopStrings
from penstock.text.parsers.events import Content, Event, Parser, Reasoning

MAX_BLANKS = 64
"""Before thoughts; after more of them comes something else."""


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """How a model's thoughts begin and end.

    Attributes:
        starts, ends: texts of which any one does.
        opened: the model never writes the start, whether its prompts end with it or not.
        channels: special tokens of a format in which every message says of what kind it is, so that the parser of its
            calls reads thoughts too.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    opened: bool = False
    channels: tuple[str, ...] = ()

    def left_open(self, prompt: str) -> bool:
        """A completion of this prompt starts inside thoughts. A prompt that ends with their end says they are over, as
        templates do that are told not to let the model think.
        """
        prompt = prompt.rstrip()
        return prompt.endswith(self.starts) or (self.opened and not prompt.endswith(self.ends))

    def open_in(self, text: str) -> bool:
        """What an assistant has said so far ends within thoughts."""
        return max(map(text.rfind, self.starts)) > max(map(text.rfind, self.ends))


class PlainText:
    """A parser that finds nothing: all is content."""

    thinking = False

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class Thoughts:
    """A parser that tells thoughts as Reasoning and leaves the rest to another one.

    Blanks around thoughts, and newlines before what follows, belong to neither. Thoughts that do not end are thoughts
    to the end of the text.

    Args:
        opened: the text starts inside.
    """

    def __init__(self, tags: ThoughtTags, rest: Parser, *, opened: bool = False) -> None:
        self._starts, self._rest = tags.starts, rest
        self._ends = StopStrings(tags.ends)
        self._firsts = {end[0] for end in tags.ends}
        self._state = "inside" if opened else "before"
        self._withheld = ""
        self._blank, self._said = "", False

    @property
    def thinking(self) -> bool:
        return self._state == "inside"

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        at = 0
        while at < len(text):
            if self._state == "after":
                at = len(text) - len(text[at:].lstrip("\n"))
                self._state = "rest" if at < len(text) else "after"
            elif self._state == "rest":
                return events + self._rest.feed(text[at:])
            elif self._state == "inside" and not self._withheld and text[at] not in self._firsts:
                stop = next((i for i in range(at + 1, len(text)) if text[i] in self._firsts), len(text))
                self._withheld, at = text[at:stop], stop
                events += self._tell(0)
            else:
                self._withheld += text[at]
                events += self._inside(text[at]) if self._state == "inside" else self._before()
                at += 1
        return events

    def finish(self) -> list[Event]:
        events = self._tell(0) if self._state == "inside" else self._rest.feed(self._withheld)
        if self._state == "inside" and self._blank and self._said:
            events.append(Reasoning(self._blank))
        return events + self._rest.finish()

    def _before(self) -> list[Event]:
        seen = self._withheld.lstrip()
        if seen in self._starts:
            self._state, self._withheld = "inside", ""
        elif len(self._withheld) - len(seen) > MAX_BLANKS or not any(start.startswith(seen) for start in self._starts):
            self._state, text, self._withheld = "rest", self._withheld, ""
            return self._rest.feed(text)
        return []

    def _inside(self, char: str) -> list[Event]:
        found = self._ends.feed(char)
        events = self._tell(len(found[0]) if found else self._ends.held)
        if found:
            self._state, self._withheld = "after", ""
        return events

    def _tell(self, keep: int) -> list[Event]:
        """Thoughts that are certain: all but the last ``keep`` characters, and blanks at their end."""
        cut = len(self._withheld) - keep
        text, self._withheld = self._blank + self._withheld[:cut], self._withheld[cut:]
        text = text if self._said else text.lstrip()
        said = text.rstrip()
        self._blank = text[len(said) :]
        self._said = self._said or bool(said)
        return [Reasoning(said)] if said else []


def thought_tags(*pairs: Sequence[str], opened: bool = False) -> ThoughtTags:
    """Of pairs of a start and an end."""
    starts, ends = zip(*pairs, strict=True)
    return ThoughtTags(tuple(starts), tuple(ends), opened)
