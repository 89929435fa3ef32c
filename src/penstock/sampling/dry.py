"""DRY, "don't repeat yourself": the longer a repetition, the dearer the token that would continue it.

Proposed by P. E. Weidmann for text-generation-webui (pull request 5677, 2024); names, defaults and edges are those of
llama.cpp. At each earlier position the context may be looked at as a repetition in progress: so many tokens up to
there are also the last ones of the context. The token after that position would continue it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.sampling.masks import NONE, Endings

CEILING = 1e30
"""No penalty is above it, so that logits stay finite."""


class Dry:
    """Subtracts multiplier x base^(length - allowed) from tokens that would continue a repetition of ``length``.

    The lengths are kept for all positions and brought up to date with each token, which takes time linear in the
    context and no look at its values.

    Args:
        tokens: known so far, at least one.
        room: most tokens there can be.
        allowed: repetitions shorter than this are free.
        last_n: how far back to look; None for all.
        breakers: token sequences across which no repetition is followed; those of one token are never penalised.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        room: int,
        *,
        multiplier: float,
        base: float,
        allowed: int,
        last_n: int | None,
        breakers: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.count, self.allowed, self.last_n, self.vocab_size = len(tokens), allowed, last_n, vocab_size
        self.penalties = torch.tensor(_penalties(multiplier, base, allowed, room), device=device)
        self.tokens_L = torch.full((room,), NONE, device=device)
        self.lengths_L = torch.zeros(room, dtype=torch.int64, device=device)
        self.tokens_L[: self.count] = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.lengths_L[: self.count - 1] = torch.tensor(suffix_lengths(tokens), dtype=torch.int64, device=device)
        self.singles = torch.tensor(sorted({b[0] for b in breakers if len(b) == 1}), dtype=torch.int64, device=device)
        self.single_V = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, self.singles, True)
        longer = sorted({tuple(b) for b in breakers if len(b) > 1})
        self.longer = Endings(longer, self.tokens_L[: self.count]) if longer else None
        unbroken = tokens_after_breaker(tokens, {tuple(b) for b in breakers})
        self.unbroken_1 = torch.tensor([unbroken], device=device)

    def apply(self, logits_V: Tensor, length: int) -> None:
        start = 0 if self.last_n is None else max(0, length - self.last_n)
        if length - start <= self.allowed:
            return
        lengths = torch.minimum(self.lengths_L[start : length - 1], self.unbroken_1)
        if start:  # nothing is seen of a repetition that began before
            lengths = torch.minimum(lengths, torch.arange(1, len(lengths) + 1, device=lengths.device))
        longest_V = torch.zeros(self.vocab_size, dtype=torch.int64, device=logits_V.device)
        longest_V.scatter_reduce_(0, self.tokens_L[start + 1 : length], lengths, "amax")
        longest_V.index_fill_(0, self.singles, 0)
        logits_V -= self.penalties[longest_V.clamp_(max=len(self.penalties) - 1)]

    def append(self, token_1: Tensor) -> None:
        known = self.count
        continued = torch.nn.functional.pad(self.lengths_L[: known - 1] + 1, (1, 0), value=1)
        self.lengths_L[:known] = continued * (self.tokens_L[:known] == token_1)
        self.tokens_L[known : known + 1] = token_1
        self.count += 1
        self.unbroken_1 = (self.unbroken_1 + 1).masked_fill_(self.single_V[token_1], 0)
        if self.longer is not None:
            self.longer.append(token_1)
            self.unbroken_1.masked_fill_(self.longer.reached().any(), 0)


def _penalties(multiplier: float, base: float, allowed: int, room: int) -> list[float]:
    """By length, up to where it no longer grows. By multiplication alone, since powers differ between machines."""
    table, penalty = [0.0] * min(allowed, room), multiplier
    while len(table) < room and penalty < CEILING and (base > 1.0 or len(table) <= allowed):
        table.append(penalty)
        penalty *= base
    return table if len(table) == room or base == 1.0 else [*table, CEILING]


def suffix_lengths(tokens: Sequence[int]) -> list[int]:
    """For each position but the last: how many tokens up to it are also the last ones of all.

    The Z-algorithm (Gusfield 1997) on the reversed tokens: linear.
    """
    back = tokens[::-1]
    count = len(back)
    z, left, right = [0] * count, 0, 0
    for k in range(1, count):
        length = min(right - k, z[k - left]) if k < right else 0
        while k + length < count and back[length] == back[k + length]:
            length += 1
        z[k] = length
        if k + length > right:
            left, right = k, k + length
    return z[:0:-1]


def tokens_after_breaker(tokens: Sequence[int], breakers: set[tuple[int, ...]]) -> int:
    """Tokens after the end of the breaker that ends last; all if there is none."""
    widths = sorted({len(breaker) for breaker in breakers})
    for end in range(len(tokens), 0, -1):
        if any(width <= end and tuple(tokens[end - width : end]) in breakers for width in widths):
            return len(tokens) - end
    return len(tokens)
