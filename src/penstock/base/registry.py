"""Names to factories, so that a variant is one file found by name and imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from penstock.base.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named variants of one kind.

    >>> backends: Registry[Callable[[], object]] = Registry("kernel backend")
    >>> @backends.register("ref")
    ... def ref() -> object: ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Raises ConfigError(unknown_variant) that lists the names there are."""
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(
                "unknown_variant",
                f"There is no {self.kind} named {name!r}",
                fix=f"choose one of: {', '.join(sorted(self._entries))}",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
