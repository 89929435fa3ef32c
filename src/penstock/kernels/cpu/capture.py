"""Capture and replay: a forward pass is recorded once as a list of native calls over fixed memory, and replayed with
other rows by one call (``csrc/cpu/tape.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from penstock.kernels import _native
from penstock.kernels.cpu.calls import laid_out, same, share_threads
from penstock.kernels.ops import Forward
from penstock.kernels.types import Batch

MOST_ROWS = 256
"""Of a step that is replayed: the time of Python in one is nothing beside that of more rows."""

MAKES_OR_VIEWS = frozenset("empty empty_like new_empty view permute transpose".split())
ASKS = frozenset("__get__ __len__ data_ptr is_contiguous contiguous stride size numel".split())
"""What torch may do in a forward pass that is recorded: memory is made, named and asked about, nothing computed. Where
``contiguous`` copies, the tape sees an address that no call wrote."""


class Captured:
    """``forward`` until it was recorded; forever, if torch computes part of it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.recording: Recording | None = None
        self.can_record = True
        self.replayed = False

    def __call__(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self.replayed = self.recording is not None and 0 < len(ids_T) <= MOST_ROWS
        if not 0 < len(ids_T) <= MOST_ROWS or not self.can_record:
            return self.forward(ids_T, batch)
        if self.recording is not None:
            return self.recording.replay(ids_T, batch)
        tape, watch = _native.Tape(), Watch()
        try:
            tape.start()
            with watch:
                results = self.forward(ids_T, batch)
        finally:
            tape.stop()
        then, addresses = _step(ids_T, batch), [result.data_ptr() for result in results]
        places = tape.lay_out(then, MOST_ROWS, addresses) if watch.only_memory else []
        self.can_record = bool(places)
        if places:
            self.recording = Recording(tape, places, results, batch)
        return results


class Recording:
    def __init__(self, tape: _native.Tape, places: Sequence[int], results: Sequence[Tensor], batch: Batch) -> None:
        *starts, size = places
        self.tape, self.memory = tape, torch.empty(size, dtype=torch.uint8)
        self.laid_out = (batch.block_size, len(batch.groups))
        tape.bind(self.memory.data_ptr())
        self.results = []
        for start, result_TD in zip(starts, results, strict=True):
            size = MOST_ROWS * result_TD.shape[1] * result_TD.element_size()
            self.results.append(self.memory[start : start + size].view(result_TD.dtype).view(MOST_ROWS, -1))

    def replay(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        share_threads()
        if (batch.block_size, len(batch.groups)) != self.laid_out:
            raise ValueError(
                f"recorded with {self.laid_out} as block size and KV groups, not {batch.block_size} and"
                f" {len(batch.groups)}"
            )
        self.tape.replay(_step(ids_T, batch))
        residual_TD, delta_TD = self.results
        return residual_TD[: len(ids_T)], delta_TD[: len(ids_T)]


class Watch(TorchFunctionMode):
    """Attributes:
    only_memory: no operation of torch computed anything.
    """

    only_memory = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.only_memory &= func.__name__ in MAKES_OR_VIEWS | ASKS
        return func(*args, **(kwargs or {}))


def _step(ids_T: Tensor, batch: Batch) -> _native.Step:
    same(ids_T, torch.int64, ids_T, batch.positions_T, batch.row_starts_R1, batch.contexts_R)
    same(ids_T, torch.int64, *(group.slots_T for group in batch.groups))
    same(ids_T, torch.int32, *(group.tables_RM for group in batch.groups))
    laid_out(batch, len(ids_T), *batch.groups)
    return _native.step(
        len(ids_T),
        len(batch.contexts_R),
        ids_T.data_ptr(),
        batch.positions_T.data_ptr(),
        batch.row_starts_R1.data_ptr(),
        batch.contexts_R.data_ptr(),
        [(group.slots_T.data_ptr(), group.tables_RM.data_ptr(), group.tables_RM.shape[1]) for group in batch.groups],
    )
