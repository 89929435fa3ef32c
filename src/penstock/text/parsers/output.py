"""What parsers of all formats share: text withheld until it is known what it is, and the machine that drives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import suppress

from penstock.text.parsers.events import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning
from penstock.text.parsers.values import Values

Steps = Generator[None, str, None]
"""A parser of a format: it is sent the text character by character, and never returns before the text ends."""


class Ended(Exception):
    """Thrown into the steps at the end of the text."""


class Output:
    """The events of one text.

    Characters are withheld as they are read; then they are released as content, or discarded as the syntax of a call.
    Blanks at the end of content are kept back too: next to a call they belong to neither.

    Args:
        tools: names that a call may have; what calls anything else is content. Perhaps with the JSON schema of each.
        make_id: ids of calls.

    Attributes:
        plain: while nothing is withheld: characters other than these are content, and need not be sent.
        thinking: what is being read are thoughts.
        after_call: nothing has been said since a call.
    """

    def __init__(self, tools: Collection[str], make_id: Callable[[], str]) -> None:
        self.tools, self._make_id = frozenset(tools), make_id
        self._schemas = tools if isinstance(tools, Mapping) else {}
        self._values: dict[str, Values] = {}
        self.thinking = False
        self.again = ""
        self.plain: str | None = None
        self._events: list[Event] = []
        self._arguments: list[str] = []
        self._withheld: list[str] = []
        self._blank = ""
        self.after_call = False
        self._started = False
        self._calls = 0

    def take(self) -> list[Event]:
        self._tell_arguments()
        events, self._events = self._events, []
        return events

    def _tell_arguments(self) -> None:
        if self._arguments:
            self._events.append(Arguments(self._calls, "".join(self._arguments)))
            self._arguments = []

    def read(self, char: str) -> None:
        self._withheld.append(char)

    def unread(self) -> None:
        """The last character did not belong here; it will come again."""
        self.again = self._withheld.pop()

    def release(self, keep: int = 0) -> None:
        """What is withheld is content, but for its last ``keep`` characters."""
        cut = len(self._withheld) - keep
        if cut:
            self.say("".join(self._withheld[:cut]))
            del self._withheld[:cut]

    def forget(self) -> None:
        """What is withheld is syntax."""
        self._withheld.clear()

    def think(self, keep: int = 0) -> None:
        """What is withheld are thoughts, but for its last ``keep`` characters."""
        if cut := len(self._withheld) - keep:
            self._events.append(Reasoning("".join(self._withheld[:cut])))
            del self._withheld[:cut]

    def values(self, name: str) -> Values:
        """What the arguments of a tool may be."""
        if name not in self._values:
            self._values[name] = Values(self._schemas.get(name))
        return self._values[name]

    def say(self, text: str) -> None:
        """Content."""
        text = self._blank + text
        said = text.rstrip()
        self._blank = text[len(said) :]
        if said:
            self._events.append(Content(said))
            self.after_call = False

    def start(self, name: str) -> None:
        self._events.append(CallStart(self._calls, self._make_id(), name))
        self._started = True

    def arguments(self, text: str) -> None:
        self._arguments.append(text)

    def end(self, keep: int = 0) -> None:
        """The call is whole; the last ``keep`` characters are not of it."""
        self._tell_arguments()
        self._events.append(CallEnd(self._calls))
        self._calls += 1
        self._started, self.after_call, self._blank = False, True, ""
        del self._withheld[: len(self._withheld) - keep]

    def drop(self) -> None:
        """There is no call in what is withheld."""
        if self._started:
            self._tell_arguments()
            self._events.append(CallDropped(self._calls))
            self._calls += 1
            self._started = False
        self.release()

    def close(self) -> None:
        """The text has ended."""
        self.drop()
        if self._blank and not self.after_call:
            self._events.append(Content(self._blank))
        self._blank = ""


class Machine:
    """A Parser made of steps."""

    def __init__(self, steps: Callable[[Output], Steps], output: Output) -> None:
        self._output, self._steps = output, steps(output)
        next(self._steps)

    @property
    def thinking(self) -> bool:
        return self._output.thinking

    def feed(self, text: str) -> list[Event]:
        output, at = self._output, 0
        while at < len(text):
            if output.plain is not None and text[at] not in output.plain:
                stop = next((i for i in range(at + 1, len(text)) if text[i] in output.plain), len(text))
                output.say(text[at:stop])
                at = stop
                continue
            self._send(text[at])
            while output.again:
                char, output.again = output.again, ""
                self._send(char)
            at += 1
        return output.take()

    def _send(self, char: str) -> None:
        self._output.read(char)
        self._steps.send(char)

    def finish(self) -> list[Event]:
        with suppress(Ended, StopIteration):
            self._steps.throw(Ended)
        self._output.close()
        return self._output.take()
