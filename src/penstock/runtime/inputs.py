"""Persistent batch arrays: what a step's plan changes is written into them, and a kernels Batch is read off.

Each request has a row. Lengths and block tables live on the host, where they are planned with; token ids live
on the device and are never needed on the host, so that a step can be prepared before the tokens of the
step before it have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.base import EngineError
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import NO_BLOCK, NewRequest, Slice, TableWrite
from penstock.kernels import Batch, GroupBatch

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """What the model and the sampler need of one step; n slices draw.

    Attributes:
        ids_T: token ids of the batch's rows.
        draws: indices of the slices that draw, ascending.
        rows: where the drawing requests are placed.
        positions: where each drawn token will stand.
        out_rows_R: the batch rows whose logits are wanted.
    """

    ids_T: Tensor
    batch: Batch
    draws: list[int]
    rows: Ints
    positions: Ints
    out_rows_R: Tensor


class Inputs:
    """Everything the executor knows of its requests, but for how they are sampled.

    Args:
        rows: most requests known at a time.
        pools: of each KV group. Kernels follow block tables wherever they lead, so that no block goes into one that
            its pool does not have, and none is missing where a step reads or writes.
    """

    def __init__(
        self, rows: int, max_model_len: int, block_size: int, pools: Sequence[PoolSpec], device: torch.device
    ) -> None:
        self.block_size, self.pools, self.device = block_size, tuple(pools), device
        self.row_of: dict[int, int] = {}
        self.free = list(range(rows - 1, -1, -1))
        self.known = np.zeros(rows, np.int64)
        self.generates = np.zeros(rows, bool)
        self.tables = [np.full((rows, -(-max_model_len // block_size)), NO_BLOCK, np.int32) for _ in pools]
        self.held_G2S = np.zeros((len(pools), 2, rows), np.int64)  # from where to where positions all have blocks
        self.back_G1 = np.array([[max_model_len if pool.window is None else pool.window - 1] for pool in pools])
        self.tokens_SL = torch.zeros(rows, max_model_len, dtype=torch.int64, device=device)

    def forget(self, request: int) -> None:
        row = self.row_of.pop(request, None)
        if row is not None:
            self.free.append(row)

    def place(self, request: NewRequest) -> int:
        """Takes a request in, or replaces what was known of it; returns its row.

        Raises:
            ValueError: a block is none of its pool's, or more tokens or blocks are given than a row holds.
        """
        row = self.row_of.get(request.id)
        if row is None:
            if not self.free:
                raise EngineError(
                    "executor_full",
                    "More requests are known than there are rows",
                    why=f"{len(self.known)}",
                    fix="report this",
                )
            row = self.row_of[request.id] = self.free.pop()
        count = len(request.tokens)
        self.known[row], self.generates[row] = count, request.task == "generate"
        self.tokens_SL[row, :count] = self._put(np.array(request.tokens, np.int64))
        for group, blocks in zip(range(len(self.pools)), request.tables, strict=True):
            self._hold(group, row, 0, blocks)
        return row

    def write(self, change: TableWrite) -> None:
        request, group, first, blocks = change
        self._hold(group, self.row_of[request], first, blocks)

    def build(self, slices: Sequence[Slice]) -> StepInputs:
        """The step's batch; rows of a slice are in order of position.

        Raises:
            EngineError: (token_unknown) a slice goes past the last known token, as after a failed step.
            ValueError: a slice is empty or begins before 0, or a position that it reads or writes has no block.
        """
        count, row_of = len(slices), self.row_of
        requests, *spans = zip(*slices, strict=True)
        if min(spans[0]) < 0 or min(spans[1]) < 1:
            raise ValueError(f"slices {list(slices)}")
        starts, counts = np.array(spans, np.int64)
        rows = np.array([row_of[request] for request in requests], np.int64)
        ends, known = starts + counts, self.known[rows]
        if (ends > known).any():
            bad = int((ends > known).argmax())
            why = f"positions up to {ends[bad]} are asked for and {known[bad]} tokens are known"
            raise EngineError(
                "token_unknown",
                f"A slice of request {requests[bad]} is ahead of its tokens",
                why=why,
                fix="report this",
            )
        row_starts = np.zeros(count + 1, np.int64)
        np.cumsum(counts, out=row_starts[1:])
        if row_starts[-1] == count:
            rows_T, positions_T = rows, starts
        else:
            rows_T = np.repeat(rows, counts)
            positions_T = np.arange(row_starts[-1]) + np.repeat(starts - row_starts[:-1], counts)
        draws = np.flatnonzero((ends == known) & self.generates[rows])
        batch = Batch(
            positions_T=self._put(positions_T),
            row_starts=row_starts.tolist(),
            row_starts_R1=self._put(row_starts),
            contexts=ends.tolist(),
            contexts_R=self._put(ends),
            block_size=self.block_size,
            groups=self._groups(rows, rows_T, positions_T, starts, ends),
        )
        ids_T = self.tokens_SL[self._put(rows_T), batch.positions_T]
        out_rows_R = self._put(row_starts[1:][draws] - 1)
        return StepInputs(ids_T, batch, draws.tolist(), rows[draws], known[draws], out_rows_R)

    def append(self, step: StepInputs, tokens_R: Tensor) -> None:
        """The drawn tokens become known; a step planned on them may follow before the host has seen them."""
        self.tokens_SL[self._put(step.rows), self._put(step.positions)] = tokens_R
        self.known[step.rows] += 1

    def _hold(self, group: int, row: int, first: int, blocks: Sequence[int]) -> None:
        """The end of a row's table, from a block index on; nothing is left of who had the row before."""
        if blocks and not NO_BLOCK <= min(blocks) <= max(blocks) < self.pools[group].blocks:
            raise ValueError(f"blocks {min(blocks)} to {max(blocks)} in a pool of {self.pools[group].blocks}")
        table_M, stop = self.tables[group][row], first + len(blocks)
        table_M[first:stop] = blocks
        table_M[stop:] = NO_BLOCK
        missing = np.flatnonzero(table_M[:stop] == NO_BLOCK)
        start = int(missing[-1]) + 1 if len(missing) else 0
        self.held_G2S[group, :, row] = start * self.block_size, stop * self.block_size

    def _groups(self, rows: Ints, rows_T: Ints, positions_T: Ints, starts: Ints, ends: Ints) -> list[GroupBatch]:
        size = self.block_size
        block_T, offset_T = np.divmod(positions_T, size)
        columns = -(-int(ends.max()) // size)
        held_G2R = self.held_G2S[:, :, rows]
        if ((held_G2R[:, 0] > np.maximum(starts - self.back_G1, 0)) | (held_G2R[:, 1] < ends)).any():
            raise ValueError(f"no block for a position of {starts} to {ends}; from where to where they are: {held_G2R}")
        groups = []
        for table in self.tables:
            slots_T = table[rows_T, block_T].astype(np.int64)
            slots_T *= size
            slots_T += offset_T
            groups.append(GroupBatch(self._put(slots_T), self._put(table[rows, :columns])))
        return groups

    def _put(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
