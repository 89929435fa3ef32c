"""Log-probabilities of the raw softmax, before temperature and rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.sampling import exact, order
from penstock.spec import TokenLogprobs

Columns = tuple[Tensor, Tensor, Tensor, Tensor]
"""Log-probability of the drawn token and its rank (L), ids of the likeliest and their log-probabilities (L, K)."""


@dataclass(slots=True)
class RawLogprobs:
    """Of some rows of a step, on the device.

    Attributes:
        rows: which rows of the step asked.
        counts: how many likeliest tokens each of them gets.
    """

    rows: list[int]
    counts: list[int]
    columns: Columns

    def entries(self, columns: Sequence[Tensor]) -> dict[int, TokenLogprobs]:
        """Row of the step -> its log-probabilities, from the columns as they arrived on the host."""
        lists = (column.tolist() for column in columns)
        return {
            row: TokenLogprobs(drawn, rank, tuple(zip(ids[:count], values[:count], strict=True)))
            for row, count, drawn, rank, ids, values in zip(self.rows, self.counts, *lists, strict=True)
        }


def raw_logprobs(logits_LV: Tensor, tokens_L: Tensor, top: int) -> Columns:
    """Log-softmax at the drawn tokens, their ranks, and the ``top`` likeliest tokens (ties by id)."""
    largest = logits_LV.amax(dim=1, keepdim=True)
    norm = exact.log(exact.tree_sum(exact.exp(_gaps(logits_LV, largest)))).unsqueeze(1)
    ids_L1 = tokens_L.unsqueeze(1)
    drawn_L1 = logits_LV.gather(1, ids_L1)
    earlier = torch.arange(logits_LV.shape[1], device=logits_LV.device) < ids_L1
    ranks_L = 1 + ((logits_LV > drawn_L1) | ((logits_LV == drawn_L1) & earlier)).sum(dim=1)
    top_ids_LK = order.top_ids(logits_LV, top)
    top_LK = _gaps(logits_LV.gather(1, top_ids_LK), largest) - norm
    return (_gaps(drawn_L1, largest) - norm).squeeze(1), ranks_L, top_ids_LK, top_LK


def _gaps(logits: Tensor, largest: Tensor) -> Tensor:
    return logits.to(torch.float64) - largest.to(torch.float64)
