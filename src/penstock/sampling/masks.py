"""Rules that forbid tokens, or shift the logits of some: allowed ids, bad words, minimum length, bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ANY, NONE = -1, -2
"""In place of token ids: equal to every token, and to none."""


class AllowedTokens:
    """No other tokens than these."""

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        self.forbidden_V = torch.ones(vocab_size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False)

    def apply(self, logits_V: Tensor, length: int) -> None:
        logits_V.masked_fill_(self.forbidden_V, -torch.inf)

    def append(self, token_1: Tensor) -> None:
        pass


class BadWords:
    """Not the last token of a word directly after its other tokens, as far as those were output."""

    def __init__(self, words: Sequence[Sequence[int]], output: Tensor) -> None:
        self.ends = Endings([word[:-1] for word in words], output)
        self.last_W = torch.tensor([word[-1] for word in words], device=output.device)

    def apply(self, logits_V: Tensor, length: int) -> None:
        ceiling_W = torch.full_like(self.last_W, torch.inf, dtype=logits_V.dtype)
        ceiling_W.masked_fill_(self.ends.reached(), -torch.inf)
        logits_V.scatter_reduce_(0, self.last_W, ceiling_W, "amin")  # without asking which words are near their end

    def append(self, token_1: Tensor) -> None:
        self.ends.append(token_1)


class MinTokens:
    """No stop id before ``length`` tokens are known."""

    def __init__(self, stop_ids: Tensor, length: int) -> None:
        self.stop_ids, self.length = stop_ids, length

    def apply(self, logits_V: Tensor, length: int) -> None:
        if length < self.length:
            logits_V.index_fill_(0, self.stop_ids, -torch.inf)

    def append(self, token_1: Tensor) -> None:
        pass


class LogitBias:
    """Adds a value to the logits of some tokens."""

    def __init__(self, ids: Tensor, values: Tensor) -> None:
        self.ids, self.values = ids, values

    def apply(self, logits_V: Tensor, length: int) -> None:
        logits_V[self.ids] += self.values

    def append(self, token_1: Tensor) -> None:
        pass


class Endings:
    """Which of some sequences the tokens end with. The empty one they always do."""

    def __init__(self, sequences: Sequence[Sequence[int]], tokens: Tensor) -> None:
        width = max(1, *map(len, sequences))
        rows = [[ANY] * (width - len(sequence)) + list(sequence) for sequence in sequences]
        self.sequences_SK = torch.tensor(rows, device=tokens.device)
        self.any_SK = self.sequences_SK == ANY
        self.recent_K = torch.nn.functional.pad(tokens[-width:], (max(0, width - len(tokens)), 0), value=NONE)

    def reached(self) -> Tensor:
        """(S,) bool."""
        return ((self.sequences_SK == self.recent_K) | self.any_SK).all(dim=1)

    def append(self, token_1: Tensor) -> None:
        self.recent_K = torch.cat([self.recent_K[1:], token_1])
