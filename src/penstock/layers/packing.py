"""What becomes of a matrix between the checkpoint and the ops: small integers perhaps, then the backend's own order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import GroupedWeight, Ops, Weight
from penstock.layers.placement import Placement
from penstock.quant import check_scales, quantize, widen
from penstock.spec import ModelSpec
from penstock.spec.quantization import VERSION, Quantization, WeightFormat, format_of, may_be_grouped

Pack = Callable[[str, str, Callable[[], "Tensor | GroupedWeight"]], Weight]
"""Of a slot (``spec.tensors``), a name that no other weight of the model has, and what reads the matrix or stack of
matrices: a pack that knows what becomes of it need not read it."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What a checkpoint stores as small integers stays so, and plain weights become what ``quantization`` says. A
    backend or a slot without kernels for them gets the same numbers, each for itself."""

    ops: Ops
    spec: ModelSpec
    placement: Placement
    quantization: Quantization = "none"

    @property
    def recipe(self) -> str:
        """All of it that decides bits."""
        return "" if self.quantization == "none" else f"{self.quantization}/{VERSION}"

    @property
    def name(self) -> str:
        """For people: what most numbers of the model are."""
        return str(self.placement.dtype).removeprefix("torch.") if self.quantization == "none" else self.quantization

    def __call__(self, slot: str, name: str, source: Callable[[], Tensor | GroupedWeight]) -> Weight:
        weight = source()
        if isinstance(weight, Tensor):
            found = format_of(self.spec, slot, weight.shape[-1], self.quantization)
            if found is None:
                return self.ops.pack(weight)
            weight = self.quantized(weight, found)
        if self.ops.grouped and may_be_grouped(self.spec, slot, weight.shape[-1], weight.group):
            return self.ops.pack(weight)
        return self.ops.pack(widen(weight, self.placement.empty(tuple(weight.shape))))

    def quantized(self, weight: Tensor, format: WeightFormat) -> GroupedWeight:
        """The same bits whoever makes them."""
        if self.ops.quantize is None:
            return quantize(weight, format.bits, format.group)
        made = self.ops.quantize(weight, format.bits, format.group)
        check_scales(weight, made)
        return made
