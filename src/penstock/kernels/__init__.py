"""Ops and its backends, found by name and imported late."""

from __future__ import annotations

from collections.abc import Callable

from penstock.base import Registry
from penstock.kernels.ops import MAX_SEGMENTS, SEGMENT, Activation, Ops, sum_segments
from penstock.kernels.types import Batch, GroupBatch, KVLayer

__all__ = [
    "MAX_SEGMENTS",
    "SEGMENT",
    "Activation",
    "Batch",
    "GroupBatch",
    "KVLayer",
    "Ops",
    "backends",
    "make_ops",
    "sum_segments",
]

backends: Registry[Callable[[], Ops]] = Registry("kernel backend")


def make_ops(name: str) -> Ops:
    """The backend of that name. Raises ConfigError(unknown_variant)."""
    return backends.get(name)()


@backends.register("ref")
def _ref() -> Ops:
    from penstock.kernels.ref import RefOps

    return RefOps()


@backends.register("torch")
def _torch() -> Ops:
    from penstock.kernels.torch import TorchOps

    return TorchOps()
