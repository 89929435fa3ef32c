"""Where weights live and as what: the one thing a model must be told and may not ask about."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """Attributes:
    kv_dtype: of K and V as stored, if it is not ``dtype``.
    """

    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None

    @property
    def kv(self) -> torch.dtype:
        """Of K and V as stored."""
        return self.kv_dtype or self.dtype

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def __str__(self) -> str:
        """What of it decides bits: the kind of device, not which one."""
        kv = f", KV in {self.kv_dtype}" if self.kv_dtype else ""
        return f"{self.dtype} on {self.device.type}{kv}"


def frozen_bytes(view: memoryview) -> Tensor:
    """The bytes of a file as uint8, not copied. It must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=torch.uint8)
