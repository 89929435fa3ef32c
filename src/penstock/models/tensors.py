"""A checkpoint's tensors by the names a model knows them by: compared with what it calls for, then fused and placed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from penstock.base import ModelFormatError
from penstock.formats import Checkpoint, TensorEntry
from penstock.layers import Placement, frozen_bytes

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PACKED = {"U8": torch.uint8}
"""Of tensors that hold several numbers to the byte."""
COPIED_AT_ONCE = 1 << 17
"""Numbers copied before they are looked at, while they are still in a cache."""


class Tensors:
    """Args:
    rename: the model's name of a tensor of the file; None for one it has no use for.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement, rename: Callable[[str], str | None]) -> None:
        self.checkpoint, self.placement = checkpoint, placement
        self.stored_as = {name: stored for stored in sorted(checkpoint.names) if (name := rename(stored)) is not None}

    def check(self, expected: Mapping[str, tuple[int, ...]], family: str, packed: Collection[str] = ()) -> None:
        """Compares names, shapes and dtypes before anything is read. ``packed`` names those that hold bytes.

        Raises:
            ModelFormatError: weights_missing, weights_unexpected, weights_shape, weights_dtype.
        """
        entries = {name: self.checkpoint.entry(stored) for name, stored in self.stored_as.items()}
        check_tensors(
            entries, expected, family, lambda name: (PACKED if name in packed else STORED).keys(), self.checkpoint.path
        )

    def fuse(self, *names: str, exact: bool = False) -> Tensor:
        """The tensors, one below the other, in memory of our own: aligned alike in every process.

        Args:
            exact: in the dtype that holds the numbers of all, not in the placement's.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        parts = [self.stored(name) for name in names]
        dtype = holding(part.dtype for part in parts) if exact else None
        fused = self.placement.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype)
        for name, part, target in zip(names, parts, torch.split(fused, list(map(len, parts))), strict=True):
            self.copy(name, part, target)
            self.release(name)
        return fused

    def copy(self, name: str, source: Tensor, target: Tensor) -> None:
        """Fills a part of the model from the tensor of that name.

        A sum is infinite or NaN if one of its numbers is, so one sum is a cheap look at all of them.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        parts, rooms = (torch.split(x, COPIED_AT_ONCE) for x in (source.flatten(), target.view(-1)))
        sums = [room.copy_(part).sum() for part, room in zip(parts, rooms, strict=True)]
        if not torch.stack(sums).isfinite().all() and (bad := int((~target.isfinite()).sum())):
            raise not_finite(self.checkpoint.path, name, bad, target)

    weight = fuse
    """What a matrix is made of. Here there are only numbers."""

    def release(self, name: str) -> None:
        """Lets go of the file's pages: the copy and the mapped file together are twice the weights."""
        self.checkpoint.release(self.stored_as[name])

    def stored(self, name: str) -> Tensor:
        """The file's bytes as a tensor, not copied. It must not be written to."""
        entry = self.checkpoint.entry(self.stored_as[name])
        return frozen_bytes(self.checkpoint.view(entry.name)).view((STORED | PACKED)[entry.dtype]).view(entry.shape)


def check_tensors(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    family: str,
    dtypes_of: Callable[[str], Collection[str]],
    path: Path,
) -> None:
    """Compares names, shapes and dtypes of a model's tensors with those it calls for.

    Raises:
        ModelFormatError: weights_missing, weights_unexpected, weights_shape, weights_dtype.
    """
    if missing := sorted(expected.keys() - entries.keys()):
        raise mismatch(path, "weights_missing", f"{len(missing)} tensors are missing: {some(missing)}")
    if unexpected := sorted(entries.keys() - expected.keys()):
        what = f"{len(unexpected)} tensors are not part of a {family} model of this configuration"
        raise mismatch(path, "weights_unexpected", f"{what}: {some(unexpected)}")
    for name, shape in expected.items():
        entry, dtypes = entries[name], dtypes_of(name)
        if entry.shape != shape:
            why = f"tensor {name} is {list(entry.shape)}, the configuration calls for {list(shape)}"
            raise mismatch(path, "weights_shape", why)
        if entry.dtype not in dtypes:
            raise mismatch(
                path, "weights_dtype", f"tensor {name} is {entry.dtype}, not one of {', '.join(sorted(dtypes))}"
            )


def holding(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds the numbers of all of them."""
    return reduce(torch.promote_types, dtypes)


def mismatch(path: Path, code: str, why: str) -> ModelFormatError:
    return ModelFormatError(
        code,
        f"The weights in {path} do not fit their configuration",
        why=why,
        fix="download it again, or take configuration and weights from the same revision",
    )


def not_finite(path: Path, name: str, bad: int, x: Tensor) -> ModelFormatError:
    return ModelFormatError(
        "weights_not_finite",
        f"The weights in {path} are damaged",
        why=f"{bad} of the {x.numel()} numbers of {name} are infinite or not a number in {x.dtype}",
        fix="download it again, or choose a dtype of a wider range",
    )


def some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
