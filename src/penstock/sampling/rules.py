"""What a request asks of its logits before temperature, in vLLM's order: minimum length, bias, penalties.

A rule is a function of (tokens so far, logits row). One that counts keeps its counts beside the row and is told
each drawn token; made anew from all tokens it must be equal to one that was told them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from penstock.core.plan import NewRequest
from penstock.spec import SamplingParams


class LogitsRule(Protocol):
    """One request's wish. Lives on the device of the logits; never waits for a value to reach the host."""

    def apply(self, logits_V: Tensor, length: int) -> None:
        """Changes the row in place; ``length`` tokens, prompt included, are known before this draw."""
        ...

    def append(self, token_1: Tensor) -> None:
        """Learns the token just drawn."""
        ...


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


def make_rules(request: NewRequest, vocab_size: int, device: torch.device) -> tuple[LogitsRule, ...]:
    """The rules of a request in the order in which they apply; empty for most requests.

    Ids outside the vocabulary have no logit to change and are left out.
    """
    params = request.params
    rules: list[LogitsRule] = []
    stop_ids = [token for token in request.stop_ids if token < vocab_size]
    if params.min_tokens and stop_ids:
        rules.append(MinTokens(_ids(stop_ids, device), request.prompt_len + params.min_tokens))
    bias = {token: value for token, value in (params.logit_bias or {}).items() if token < vocab_size}
    if bias:
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        rules.append(LogitBias(_ids(list(bias), device), values))
    return (*rules, *_penalties(params, request, vocab_size, device))


def _penalties(params: SamplingParams, request: NewRequest, vocab_size: int, device: torch.device) -> list[LogitsRule]:
    rules: list[LogitsRule] = []
    if params.repetition_penalty != 1.0:
        rules.append(RepetitionPenalty(params.repetition_penalty, _ids(request.tokens, device), vocab_size))
    if params.frequency_penalty or params.presence_penalty:
        output = _ids(request.tokens[request.prompt_len :], device)
        rules.append(CountPenalty(params.frequency_penalty, params.presence_penalty, output, vocab_size))
    return rules


def _ids(tokens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)
