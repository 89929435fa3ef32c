"""What a model's quantization costs in answers: perplexity of both, and how far their distributions are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.base import InvalidRequest
from penstock.kernels import Batch, GroupBatch, KVLayer, Ops
from penstock.models import Decoder, Placement

SAMPLE = Path(__file__).with_name("sample.txt")
"""Some prose, read where no text is given."""
BLOCK = 32
ROWS = 64
"""Rows whose logits are held at a time."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Over every position of a text, in windows that know nothing of each other.

    Attributes:
        tokens, window: of the text, and of a window; the last one may be shorter.
        perplexity, quantized_perplexity: of each window's tokens but the first.
        kl_mean, kl_p99: KL(model || quantized) of the next token, nats.
        same_top: share of positions at which both find the same token likeliest.
    """

    tokens: int
    window: int
    perplexity: float
    quantized_perplexity: float
    kl_mean: float
    kl_p99: float
    same_top: float


class Tally:
    """Sums up rows of both as they come."""

    def __init__(self) -> None:
        self.divergences, self.same = list[Tensor](), 0
        self.surprise, self.foretold = torch.zeros(2, dtype=torch.float64), 0

    def add(self, logits_RV: Tensor, quantized_RV: Tensor, next_r: Tensor) -> None:
        """Args:
        logits_RV, quantized_RV: fp32.
        next_r: the tokens that come after the rows; the last row's may be missing.
        """
        p_RV, q_RV = (x_RV.double().log_softmax(-1) for x_RV in (logits_RV, quantized_RV))
        self.divergences.append((p_RV.exp() * (p_RV - q_RV)).sum(-1))
        self.same += int((p_RV.argmax(-1) == q_RV.argmax(-1)).sum())
        self.foretold += len(next_r)
        for i, of_RV in enumerate((p_RV, q_RV)):
            self.surprise[i] -= of_RV[: len(next_r)].gather(-1, next_r[:, None]).sum()

    def quality(self, window: int) -> Quality:
        kl = torch.cat(self.divergences)
        return Quality(
            tokens=len(kl),
            window=window,
            perplexity=math.exp(self.surprise[0] / self.foretold),
            quantized_perplexity=math.exp(self.surprise[1] / self.foretold),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]),
            same_top=self.same / len(kl),
        )


def check_text(ids: Sequence[int]) -> None:
    """Raises InvalidRequest: (text_too_short) there are fewer than two tokens."""
    if len(ids) < 2:
        raise InvalidRequest(
            "text_too_short",
            "There is no text to compare on",
            why=f"it has {len(ids)} tokens of 2",
            fix="name a longer text",
        )


@torch.inference_mode()
def measure_quality(
    model: Decoder, quantized: Decoder, ops: Ops, placement: Placement, ids: Sequence[int], window: int = 512
) -> Quality:
    """Reads a text with both; logits of a few rows at a time are in memory.

    Args:
        ids: token ids.
        window: tokens that are read at once; no more than there are, or than the models hold.

    Raises:
        InvalidRequest: as ``check_text``.
    """
    check_text(ids)
    window = min(window, len(ids), model.spec.max_positions)
    tally = Tally()
    for ids_T in torch.split(torch.tensor(ids), window):
        pairs = zip(*(read(decoder, ops, placement, ids_T) for decoder in (model, quantized)), strict=True)
        for start, (logits_RV, quantized_RV) in zip(range(0, len(ids_T), ROWS), pairs, strict=True):
            tally.add(logits_RV, quantized_RV, ids_T[start + 1 : start + 1 + ROWS])
    return tally.quality(window)


@torch.inference_mode()
def read(decoder: Decoder, ops: Ops, placement: Placement, ids_T: Tensor) -> Iterator[Tensor]:
    """Logits [R, V] of ROWS rows after the other, of a text by itself."""
    for hidden_RD in torch.split(_hidden(decoder, ops, placement, ids_T), ROWS):
        yield decoder.logits(hidden_RD)


def _hidden(decoder: Decoder, ops: Ops, placement: Placement, ids_T: Tensor) -> Tensor:
    """Final hidden states [T, D] of a text by itself."""
    spec, count = decoder.spec, len(ids_T)
    rows_T, blocks = torch.arange(count), -(-count // BLOCK)
    layers, groups = dict[int, KVLayer](), list[GroupBatch]()
    for group in spec.kv_groups():
        pool = ops.allocate_kv(
            len(group.layers), blocks, BLOCK, group.kv_heads, group.head_dim, placement.dtype, placement.device
        )
        layers |= zip(group.layers, pool, strict=True)
        groups.append(GroupBatch(rows_T, torch.arange(blocks, dtype=torch.int32)[None]))
    starts, lengths = torch.tensor([0, count]), torch.tensor([count])
    batch = Batch(rows_T, [0, count], starts, [count], lengths, BLOCK, groups)
    return decoder.hidden(*decoder.forward(ids_T, batch, [layers[i] for i in range(spec.layers)]), rows_T)
