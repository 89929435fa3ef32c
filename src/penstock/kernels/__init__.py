"""Ops and its backends, found by name and imported late."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from penstock.base import ConfigError, Registry
from penstock.kernels.ops import SEGMENT, UNDECIDED, Activation, Forward, Ops
from penstock.kernels.types import Batch, GroupBatch, GroupedWeight, KVLayer, PackedWeight, Weight

__all__ = [
    "SEGMENT",
    "UNDECIDED",
    "Activation",
    "Forward",
    "Batch",
    "GroupBatch",
    "GroupedWeight",
    "KVLayer",
    "Ops",
    "PackedWeight",
    "Weight",
    "backends",
    "make_ops",
    "native",
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


@backends.register("cpu")
def _cpu() -> Ops:
    if not native():
        raise ConfigError(
            "backend_not_built",
            "The native CPU kernels are not installed",
            why="penstock was installed without a C++ compiler or without Python's headers",
            fix="install g++ and python3-dev and install penstock again, or choose --backend torch",
        )
    from penstock.kernels.cpu import CpuOps

    return CpuOps()


def native() -> bool:
    """Whether the native CPU kernels are part of this installation."""
    return find_spec("penstock.kernels._native") is not None
