"""The commands of ``penstock chat``."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from penstock.base import InvalidRequest
from penstock.cli import conversation, sampling
from penstock.cli.options import SAMPLING
from penstock.cli.terminal import note

if TYPE_CHECKING:
    from penstock.cli.chat import Session

NOT_SET = ("n", "logprobs")
"""Sampling parameters that mean nothing in a conversation."""


def perform(session: Session, text: str) -> bool:
    """Does what a line asks for; false if that is to end the program. A message that begins with / is written //.

    Where it fails or is interrupted, the conversation is what it was before.

    Raises:
        InvalidRequest: (unknown_command) with the nearest; (invalid_parameter) and whatever the command raises.
    """
    name, _, rest = text.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return False
    before = list(session.conversation.messages)
    try:
        if not text.startswith("/") or text.startswith("//"):
            session.ask(text.removeprefix("/") if text.startswith("//") else text)
        else:
            _command(name)(session, rest.strip())
    except BaseException:
        session.conversation.messages = before
        raise
    return True


def _command(name: str) -> Callable[[Session, str], None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise InvalidRequest(
            "unknown_command",
            f"There is no command {name}",
            fix=f"did you mean {near[0]}?" if near else "/help lists them; a message that begins with / is written //",
        )
    return COMMANDS[name][0]


def _help(session: Session, _: str) -> None:
    for name, (_do, arguments, meaning) in COMMANDS.items():
        note(f"{f'{name} {arguments}'.strip():24} {meaning}")
    note(f"{chr(34) * 3:24} begins and ends a message of several lines")


def _clear(session: Session, _: str) -> None:
    session.conversation.messages.clear()


def _system(session: Session, text: str) -> None:
    if text:
        session.conversation.system = None if text == "-" else text
    note(f"system: {session.conversation.system or '(none)'}")


def _set(session: Session, text: str) -> None:
    name, _, value = text.replace("=", " ", 1).partition(" ")
    name = name.replace("-", "_")
    if name not in SAMPLING or name in NOT_SET:
        near = difflib.get_close_matches(name, SAMPLING.keys() - NOT_SET, n=1, cutoff=0.4)
        raise InvalidRequest(
            "unknown_option",
            f"There is no parameter {name!r}",
            fix=f"did you mean {near[0]}?" if near else "/params lists them; /set temperature 0.5 sets one",
        )
    changed = dict(session.sampling)
    if value.strip() in ("", "-"):
        changed.pop(name, None)
    else:
        changed[name] = _parsed(name, value.strip())
    sampling.asked(changed)
    session.sampling = changed


def _parsed(name: str, value: str) -> Any:
    """A value as the command line would read it; for a list, one entry."""
    kind = SAMPLING[name][0]
    entry = (get_args(kind) or (kind,))[0]
    try:
        parsed = value.lower() in ("1", "true", "yes", "on") if entry is bool else entry(value)
    except ValueError:
        raise InvalidRequest(
            "invalid_parameter", f"{name} = {value!r} cannot be used", why=f"it must be {entry.__name__}"
        ) from None
    return [parsed] if get_args(kind) else parsed


def _params(session: Session, _: str) -> None:
    made = session.params
    for name, (_kind, meaning) in SAMPLING.items():
        if name not in NOT_SET:
            note(f"{name:22} {session.sampling.get(name, getattr(made, name, None))!s:10} {meaning}")


def _regen(session: Session, _: str) -> None:
    text = session.conversation.undo()
    if text is None:
        raise InvalidRequest("empty_conversation", "There is nothing to answer again", fix="say something first")
    session.ask(text)


def _undo(session: Session, _: str) -> None:
    text = session.conversation.undo()
    note("there is nothing to take back" if text is None else f"taken back: {text}")


def _save(session: Session, path: str) -> None:
    session.conversation.save(_named(path, "/save"))
    note(f"saved {len(session.conversation.messages)} messages to {path}")


def _load(session: Session, path: str) -> None:
    session.conversation = conversation.load(_named(path, "/load"))
    note(f"loaded {len(session.conversation.messages)} messages")


def _named(path: str, command: str) -> str:
    if not path:
        raise InvalidRequest("invalid_parameter", f"{command} needs a file", fix=f"write {command} notes.json")
    return path


def _stats(session: Session, _: str) -> None:
    for line in session.stats():
        note(line)


COMMANDS: dict[str, tuple[Callable[[Session, str], None], str, str]] = {
    "/help": (_help, "", "this list"),
    "/clear": (_clear, "", "forget what was said; the system message stays"),
    "/system": (_system, "TEXT", "set the system message; - removes it"),
    "/set": (_set, "NAME VALUE", "set a sampling parameter; - puts its default back"),
    "/params": (_params, "", "the sampling parameters as they are"),
    "/regen": (_regen, "", "another answer to the last message"),
    "/undo": (_undo, "", "take back the last message and its answer"),
    "/save": (_save, "FILE", "write the conversation to a file"),
    "/load": (_load, "FILE", "go on with a conversation from a file"),
    "/multiline": (_help, "", 'a message of several lines, to a line that ends with """'),
    "/stats": (_stats, "", "speed, cached tokens, context and memory"),
    "/exit": (_help, "", "end; as Ctrl-D"),
}
"""Name -> what it does, its arguments, a line of help."""
