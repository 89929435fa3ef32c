"""``penstock config show``: what a server would be configured with, and where each value comes from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.cli.config import ENGINE_OPTIONS, NO_KEYS, ORIGINS
from penstock.cli.exits import emit, guarded
from penstock.cli.offers import configured
from penstock.spec import EngineConfig

Rows = dict[str, tuple[Any, str]]
"""By option: its value, and where that comes from."""

_OF_MODELS = ("model", "served_model_name", *ENGINE_OPTIONS)
app = typer.Typer(help="See what a server would be configured with.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def config() -> None:
    """See what a server would be configured with."""


def show_like(command: Any) -> None:
    """Adds ``config show``, which takes the options of a command and tells what came of them."""
    own = {
        "origin": Annotated[bool, typer.Option("--origin", help="and where each value comes from")],
        "as_json": Annotated[bool, typer.Option("--json", help="print one JSON object")],
    }

    def show(ctx: typer.Context, *, origin: bool, as_json: bool, **values: Any) -> None:
        """Show what `penstock serve` would run with, given the same file, environment and options."""
        given = {name: (value, _origin(ctx, name)) for name, value in values.items() if name not in NO_KEYS}
        server, models = {n: row for n, row in given.items() if n not in _OF_MODELS}, _models(values, given)
        if as_json:
            emit(json.dumps(_plain(server, origin=origin) | {"models": [_plain(m, origin=origin) for m in models]}))
        else:
            _print([server, *models], origin=origin)

    parameters = list(inspect.signature(command).parameters.values())
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in own.items()]
    signature = [context, *parameters, *more]
    show.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    show.__annotations__ = {p.name: p.annotation for p in signature}
    app.command("show")(guarded(show))


def _models(values: Mapping[str, Any], given: Rows) -> list[Rows]:
    """What each model would be loaded and kept with. Raises ConfigError, as ``configured``."""
    first, path = values["model"], values["config"]
    engine = {name: values[name] for name in _OF_MODELS if name != "model"}
    return [
        _model(loaded, table, given, str(path))
        for loaded, table in configured([*([first] if first else []), *(values["others"] or [])], engine, path)
    ]


def _model(loaded: EngineConfig, table: Mapping[str, Any], given: Rows, path: str) -> Rows:
    has_table = loaded.served_model_name != given["served_model_name"][0]  # which is its name then
    kept = {"aliases": ([], "default"), "pin": (False, "default"), "keep_alive": given["keep_alive"]}
    rows = kept | {name: (getattr(loaded, name), given[name][1]) for name in _OF_MODELS}
    if has_table:
        rows |= {name: (rows[name][0], path) for name in ("model", "served_model_name")}
    elif loaded.model != given["model"][0]:
        rows["model"] = loaded.model, "command line"  # one of the others
    rows |= {name: (value, path) for name, value in table.items() if name != "path"}
    return {name: rows[name] for name in (*_OF_MODELS[:2], *kept, *ENGINE_OPTIONS)}


def _origin(ctx: typer.Context, name: str) -> str:
    source = getattr(ctx.get_parameter_source(name), "name", "DEFAULT")
    if source == "DEFAULT_MAP":
        return str(ctx.meta[ORIGINS][name])
    return "command line" if source == "COMMANDLINE" else "default"


def _plain(rows: Rows, *, origin: bool) -> dict[str, Any]:
    plain = {name: (str(value) if isinstance(value, Path) else value, where) for name, (value, where) in rows.items()}
    return {name: {"value": value, "origin": where} if origin else value for name, (value, where) in plain.items()}


def _print(blocks: Sequence[Rows], *, origin: bool) -> None:
    """The server's block and one for each model, with an empty line between them."""
    width = max(len(name) for rows in blocks for name in rows)
    longest = max(len(_shown(value)) for rows in blocks for value, _ in rows.values())
    for i, rows in enumerate(blocks):
        if i:
            emit("")
        for name, (value, where) in rows.items():
            emit(f"{name:{width}}  {_shown(value):{longest}}  {where if origin else ''}".rstrip())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
