"""What every room may use: errors with codes, registries, environment."""

from penstock.base.errors import (
    ConfigError,
    EngineError,
    InvalidRequest,
    ModelFormatError,
    NotFound,
    PenstockError,
    Unavailable,
)
from penstock.base.registry import Registry

__all__ = [
    "ConfigError",
    "EngineError",
    "InvalidRequest",
    "ModelFormatError",
    "NotFound",
    "PenstockError",
    "Registry",
    "Unavailable",
]
