"""Options of the command line, generated from the fields of EngineConfig."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from penstock.spec import EngineConfig

MODEL_HELP = "model folder or hub id; the bundled model if left out"
_POSITIONAL = {"model"}
"""Fields that commands take as a positional argument instead."""


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter ``engine`` of a command by one option for each EngineConfig field.

    The command receives ``engine`` as a dict, ready for ``EngineConfig(model=..., **engine)``. A parameter of
    the command itself hides the field of the same name, which then keeps its default.
    """
    hints = get_type_hints(EngineConfig)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "engine"]
    hidden = _POSITIONAL | {p.name for p in own}
    fields = [f for f in dataclasses.fields(EngineConfig) if f.name not in hidden]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        engine = {field.name: given.pop(field.name) for field in fields}
        command(**given, engine=engine)

    generated = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                hints[field.name],
                typer.Option(help=field.metadata["help"], show_default=field.default is not None),
            ],
        )
        for field in fields
    ]
    wrapper.__signature__ = inspect.Signature([*own, *generated])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *generated]}
    return wrapper
