"""Files of prompts: a line of text each, or JSON lines in the shapes that data sets have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, NotFound

FIELDS = ("prompt", "turns", "messages", "question", "instruction", "text")
"""Whichever comes first in an object is what it asks."""


def read_prompts(path: Path, count: int) -> list[list[str]]:
    """The turns of ``count`` sessions, from the top again where the file has fewer. Of ``messages`` those of the user.

    Raises:
        NotFound: (file_not_found). InvalidRequest: (invalid_prompts) a line that cannot be read, or none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise NotFound("file_not_found", f"There is no file {path}", fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(path, (getattr(error, "strerror", "") or str(error)).lower()[:200]) from None
    as_json = ".jsonl" in path.name or (lines[:1] and lines[0].startswith("{"))
    sessions: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        if len(sessions) == count:
            break
        if line.strip():
            try:
                turns = _turns(json.loads(line)) if as_json else [line]
            except (ValueError, LookupError, TypeError, AttributeError):
                raise _invalid(
                    path, f"line {number} is no text and no object with one of {', '.join(FIELDS)}"
                ) from None
            sessions.append(turns)
    if not sessions:
        raise _invalid(path, "it has no prompts")
    return [sessions[i % len(sessions)] for i in range(count)]


def _turns(record: str | dict[str, Any]) -> list[str]:
    """Raises ValueError or another of what ``read_prompts`` catches."""
    value = record if isinstance(record, str) else record[_field(record)]
    if isinstance(value, str):
        return [value]
    turns = [turn if isinstance(turn, str) else turn["content"] for turn in value if _asks(turn)]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError
    return turns


def _field(record: dict[str, Any]) -> str:
    return next((name for name in FIELDS if record.get(name)), FIELDS[0])


def _asks(turn: object) -> bool:
    return isinstance(turn, str) or (isinstance(turn, dict) and turn.get("role") == "user")


def _invalid(path: Path, why: str) -> InvalidRequest:
    fix = 'write a prompt a line, or objects such as {"prompt": "..."}'
    return InvalidRequest("invalid_prompts", f"{path} cannot be used as prompts", why=why, fix=fix)
