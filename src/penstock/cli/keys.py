"""``penstock keys``: who may use a server."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from penstock.cli.exits import emit, guarded

if TYPE_CHECKING:
    from penstock.serving.keys import Key

app = typer.Typer(
    help="Make, list and revoke the keys of a server (serve --keys FILE).", no_args_is_help=True, rich_markup_mode=None
)
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="file of keys; made if there is none, for you alone to read")
]
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "min_priority")


@app.command()
@guarded
def add(
    file: File,
    *,
    tenant: Annotated[
        str, typer.Option(help="whose key it is; rates and cached prefixes are those of a tenant")
    ] = "default",
    role: Annotated[
        Literal["inference", "admin"], typer.Option(help="admin may also look at the server and drain it")
    ] = "inference",
    requests_per_minute: Annotated[
        int | None, typer.Option(min=0, help="of the tenant, by all its keys; as before if left out, 0 for no limit")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0, help="likewise, prompts and completions")] = None,
    concurrency: Annotated[int | None, typer.Option(min=0, help="likewise, requests at a time")] = None,
    min_priority: Annotated[
        int | None,
        typer.Option(help="lowest priority its requests may have, lower being served earlier; 0, for admin any"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the record with its key as JSON")] = False,
) -> None:
    """Make a key and print it, once: the file has only its hash."""
    from penstock.serving.keys import change_keys, new_key

    made: tuple[str, Key]

    def append(keys: list[Key]) -> list[Key]:
        nonlocal made
        made = new_key(
            keys,
            tenant=tenant,
            role=role,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            min_priority=min_priority,
        )
        return [*keys, made[1]]

    change_keys(file, append)
    secret, key = made
    if as_json:
        emit(json.dumps({"key": secret} | _shown(key)))
        return
    emit(secret)
    typer.echo(f"{key.id} of {key.tenant}. This is the only time it is shown; keep it where it is used.", err=True)


@app.command("list")
@guarded
def list_(
    file: File, *, as_json: Annotated[bool, typer.Option("--json", help="one JSON object for each key")] = False
) -> None:
    """Show the keys of a file: whose they are and what they may, not the keys themselves."""
    from penstock.serving.keys import read_keys

    keys = read_keys(file)
    if as_json:
        for key in keys:
            emit(json.dumps(_shown(key)))
        return
    head = ("id", "tenant", "role", "requests/min", "tokens/min", "at a time", "priority from", "created", "revoked")
    rows = [head, *(tuple(_cell(value) for value in _shown(key).values()) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        emit("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
@guarded
def revoke(file: File, id: Annotated[str, typer.Argument(metavar="ID", help="as `keys list` shows it")]) -> None:
    """Close a key for good. A running server notices at its next SIGHUP."""
    from penstock.serving.keys import change_keys, without

    change_keys(file, lambda keys: without(keys, id))
    emit(f"{id} is revoked. Send the servers that use {file} a SIGHUP, or restart them.")


def _shown(key: Key) -> dict[str, Any]:
    limits = {name: getattr(key, name) for name in _LIMITS}
    times = {"created": _time(key.created), "revoked": _time(key.revoked)}
    return {"id": key.id, "tenant": key.tenant, "role": key.role} | limits | times


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
