"""Where the logits rules that people bring are found: the engine option ``logits_rule``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from penstock.base import ConfigError, InvalidRequest


def rule_places(option: str | None) -> Iterator[tuple[str, str, str]]:
    """(name, module, attribute) of each rule in ``[name=]module:factory,...``.

    Raises:
        ConfigError: (logits_rule_invalid) it is written in another way.
    """
    for part in filter(None, (part.strip() for part in (option or "").split(","))):
        name, named, place = part.rpartition("=")
        module, _, attribute = place.rpartition(":")
        if "=" in name or not attribute.isidentifier() or not all(map(str.isidentifier, module.split("."))):
            raise invalid_option(option, f"{part!r} is not [name=]package.module:factory")
        yield name if named else attribute, module, attribute


def unknown_rule(name: str, known: Iterable[str]) -> InvalidRequest:
    there = ", ".join(sorted(known))
    return InvalidRequest(
        "unknown_logits_rule",
        f"There is no logits rule {name!r}",
        why=f"the engine was started with {there or 'none'}",
        fix="start it with logits_rule = name=package.module:factory",
    )


def invalid_option(option: str | None, why: str) -> ConfigError:
    fix = "write [name=]package.module:factory, and see that Python can import it"
    return ConfigError("logits_rule_invalid", f"logits_rule = {option!r} cannot be used", why=why, fix=fix)
