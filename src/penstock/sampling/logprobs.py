"""Log-probabilities of the raw softmax, before temperature and rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.sampling import exact, order
from penstock.spec import TokenLogprobs


@dataclass(slots=True)
class RawLogprobs:
    """Of some rows of a step, on the device; ``collect`` brings them to the host.

    Attributes:
        rows: which rows of the step asked.
        counts: how many likeliest tokens each of them asked for.
    """

    rows: list[int]
    counts: list[int]
    drawn_L: Tensor
    ranks_L: Tensor
    top_ids_LK: Tensor
    top_LK: Tensor

    def collect(self) -> dict[int, TokenLogprobs]:
        """Row of the step -> its log-probabilities."""
        columns = (self.drawn_L, self.ranks_L, self.top_ids_LK, self.top_LK)
        lists = (column.tolist() for column in columns)
        return {
            row: TokenLogprobs(drawn, rank, tuple(zip(ids[:count], values[:count], strict=True)))
            for row, count, drawn, rank, ids, values in zip(self.rows, self.counts, *lists, strict=True)
        }


def raw_logprobs(logits_LV: Tensor, tokens_L: Tensor, rows: list[int], counts: list[int], chunk: int) -> RawLogprobs:
    """Log-softmax at the drawn tokens, their ranks and the likeliest tokens (ties by id)."""
    vocab_size = logits_LV.shape[1]
    largest = logits_LV.amax(dim=1, keepdim=True)
    norm = exact.log(exact.by_parts(_weight, chunk, logits_LV, largest))
    ids_L1 = tokens_L.unsqueeze(1)
    drawn_L1 = logits_LV.gather(1, ids_L1)
    earlier = torch.arange(vocab_size, device=logits_LV.device) < ids_L1
    ranks_L = 1 + ((logits_LV > drawn_L1) | ((logits_LV == drawn_L1) & earlier)).sum(dim=1)
    top_ids_LK = order.top_ids(order.sort_keys(logits_LV), min(max(counts), vocab_size))
    return RawLogprobs(
        rows,
        [min(count, vocab_size) for count in counts],
        (_gaps(drawn_L1, largest) - norm).squeeze(1),
        ranks_L,
        top_ids_LK,
        _gaps(logits_LV.gather(1, top_ids_LK), largest) - norm,
    )


def _weight(logits: Tensor, largest: Tensor) -> Tensor:
    return exact.tree_sum(exact.exp(_gaps(logits, largest))).unsqueeze(1)


def _gaps(logits: Tensor, largest: Tensor) -> Tensor:
    return logits.to(torch.float64) - largest.to(torch.float64)
