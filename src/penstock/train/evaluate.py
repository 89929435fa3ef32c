"""Bits per UTF-8 byte of a text under the model.

Shape legend: B windows of a batch, T positions of a window, V vocabulary, S tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from penstock.train.model import Llama
from penstock.train.tokenizer import EOS, special_id


@dataclass(frozen=True)
class Score:
    """Sum of the negative log-likelihood in nats, and what it is over."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / UTF-8 bytes of the whole text."""
        return self.nats / math.log(2.0) / self.text_bytes


def window_starts(count: int, window: int, stride: int) -> list[int]:
    """Return first positions of windows that cover ``count`` targets, ``stride`` apart."""
    starts = list(range(0, max(1, count - window + stride), stride))
    return [s for s in starts if s == 0 or s + window - stride < count]


@torch.no_grad()
def score_ids(model: Llama, ids: Sequence[int], window: int, stride: int, batch: int = 8) -> float:
    """Return the nats of ``ids[1:]`` given what comes before; ``ids[0]`` is only context.

    Every target is scored exactly once: the first window scores all of its targets, each later
    one only those that the window before did not reach (so with >= window - stride of context).
    """
    data_S = torch.tensor(ids, dtype=torch.long, device=model.device)
    count = len(ids) - 1
    starts = window_starts(count, window, stride)
    nats, at = 0.0, 0
    while at < len(starts):
        # Windows of one length go together; only the last of the text can be shorter.
        length = min(window, count - starts[at])
        group = [s for s in starts[at : at + batch] if min(window, count - s) == length]
        at += len(group)
        x_BT = torch.stack([data_S[s : s + length] for s in group])
        y_BT = torch.stack([data_S[s + 1 : s + 1 + length] for s in group])
        logits_BTV = model(x_BT)
        loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), y_BT, reduction="none")
        for row, start in enumerate(group):
            fresh = 0 if start == 0 else window - stride
            nats += float(loss_BT[row, fresh:].double().sum())
    return nats


def score_text(model: Llama, tokenizer: Tokenizer, text: str, window: int = 1024, stride: int = 512) -> Score:
    """Score a whole text, with one end-of-text token before it as the only given context."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nats = score_ids(model, [special_id(tokenizer, EOS), *ids], window, stride)
    return Score(nats, len(ids), len(text.encode("utf-8")))
