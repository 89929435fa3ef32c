"""What becomes of a matrix between the checkpoint and the ops: small integers perhaps, then the backend's own order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import GroupedWeight, Ops, Weight
from penstock.quant import quantize
from penstock.spec import ModelSpec
from penstock.spec.quantization import VERSION, Quantization, format_of

Pack = Callable[[str, "Tensor | GroupedWeight"], Weight]
"""Of a slot (``spec.tensors``) and its matrix or stack of matrices."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A backend that has no kernels for grouped weights gets the same numbers, each for itself."""

    ops: Ops
    spec: ModelSpec
    quantization: Quantization = "none"

    @property
    def recipe(self) -> str:
        """All of it that decides bits."""
        return "" if self.quantization == "none" else f"{self.quantization}/{VERSION}"

    def __call__(self, slot: str, weight: Tensor | GroupedWeight) -> Weight:
        found = format_of(self.spec, slot, weight.shape[-1], self.quantization)
        if found is None or isinstance(weight, GroupedWeight):
            return self.ops.pack(weight)
        grouped = quantize(weight, found.bits, found.group)
        return self.ops.pack(grouped if self.ops.grouped else weight.copy_(grouped.widened()))
