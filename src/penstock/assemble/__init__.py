"""The one place that turns names into objects: from an EngineConfig to a running engine."""

from penstock.assemble.engine import (
    Assembled,
    Face,
    build_engine,
    find_here,
    find_model,
    front_of,
    load_behind,
    name_of,
    read_face,
)
from penstock.assemble.executor import Loaded, as_stored, check_behind, is_packed, load_executor, load_logits_rules
from penstock.assemble.resolve import resolve, resolve_here

__all__ = [
    "Assembled",
    "Face",
    "Loaded",
    "as_stored",
    "build_engine",
    "check_behind",
    "find_here",
    "find_model",
    "front_of",
    "is_packed",
    "load_behind",
    "load_executor",
    "load_logits_rules",
    "name_of",
    "read_face",
    "resolve",
    "resolve_here",
]
