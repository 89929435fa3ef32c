"""The tensors of a GGUF file by the names a model knows them by, as numbers or as small integers."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from penstock.formats import Checkpoint
from penstock.layers import (
    AT_ONCE,
    BITS,
    FLOATS,
    GroupedWeight,
    Placement,
    decode_rows,
    frozen_bytes,
    group_rows,
)
from penstock.models.tensors import check_tensors, holding, not_finite
from penstock.spec import ModelSpec
from penstock.spec.gguf_tensors import check_types, gguf_shapes, gguf_tensors, is_ignored
from penstock.spec.tensors import checkpoint_tensors


class GGUFTensors:
    """Raises:
    ModelFormatError: (unsupported_quantization) blocks of another type; weights_missing, weights_unexpected or
        weights_shape: they are not those of ``spec``.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> None:
        self.checkpoint, self.placement = checkpoint, placement
        self.stored, self.shapes = gguf_tensors(spec), checkpoint_tensors(spec)
        entries = {name: checkpoint.entry(name) for name in sorted(checkpoint.names) if not is_ignored(name)}
        known, shapes = FLOATS.keys() | BITS.keys(), gguf_shapes(self.stored, spec)
        check_types({name: entries[name].dtype for name in entries.keys() & shapes.keys()}, known)
        check_tensors(entries, shapes, spec.family, lambda _: known, checkpoint.path)

    def fuse(self, *names: str, exact: bool = False) -> Tensor:
        """The tensors, one below the other, as numbers in memory of our own; ``exact`` as of ``Tensors.fuse``.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        counts = [self.shapes[name][0] for name in names]
        dtype = holding(FLOATS.get(self._kind(name), torch.float32) for name in names) if exact else None
        fused = self.placement.empty((sum(counts), *self.shapes[names[0]][1:]), dtype)
        for name, target in zip(names, torch.split(fused, counts), strict=True):
            target_RK, at = target.view(-1, target.shape[-1]), 0
            for part_RB in self._parts(name):
                numbers_RK = decode_rows(part_RB, self._kind(name))
                if offset := self.stored[name].offset:
                    numbers_RK = numbers_RK.float() - offset
                target_RK[at : at + len(part_RB)] = numbers_RK.to(target.dtype)
                at += len(part_RB)
            self._check(name, target)
            if self.stored[name].heads:
                target.copy_(self._in_order(name, target))
        return fused

    def weight(self, *names: str, exact: bool = False) -> Tensor | GroupedWeight:
        """The matrices, one below the other: small integers if all of them are stored so, of 8 bits unless all have 4.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        kinds = {self._kind(name) for name in names}
        if not kinds <= BITS.keys():
            return self.fuse(*names, exact=exact)
        bits, each = max(BITS[kind] for kind in kinds), []
        for name in names:
            parts = [group_rows(part_RB, self._kind(name), bits) for part_RB in self._parts(name)]
            whole = one_below_the_other(parts)
            self._check(name, whole.scales_NG)
            codes_NK, scales_NG = self._in_order(name, whole.codes_NK), self._in_order(name, whole.scales_NG)
            zeros_NG = None if whole.zeros_NG is None else self._in_order(name, whole.zeros_NG)
            each.append(GroupedWeight(codes_NK, scales_NG, zeros_NG))
        return one_below_the_other(each)

    def _kind(self, name: str) -> str:
        return self.checkpoint.entry(self.stored[name].name).dtype

    def _parts(self, name: str) -> Iterator[Tensor]:
        """The bytes of some rows after the other, uint8 [R, B], not copied; then the file's pages are let go."""
        stored, shape = self.stored[name], self.shapes[name]
        data = frozen_bytes(self.checkpoint.view(stored.name))
        if stored.expert is not None:
            (experts, *_) = self.checkpoint.entry(stored.name).shape
            data = data.view(experts, -1)[stored.expert]
        yield from torch.split(data.view(prod(shape[:-1]), -1), max(1, AT_ONCE // shape[-1]))
        self.checkpoint.release(stored.name)

    def _in_order(self, name: str, x: Tensor) -> Tensor:
        """Rows of each head in halves, where they are stored in pairs."""
        if not (heads := self.stored[name].heads):
            return x
        return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def _check(self, name: str, x: Tensor) -> None:
        if bad := int((~x.isfinite()).sum()):
            raise not_finite(self.checkpoint.path, self.stored[name].name, bad, x)


def one_below_the_other(parts: list[GroupedWeight]) -> GroupedWeight:
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros_NG for part in parts if part.zeros_NG is not None]
    codes_NK, scales_NG = torch.cat([p.codes_NK for p in parts]), torch.cat([p.scales_NG for p in parts])
    return GroupedWeight(codes_NK, scales_NG, torch.cat(zeros) if zeros else None)
