"""A group of commands that costs nothing until one of them, or their list, is wanted."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command


def later(load: Callable[[], typer.Typer], **told: Any) -> typer.Typer:
    """What stands for the group that ``load`` imports. ``told``: what is known of it before, as for typer.Typer."""

    class Later(TyperGroup):
        _loaded: MutableMapping[str, Any] | None = None

        @property
        def commands(self) -> MutableMapping[str, Any]:
            if self._loaded is None:
                self._loaded = get_command(load()).commands  # type: ignore[attr-defined]
            return self._loaded

        @commands.setter
        def commands(self, none: MutableMapping[str, Any]) -> None:
            """It has none of its own."""

    return typer.Typer(cls=Later, **told)
