"""A checkpoint's tensors by the names a model knows them by: compared with what it calls for, then fused and placed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from penstock.base import ModelFormatError
from penstock.formats import Checkpoint
from penstock.layers import Placement

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
        if missing := sorted(expected.keys() - self.stored_as.keys()):
            raise self._mismatch("weights_missing", f"{len(missing)} tensors are missing: {some(missing)}")
        if unexpected := sorted(self.stored_as.keys() - expected.keys()):
            what = f"{len(unexpected)} tensors are not part of a {family} model of this configuration"
            raise self._mismatch("weights_unexpected", f"{what}: {some(unexpected)}")
        for name, shape in expected.items():
            entry = self.checkpoint.entry(self.stored_as[name])
            if entry.shape != shape:
                why = f"tensor {name} is {list(entry.shape)}, config.json calls for {list(shape)}"
                raise self._mismatch("weights_shape", why)
            if entry.dtype not in (dtypes := PACKED if name in packed else STORED):
                raise self._mismatch("weights_dtype", f"tensor {name} is {entry.dtype}, not one of {some(dtypes)}")

    def fuse(self, *names: str) -> Tensor:
        """The tensors, one below the other, in memory of our own: aligned alike in every process.

        Raises:
            ModelFormatError: (weights_not_finite).
        """
        parts = [self.stored(name) for name in names]
        fused = self.placement.empty((sum(map(len, parts)), *parts[0].shape[1:]))
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
            raise ModelFormatError(
                "weights_not_finite",
                f"The weights in {self.checkpoint.folder} are damaged",
                why=f"{bad} of the {target.numel()} numbers of {name} are infinite or not a number in {target.dtype}",
                fix="download the folder again, or choose a dtype of a wider range",
            )

    def release(self, name: str) -> None:
        """Lets go of the file's pages: the copy and the mapped file together are twice the weights."""
        self.checkpoint.release(self.stored_as[name])

    def stored(self, name: str) -> Tensor:
        """The file's bytes as a tensor, not copied. It must not be written to."""
        entry = self.checkpoint.entry(self.stored_as[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self.checkpoint.view(entry.name), dtype=(STORED | PACKED)[entry.dtype])
        return flat.view(entry.shape)

    def _mismatch(self, code: str, why: str) -> ModelFormatError:
        return ModelFormatError(
            code,
            f"The weights in {self.checkpoint.folder} do not fit their config.json",
            why=why,
            fix="download the folder again, or take config.json and weights from the same revision",
        )


def some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
