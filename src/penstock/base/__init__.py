"""What every room may use: errors with codes, registries, environment."""

from penstock.base.errors import (
    ConfigError,
    ContextOverflow,
    EngineError,
    InvalidRequest,
    ModelFormatError,
    NotFound,
    OverLimit,
    PenstockError,
    Unavailable,
)
from penstock.base.registry import Registry
from penstock.base.units import parse_size, parse_span

__all__ = [
    "ConfigError",
    "ContextOverflow",
    "EngineError",
    "InvalidRequest",
    "ModelFormatError",
    "NotFound",
    "OverLimit",
    "PenstockError",
    "Registry",
    "Unavailable",
    "parse_size",
    "parse_span",
]
