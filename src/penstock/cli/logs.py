"""``penstock logs``: the requests that a server has logged."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from penstock.base import NotFound
from penstock.cli.exits import emit

POLL_SECONDS = 0.2


def logs(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the file of serve --log-file")],
    *,
    last: Annotated[int | None, typer.Option("--last", "-n", min=1, help="only the last so many that match")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="and those to come; Ctrl-C ends it")] = False,
    tenant: Annotated[str | None, typer.Option(help="only of this tenant")] = None,
    status: Annotated[str | None, typer.Option(help="only with this status, such as 429 or 5xx")] = None,
    id: Annotated[str | None, typer.Option(help="only the request with this id")] = None,
    slower: Annotated[float | None, typer.Option(min=0, help="only those that took more seconds than this")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the lines as they are")] = False,
) -> None:
    """Show the requests that a server has logged."""

    def wanted(line: dict[str, Any]) -> bool:
        return (
            (tenant is None or line["tenant"] == tenant)
            and (id is None or line["id"] == id)
            and (slower is None or line["total_s"] > slower)
            and (status is None or fnmatch(str(line["status"]), status.lower().replace("x", "?")))
        )

    def show(line: dict[str, Any]) -> None:
        emit(json.dumps(line) if as_json else _text(line))

    for i, records in enumerate(readings(file, follow=follow)):
        matching = filter(wanted, records)
        for line in matching if last is None or i else deque(matching, last):
            show(line)


def readings(path: Path, *, follow: bool) -> Iterator[Iterator[dict[str, Any]]]:
    """What the file holds, and to follow it what has come since, again and again: of the new file at its path too, once
    the old one was moved away or cut, and has been read to its end.

    Raises NotFound: (log_not_found).
    """
    stream = _opened(path)
    try:
        yield _records(stream)
        while follow:
            time.sleep(POLL_SECONDS)
            replaced = _replaced(path, stream)  # before the old one's last lines are read: nothing comes to it any more
            yield _records(stream)
            if replaced:
                with suppress(NotFound):  # moved away already: the next one will come
                    old, stream = stream, _opened(path)
                    old.close()
    finally:
        stream.close()


def _replaced(path: Path, stream: IO[bytes]) -> bool:
    """Whether lines go to a new file, or the old one was cut. A new one that is empty the server may not use yet."""
    try:
        now = path.stat()
    except OSError:
        return False
    same = os.path.samestat(now, os.fstat(stream.fileno()))
    return now.st_size < stream.tell() if same else now.st_size > 0


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        fix = "name the file of `penstock serve --log-file`"
        raise NotFound("log_not_found", f"{path} cannot be read", why=why, fix=fix) from error


def _records(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """From where the stream is to the last whole line of the file. What is no record is passed over."""
    while (data := stream.readline()).endswith(b"\n"):
        if (line := _record(data)) is not None:
            yield line
    stream.seek(-len(data), 1)


def _record(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"time", "id", "tenant", "status", "total_s"} <= line.keys() else None


def _text(line: dict[str, Any]) -> str:
    tokens = f"{line.get('prompt_tokens', 0)}+{line.get('completion_tokens', 0)}"
    first = line.get("first_token_s")
    cells = (
        str(line["time"])[:23],
        str(line["status"]),
        f"{line['total_s']:8.3f} s",
        "" if first is None else f"first {first:.3f} s",
        f"{tokens:>11} tokens",
        str(line.get("finish") or "-"),
        str(line["tenant"] or "-"),
        json.dumps(line.get("path", ""))[1:-1],  # what a client sent cannot drive the terminal
        str(line["id"]),
    )
    widths = (23, 3, 10, 13, 18, 6, 8, 20, 0)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
