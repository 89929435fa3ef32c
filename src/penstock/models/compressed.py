"""The tensors of a compressed-tensors folder: each matrix as the file has it, numbers or small integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.layers import PACKED, SCALE, SHAPE, ZERO, GroupedWeight, frozen_bytes, in_eight, to_grouped, unpack
from penstock.models.gguf import one_below_the_other
from penstock.models.tensors import STORED, Tensors, check_tensors, mismatch, not_finite
from penstock.spec.compressed import NUMBERS
from penstock.spec.tensors import Shape

WHOLE = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64} | STORED


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is stored. ``part``: the name of a part of it, by that of compressed-tensors."""

    bits: Literal[4, 8]
    groups: int
    shape: Shape
    packed: bool
    zeros: bool

    def parts(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of each tensor."""
        (outputs, inputs), per_word = self.shape, 32 // self.bits
        parts: dict[str, tuple[Shape, str]] = {SCALE: ((outputs, self.groups), "")}
        if not self.packed:
            return parts | {"weight": (self.shape, "I8")}
        parts |= {PACKED: ((outputs, -(-inputs // per_word)), "I32"), SHAPE: ((2,), "I64")}
        return parts | ({ZERO: ((-(-outputs // per_word), self.groups), "I32")} if self.zeros else {})


class CompressedTensors:
    """Args:
        tensors: of the folder, by the names of the model.
        expected: name and shape of all that the model calls for.

    Raises:
        ModelFormatError: weights_missing, weights_unexpected, weights_shape, weights_dtype.
    """

    def __init__(self, tensors: Tensors, expected: Mapping[str, Shape], family: str) -> None:
        self.tensors, self.shapes = tensors, expected
        self.forms = {name: form for name, shape in expected.items() if (form := self._form(name, shape))}
        shapes, dtypes = dict(expected), dict[str, str]()
        for name, form in self.forms.items():
            del shapes[name]
            for part, (shape, dtype) in form.parts().items():
                shapes[part_of(name, part)], dtypes[part_of(name, part)] = shape, dtype
        entries = {name: tensors.checkpoint.entry(stored) for name, stored in tensors.stored_as.items()}
        path = tensors.checkpoint.path
        check_tensors(entries, shapes, family, lambda name: [d] if (d := dtypes.get(name)) else STORED.keys(), path)
        for name, form in self.forms.items():
            if form.packed and (found := tuple(self._part(name, SHAPE).tolist())) != form.shape:
                raise mismatch(
                    path, "weights_shape", f"{part_of(name, SHAPE)} is {list(found)}, not {list(form.shape)}"
                )

    def fuse(self, *names: str, exact: bool = False) -> Tensor:
        """As ``Tensors.fuse``; integers as the numbers they stand for."""
        if not any(name in self.forms for name in names):
            return self.tensors.fuse(*names, exact=exact)
        counts = [self.shapes[name][0] for name in names]
        shape = (sum(counts), *self.shapes[names[0]][1:])
        fused = self.tensors.placement.empty(shape, torch.float32 if exact else None)
        for name, target in zip(names, torch.split(fused, counts), strict=True):
            if name in self.forms:
                target.copy_(self._numbers(name))
            else:
                self.tensors.copy(name, self.tensors.stored(name), target)
        return fused

    def weight(self, *names: str, exact: bool = False) -> Tensor | GroupedWeight:
        """The matrices, one below the other: small integers if all of them are stored so, of 8 bits unless all have 4.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        forms = [self.forms.get(name) for name in names]
        if any(form is None or form.shape[1] % NUMBERS for form in forms):
            return self.fuse(*names, exact=exact)
        weights = [self._grouped(name) for name in names]
        if any(weight.bits == 8 for weight in weights):
            weights = [in_eight(weight) for weight in weights]
        group = min(weight.group for weight in weights)
        return one_below_the_other([weight.in_groups(group) for weight in weights])

    def _form(self, name: str, shape: Shape) -> Form | None:
        entries, stored_as = self.tensors.checkpoint.entry, self.tensors.stored_as
        packed, scale = part_of(name, PACKED), part_of(name, SCALE)
        if len(shape) != 2 or not name.endswith(".weight") or scale not in stored_as:
            return None
        groups = (*entries(stored_as[scale]).shape, 1)[1]
        if groups < 1 or shape[1] % groups or (groups > 1 and shape[1] // groups % NUMBERS):
            groups = 1  # and the comparison says which shape is not that
        if packed not in stored_as:
            return Form(8, groups, shape, packed=False, zeros=False)
        eight = entries(stored_as[packed]).shape[-1:] == (-(-shape[1] // 4),)
        return Form(8 if eight else 4, groups, shape, packed=True, zeros=part_of(name, ZERO) in stored_as)

    def _part(self, name: str, part: str) -> Tensor:
        """A view of the file. It must not be written to."""
        checkpoint = self.tensors.checkpoint
        entry = checkpoint.entry(self.tensors.stored_as[part_of(name, part)])
        return frozen_bytes(checkpoint.view(entry.name)).view(WHOLE[entry.dtype]).view(entry.shape)

    def _codes(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, finite scales and zeros, as ``to_grouped`` takes them."""
        form, zeros_NG = self.forms[name], None
        codes_NK = self._part(name, "weight") if not form.packed else self._part(name, PACKED)
        codes_NK = unpack(codes_NK, form.bits, form.shape[1]) if form.packed else codes_NK
        scales_NG = self._part(name, SCALE).half()
        if bad := int((~scales_NG.isfinite()).sum()):
            raise not_finite(self.tensors.checkpoint.path, part_of(name, SCALE), bad, scales_NG)
        if form.zeros:
            zeros_NG = unpack(self._part(name, ZERO).mT.contiguous(), form.bits, form.shape[0]).mT.contiguous()
        return codes_NK, scales_NG, zeros_NG

    def _grouped(self, name: str) -> GroupedWeight:
        weight = to_grouped(*self._codes(name), self.forms[name].bits)
        for part in self.forms[name].parts():
            self.tensors.release(part_of(name, part))
        return weight

    def _numbers(self, name: str) -> Tensor:
        """fp32 [N, K]; an exact integer times the scale, rounded once."""
        codes_NK, scales_NG, zeros_NG = self._codes(name)
        zero = 0 if codes_NK.dtype == torch.int8 else 8 if self.forms[name].bits == 4 else 128
        codes_NGg = codes_NK.short().view(*scales_NG.shape, -1)
        return (
            (codes_NGg - (zero if zeros_NG is None else zeros_NG[..., None])) * scales_NG.float()[..., None]
        ).flatten(1)


def part_of(name: str, part: str) -> str:
    """``x.weight`` to ``x.part``."""
    return name.removesuffix("weight") + part
