"""Rules against repetition of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class RepetitionPenalty:
    """Shrinks positive and stretches negative logits of tokens seen in prompt or output (Keskar et al. 2019)."""

    def __init__(self, penalty: float, tokens: Tensor, vocab_size: int) -> None:
        self.penalty = torch.tensor(penalty, dtype=torch.float32, device=tokens.device)
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device).index_fill_(0, tokens, True)

    def apply(self, logits_V: Tensor, length: int) -> None:
        penalised_V = torch.where(logits_V > 0, logits_V / self.penalty, logits_V * self.penalty)
        torch.where(self.seen_V, penalised_V, logits_V, out=logits_V)

    def append(self, token_1: Tensor) -> None:
        self.seen_V.index_fill_(0, token_1, True)


class CountPenalty:
    """Subtracts ``frequency`` for each time a token was output and ``presence`` if it was (OpenAI)."""

    def __init__(self, frequency: float, presence: float, output: Tensor, vocab_size: int) -> None:
        self.frequency, self.presence = frequency, presence
        self.counts_V = torch.bincount(output, minlength=vocab_size).to(torch.int32)
        self.one_1 = torch.ones(1, dtype=torch.int32, device=output.device)

    def apply(self, logits_V: Tensor, length: int) -> None:
        logits_V -= self.counts_V * self.frequency
        logits_V -= (self.counts_V > 0) * self.presence

    def append(self, token_1: Tensor) -> None:
        self.counts_V.index_add_(0, token_1, self.one_1)
