"""Thinking budgets: a reasoning model's thoughts are brought to an end, gently first and then by force.

Thoughts stand between two sequences of tokens, such as ``<think>`` and ``</think>``. Each token after the first one
counts, whether the model or the prompt's template opened them; thoughts that the prompt also closed do not. In the last
part of the budget the next token of the end gets a growing bias (soft close). When the budget is spent, nothing can be
drawn but what closes them: the rest of an end that was begun, else the closing text and the whole end (hard close).
What follows is free, until the model opens thoughts again: what is left of the budget is then for those.

The state is that of a small automaton over token ids, a function of the tokens so far alone. It lives on the device of
the logits, so that no draw waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.base import InvalidRequest
from penstock.core.plan import NewRequest

SOFT_BIAS = 16.0
"""Added to a logit at the very end of the budget; less, in proportion, before."""


@dataclass(frozen=True, slots=True)
class Automaton:
    """States are numbered: outside, with so many tokens of ``start`` just seen; inside, likewise of ``end``; closing,
    with so many of ``closing`` written.

    Attributes:
        start, end: token ids around thoughts.
        closing: what is written when the budget is spent; it ends with ``end``.
        budget: most tokens of thoughts.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    closing: tuple[int, ...]
    budget: int

    @property
    def entry(self) -> int:
        """Inside, with nothing of the end seen."""
        return len(self.start)

    @property
    def first_closing(self) -> int:
        return len(self.start) + len(self.end)

    @property
    def targets(self) -> tuple[int, ...]:
        """For each state the next token of the sequence it is about."""
        return (*self.start, *self.end, *self.closing)

    def inside(self, state: int) -> bool:
        return self.entry <= state < self.first_closing

    def following(self, state: int, token: int) -> int:
        """The state after a token, whatever the budget."""
        if state < self.entry:
            seen = _matched(self.start, state, token)
            return self.entry if seen == len(self.start) else seen
        if state >= self.first_closing and token == self.targets[state]:
            return state + 1 if state + 1 < len(self.targets) else 0
        seen = _matched(self.end, state - self.entry if self.inside(state) else 0, token)
        return 0 if seen == len(self.end) else self.entry + seen

    def step(self, state: int, spent: int, token: int) -> tuple[int, int]:
        """State and tokens spent after an output token."""
        return self.due(self.following(state, token), spent + self.inside(state))

    def due(self, state: int, spent: int) -> tuple[int, int]:
        """Inside with nothing left, it is time to close; an end that was begun is gone on with instead."""
        return (self.first_closing if state == self.entry and spent >= self.budget else state), spent

    def after(self, prompt: Iterable[int], output: Iterable[int]) -> tuple[int, int]:
        """State and tokens spent after all of these."""
        state = spent = 0
        for token in prompt:
            spent += self.inside(state)
            state = self.following(state, token)
            spent = spent if self.inside(state) else 0
        state, spent = self.due(state, spent)
        for token in output:
            state, spent = self.step(state, spent, token)
        return state, spent


def _matched(pattern: Sequence[int], seen: int, token: int) -> int:
    """Length of the longest beginning of ``pattern`` that ends its first ``seen`` tokens followed by ``token``."""
    tail = (*pattern[:seen], token)
    return next(n for n in range(len(tail), -1, -1) if tail[len(tail) - n :] == tuple(pattern[:n]))


class ThinkingBudget:
    """The rule of one request.

    Args:
        soft: share of the budget in which the bias grows.
    """

    def __init__(
        self,
        automaton: Automaton,
        prompt: Sequence[int],
        output: Sequence[int],
        *,
        soft: float,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        tokens = sorted(set(automaton.targets))
        if tokens[-1] >= vocab_size:
            what = f"A thinking tag has token id {tokens[-1]}"
            raise InvalidRequest("token_out_of_range", what, why=f"the vocabulary has ids 0 to {vocab_size - 1}")
        states = range(len(automaton.targets))
        # Tokens of no sequence are alike, so one column of the table does for all of them.
        table = [[automaton.following(state, token) for token in (-1, *tokens)] for state in states]
        self.next_SC = torch.tensor(table, device=device)
        self.column_V = torch.zeros(vocab_size, dtype=torch.int16, device=device)
        self.column_V[tokens] = torch.arange(1, len(tokens) + 1, dtype=torch.int16, device=device)
        self.target_S = torch.tensor(automaton.targets, device=device)
        self.inside_S = torch.tensor([automaton.inside(state) for state in states], device=device)
        state, spent = automaton.after(prompt, output)
        self.state_1 = torch.tensor([state], device=device)
        self.spent_1 = torch.tensor([spent], device=device)
        self.entry, self.first_closing, self.budget = automaton.entry, automaton.first_closing, automaton.budget
        self.soft = max(1.0, soft * automaton.budget)

    def apply(self, logits_V: Tensor, length: int) -> None:
        target_1, inside_1 = self.target_S[self.state_1], self.inside_S[self.state_1]
        over_1 = self.spent_1 >= self.budget
        forced_1 = (self.state_1 >= self.first_closing) | (inside_1 & over_1)
        nearness_1 = 1.0 - (self.budget - self.spent_1) / self.soft
        bias_1 = torch.where(inside_1, SOFT_BIAS * nearness_1.clamp(0.0, 1.0), 0.0)
        logits_V.index_add_(0, target_1, bias_1.to(logits_V.dtype))
        only_V = torch.full_like(logits_V, -torch.inf).index_fill_(0, target_1, 0.0)
        torch.where(forced_1, only_V, logits_V, out=logits_V)

    def append(self, token_1: Tensor) -> None:
        self.spent_1 = self.spent_1 + self.inside_S[self.state_1]
        state_1 = self.next_SC[self.state_1, self.column_V[token_1].long()]
        due_1 = (state_1 == self.entry) & (self.spent_1 >= self.budget)
        self.state_1 = torch.where(due_1, self.first_closing, state_1)


def thinking_rule(request: NewRequest, vocab_size: int, device: torch.device) -> ThinkingBudget | None:
    """The rule a request asks for; None if it sets no budget.

    Raises:
        InvalidRequest: no_thinking_tags, token_out_of_range.
    """
    params, at = request.params, request.prompt_len
    if params.thinking_budget is None:
        return None
    if len(params.thinking_ids) != 3:
        raise InvalidRequest(
            "no_thinking_tags",
            "A thinking budget needs to know how thoughts begin and end",
            why="thinking_ids are not set",
            fix="submit the request through LLM, AsyncLLM or the server, which know the tokenizer",
        )
    start, end, closing = map(tuple, params.thinking_ids)
    automaton = Automaton(start, end, closing, params.thinking_budget)
    tokens = request.tokens
    return ThinkingBudget(
        automaton, tokens[:at], tokens[at:], soft=params.thinking_soft, vocab_size=vocab_size, device=device
    )
