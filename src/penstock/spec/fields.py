"""Typed reading of untrusted JSON objects: each value is checked for type and range, or named in an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.base import ModelFormatError


class Fields:
    """A view of a JSON object. ``prefix`` names the object in errors, ``names`` are its own keys for what is asked."""

    def __init__(
        self, values: Mapping[str, Any], prefix: str = "", names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._values, self._prefix, self._names = values, prefix, names or {}

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; a JSON null counts as absent."""
        value = self._values.get(self.key(name))
        return default if value is None else value

    def key(self, name: str) -> str:
        """The object's own key: of several the first that it has."""
        keys = self._names.get(name, (name,))
        return next((key for key in keys if self._values.get(key) is not None), keys[0])

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise self._missing(name)
        if type(value) is not int or not low <= value <= high:
            raise bad_config(self._prefix + self.key(name), value, f"it must be an integer from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int | None:
        """As ``integer``, but a JSON null means None; the default is for an absent key."""
        key = self.key(name)
        if key in self._values and self._values[key] is None:
            return None
        return None if default is None and key not in self._values else self.integer(name, low, high, default=default)

    def number(self, name: str, low: float, high: float, *, default: float | None = None) -> float:
        """A finite number in (low, high]."""
        value = self.get(name, default)
        if value is None:
            raise self._missing(name)
        if type(value) not in (int, float) or not low < value <= high:  # NaN fails too
            raise bad_config(self._prefix + self.key(name), value, f"it must be a number in ({low:.12g}, {high:.12g}]")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise bad_config(self._prefix + self.key(name), value, "it must be true or false")
        return value

    def flag_or_key(self, rule: bool | str) -> bool:
        """A constant, or the flag of that name, false where absent."""
        return self.flag(rule, default=False) if isinstance(rule, str) else rule

    def _missing(self, name: str) -> ModelFormatError:
        return ModelFormatError(
            "config_invalid",
            f"config.json lacks {self._prefix}{self.key(name)}",
            fix="take config.json from the model's own page",
        )


def bad_config(name: str, value: object, why: str) -> ModelFormatError:
    return ModelFormatError(
        "config_invalid",
        f"config.json has {name} = {repr(value)[:80]}, which cannot be",
        why=why,
        fix="take config.json from the model's own page",
    )


def unsupported(kind: str, what: str, fix: str) -> ModelFormatError:
    """(unsupported_<kind>)"""
    return ModelFormatError(f"unsupported_{kind}", f"The model uses {what}, which this build lacks", fix=fix)
