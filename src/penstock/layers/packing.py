"""What becomes of a matrix between the checkpoint and the ops: small integers perhaps, then the backend's own order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import GroupedWeight, Ops, Weight
from penstock.layers.placement import Placement
from penstock.quant import check_scales, quantize, widen
from penstock.spec import ModelSpec
from penstock.spec.quantization import GROUP, VERSION, Quantization, WeightFormat, format_of, may_be_grouped

Read = Callable[[bool], "Tensor | GroupedWeight"]
"""Reads a matrix or a stack of matrices: True in a dtype that holds the stored numbers, False in the placement's."""
Pack = Callable[[str, str, int, Read], Weight]
"""Of a slot (``spec.tensors``), a name that no other weight of the model has, its inputs, and what reads it: a pack
that knows what becomes of it need not read it."""


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
        """All of it that decides bits; what a checkpoint stores as integers is a matter of the version too."""
        return f"{self.quantization}/{VERSION}"

    @property
    def name(self) -> str:
        """For people: what most numbers of the model are."""
        return str(self.placement.dtype).removeprefix("torch.") if self.quantization == "none" else self.quantization

    def __call__(self, slot: str, name: str, inputs: int, read: Read) -> Weight:
        found = format_of(self.spec, slot, inputs, self.quantization)
        weight = read(found is not None)  # integers are made of the stored numbers, not of rounded ones
        if isinstance(weight, Tensor):
            if found is None:
                return self.ops.pack(weight)
            weight = self.quantized(weight, found)
        group = weight.group
        while group > GROUP and not may_be_grouped(self.spec, slot, inputs, group):
            group //= 2
        if self.ops.grouped and may_be_grouped(self.spec, slot, inputs, group):
            return self.ops.pack(weight.in_groups(group))
        return self.ops.pack(widen(weight, self.placement.empty(tuple(weight.shape))))

    def quantized(self, weight: Tensor, format: WeightFormat) -> GroupedWeight:
        """The same bits whoever makes them."""
        if self.ops.quantize is None:
            return quantize(weight, format.bits, format.group)
        made = self.ops.quantize(weight, format.bits, format.group)
        check_scales(weight, made)
        return made
