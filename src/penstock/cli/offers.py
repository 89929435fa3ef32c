"""The models that ``penstock serve`` offers: those named on the command line, and the tables of its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.base import ConfigError, parse_span
from penstock.cli.config import ENGINE_OPTIONS, read_config
from penstock.spec import EngineConfig
from penstock.spec.config import option

if TYPE_CHECKING:
    from penstock.serving.models import Models
    from penstock.wire import RemoteService

Configs = list[tuple[EngineConfig, dict[str, Any]]]
"""What each model is loaded with, and its table in the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """Options of ``penstock serve``: what is in memory, and for how long."""

    max_loaded: int | None = option(None, "most models in memory at a time; all of them, unless given")
    keep_alive: str = option("-1", "how long a model stays there after its last request, such as 10m; -1 for ever")
    least_stay: float | None = option(
        None,
        "seconds that a model keeps its room while others wait; by default 4 times its load's, at most 60",
    )
    step_timeout: float | None = option(
        None,
        "seconds after which a silent engine is killed and replaced; 0 never; by default 120, and more for large steps",
    )
    load_timeout: float = option(
        300.0, "seconds without progress after which a model that is being loaded has failed; 0 never"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError: (option_invalid), (span_invalid)."""
        parse_span(self.keep_alive)
        if self.max_loaded is not None and self.max_loaded < 1:
            raise _wrong("max_loaded", self.max_loaded, "it must be at least 1")
        for name in ("least_stay", "step_timeout", "load_timeout"):
            if (seconds := getattr(self, name)) is not None and not seconds >= 0:
                raise _wrong(name, seconds, "it must be 0 or more")


def _wrong(name: str, value: float, why: str) -> ConfigError:
    return ConfigError("option_invalid", f"{name} = {value!r} cannot be used", why=why, fix="leave it out")


def configured(named: Sequence[str | None], engine: Mapping[str, Any], path: Path | None) -> Configs:
    """What each model is loaded with, and its table. The first is what a request means that names none.

    Args:
        named: on the command line: models, or names of tables, which stand in the order of the file otherwise.
        engine: options of all of them; those of a table come over them.
        path: of the configuration.

    Raises:
        ConfigError: (config_invalid), (option_invalid).
    """
    tables = {} if path is None else read_config(path)[1]
    names: list[str | None] = list(dict.fromkeys([*named, *tables] if named or tables else [None]))
    if tables or len(names) > 1:
        _check_one_name_for_all(engine, len(names))
    found: Configs = []
    for name in names:
        if name is None or name not in tables:
            found.append((EngineConfig(model=name, **engine), {}))
            continue
        table = tables[name]
        own = {key: value for key, value in table.items() if key in ENGINE_OPTIONS}
        options = {**engine, **own, "served_model_name": name}
        found.append((EngineConfig(model=table.get("path", name), **options), table))
    return found


def _check_one_name_for_all(engine: Mapping[str, Any], models: int) -> None:
    if (name := engine.get("served_model_name")) is not None:
        raise ConfigError(
            "option_invalid",
            f"--served-model-name {name} cannot be used here",
            why=f"it would be the name of {models} models" if models > 1 else "the table of the model names it already",
            fix=f"leave it out, and call one of them so: aliases = [{name!r}] in its table [models.NAME]",
        )


def at_once(configs: Configs) -> EngineConfig:
    """Of the model that is loaded first."""
    return next((config for config, table in configs if table.get("pin")), configs[0][0])


def models_of(configs: Configs, service: RemoteService, keeping: Keeping, tokenizers: int = 0) -> Models:
    """Args:
    service: of the model that is loaded first.
    tokenizers: as of ``Models``.
    """
    from penstock.assemble import name_of
    from penstock.fleet import Stay
    from penstock.serving.models import Models, Served

    def stay(table: Mapping[str, Any]) -> Stay:
        span = str(table.get("keep_alive", keeping.keep_alive))
        return Stay(keep_alive=parse_span(span), pinned=table.get("pin", False))

    first = at_once(configs)
    offers = [
        Served(
            name=name_of(config),
            config=config,
            aliases=tuple(table.get("aliases", ())),
            stay=stay(table),
            service=service if config is first else None,
        )
        for config, table in configs
    ]
    step = math.inf if keeping.step_timeout == 0 else keeping.step_timeout
    return Models(offers, keeping.max_loaded, step, tokenizers, keeping.least_stay, keeping.load_timeout or math.inf)
