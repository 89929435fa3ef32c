"""Where the options of ``penstock serve`` come from: a TOML file, over it the environment, over it the command line."""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.base import ConfigError, PenstockError, env, parse_span
from penstock.cli.exits import exit_code, explain
from penstock.spec import EngineConfig

TABLE_OPTIONS = ("path", "aliases", "pin", "keep_alive")
ENGINE_OPTIONS = [field.name for field in fields(EngineConfig) if field.name not in ("model", "served_model_name")]
"""What a table of a model may set: its own options, and those of an engine."""

NO_KEYS = {"config", "others", "origin", "as_json", "help"}
"""Options that are no part of a configuration."""

ORIGINS = "penstock.origins"
"""Where the context of a command has them: by option, the file or the variable that its value is from."""


def use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes what a file and the environment say the defaults of the command that is being read. The file comes over
    OTEL_EXPORTER_OTLP_ENDPOINT, which is not of Penstock's own, and PENSTOCK_SERVE_... over the file.

    Every value is taken as the text that the command line would have, and checked as that.
    """
    try:
        path = path or env.config_file()
        given = {"otlp_endpoint": (text, env.OTLP_ENDPOINT)} if (text := env.otlp_endpoint()) else {}
        given |= {} if path is None else {name: (text, str(path)) for name, text in read_config(path)[0].items()}
        given |= {name: (text, env.serve_option(name)) for name, text in env.serve_options().items()}
        parameters: dict[str, Any] = {str(p.name): p for p in ctx.command.params if p.name not in NO_KEYS}
        for name, (text, origin) in given.items():
            if name not in parameters:
                raise _unknown(name, origin, parameters)
            try:
                parameters[name].process_value(ctx, text)
            except Exception as error:
                if not hasattr(error, "format_message"):  # not one of the errors of a command line
                    raise
                raise _invalid(f"{name} = {text!r} in {origin} cannot be used", str(error).lower()) from None
    except PenstockError as error:
        explain(error, as_json="--json" in sys.argv)
        sys.exit(exit_code(error))
    ctx.default_map = {name: text for name, (text, _) in given.items()}
    ctx.meta[ORIGINS] = {name: origin for name, (_, origin) in given.items()}
    return path


def read_config(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The values of a file as the command line would have them, by the name of their option with underscores; and its
    tables of models.

    Raises:
        ConfigError: (config_invalid) it cannot be read, is no TOML, or a value is neither text, number nor truth;
            (option_invalid, span_invalid) of a table.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _invalid(f"{path} cannot be read", (error.strerror or str(error)).lower()) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(f"{path} is not TOML", str(error)[:200]) from None
    tables = values.pop("models", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise _invalid(f"models in {path} cannot be used", "it holds a table [models.NAME] for each model")
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise _invalid(f"{name} in {path} cannot be used", f"it is a {type(value).__name__}, not a text or number")
    checked = {name: _table(f"[models.{name}] in {path}", table) for name, table in tables.items()}
    return {name.replace("-", "_"): _text(value) for name, value in values.items()}, checked


def _table(place: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Of one model, with underscores in its keys."""
    table = {key.replace("-", "_"): value for key, value in table.items()}
    known = [*TABLE_OPTIONS, *ENGINE_OPTIONS]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            fix = f"did you mean {near[0]}?" if near else "see docs/how-to/several-models.md"
            raise ConfigError("config_invalid", f"{place} sets {key}, which is no option of a model", fix=fix)
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        right = {"path": isinstance(value, str), "aliases": texts, "pin": isinstance(value, bool)}
        if not right.get(key, True):
            kind = {"path": "a text", "aliases": "a list of texts", "pin": "true or false"}[key]
            raise _invalid(f"{key} of {place} cannot be used", f"it must be {kind}")
    EngineConfig(**{key: value for key, value in table.items() if key in ENGINE_OPTIONS})
    parse_span(str(table.get("keep_alive", -1)))
    return table


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _invalid(what: str, why: str) -> ConfigError:
    return ConfigError("config_invalid", what, why=why, fix="see docs/configuration.md, or `penstock serve --help`")


def _unknown(name: str, origin: str, known: Mapping[str, object]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]}?" if near else "see `penstock config show`"
    return ConfigError("config_invalid", f"{origin} sets {name}, which is no option of penstock serve", fix=fix)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=use_config,
        help="TOML file of these options; then come PENSTOCK_SERVE_... and the command line (penstock config show)",
    ),
]
