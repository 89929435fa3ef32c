"""A conversation that fits in the model's context: turns, what is dropped when they grow too long, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, NotFound, PenstockError
from penstock.formats import read_json_object

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Conversation:
    """Messages in order; ``system``, where there is one, always comes first and is never dropped."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def undo(self) -> str | None:
        """Takes back the last thing the user said and what came of it; returns what it was."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def as_messages(self) -> list[Message]:
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + self.messages

    def fit(self, encode: Callable[[Sequence[Message]], list[int]], longest: int) -> tuple[list[int], int]:
        """Token ids of at most ``longest`` tokens, and how many turns had to go, oldest first.

        The last thing said is never dropped, so that the ids may still be too many; whoever runs them says so.
        """
        dropped = 0
        while len(ids := encode(self.as_messages())) > longest:
            later = [i for i, message in enumerate(self.messages) if message["role"] == "user" and i > 0]
            if not later:
                break
            del self.messages[: later[0]]
            dropped += 1
        return ids, dropped

    def save(self, path: str) -> None:
        """Writes the conversation as JSON; over an older one, but over nothing else.

        Raises:
            InvalidRequest: (file_exists) the file holds something else.
            PenstockError: (output_failed).
        """
        target = Path(path).expanduser()
        if target.exists():
            try:
                load(path)
            except PenstockError:
                raise InvalidRequest(
                    "file_exists", f"{path} is no conversation, and would be lost", fix="choose another name"
                ) from None
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_text(
                json.dumps({"messages": self.as_messages()}, indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
            beside.replace(target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise PenstockError(
                "output_failed", f"{path} cannot be written", why=(error.strerror or str(error)).lower()
            ) from error


def load(path: str) -> Conversation:
    """What ``save`` wrote, or any JSON object with a list of messages.

    Raises:
        NotFound: (input_unreadable).
        InvalidRequest: (invalid_messages) it is not such an object.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise NotFound("input_unreadable", f"There is no file {path}", fix="check the path")
    try:
        messages: Any = read_json_object(source).get("messages")
    except PenstockError as error:
        raise InvalidRequest("invalid_messages", f"{path} holds no conversation", why=error.why) from None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InvalidRequest(
            "invalid_messages",
            f"{path} holds no conversation",
            why='it needs "messages", a list of {"role", "content"} with text',
        )
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    system = kept.pop(0)["content"] if kept and kept[0]["role"] == "system" else None
    return Conversation(system, kept)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
