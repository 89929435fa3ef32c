"""What a request asks of its logits before temperature, in vLLM's order: masks, bias, penalties; then what is final.

A rule is a function of (tokens so far, logits row). One that counts keeps its counts beside the row and is told
each drawn token; made anew from all tokens it must be equal to one that was told them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.base import PenstockError
from penstock.core.plan import NewRequest
from penstock.sampling.custom import FunctionRule, RuleFactory, made_by
from penstock.sampling.dry import Dry
from penstock.sampling.masks import AllowedTokens, BadWords, LogitBias, MinTokens
from penstock.sampling.penalties import CountPenalty, RepetitionPenalty
from penstock.sampling.thinking import thinking_rule
from penstock.spec.rule_places import unknown_rule


class LogitsRule(Protocol):
    """One request's wish. Lives on the device of the logits.

    A PenstockError that it raises ends its request alone. Rules of plain parameters never wait for a value to reach
    the host.
    """

    def apply(self, logits_V: Tensor, length: int) -> None:
        """Changes the row in place; ``length`` tokens, prompt included, are known before this draw."""
        ...

    def append(self, token_1: Tensor) -> None:
        """Learns the token just drawn."""
        ...


@runtime_checkable
class VettingRule(Protocol):
    """What a LogitsRule has besides if it cannot say beforehand of all tokens whether they may stand."""

    @property
    def vets(self) -> bool:
        """At this draw the token must be shown to ``admits``."""
        ...

    def admits(self, token: int) -> bool: ...

    def refuse(self, logits_V: Tensor, token: int) -> None:
        """Takes a token out of the row, or all but one, before another is drawn."""
        ...


RuleMaker = Callable[[NewRequest], LogitsRule | None]
"""Makes the rule that a request asks for, if it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleKit:
    """What an engine makes rules of beyond the parameters of a request.

    Attributes:
        factories: rules that people brought, by name.
        final: rules that come after all others, so that nothing undoes them: grammars.
    """

    factories: Mapping[str, RuleFactory] = field(default_factory=dict)
    final: tuple[RuleMaker, ...] = ()


class Broken:
    """In place of the rules of a request for which they could not be made."""

    def __init__(self, error: PenstockError) -> None:
        self.error = error

    def apply(self, logits_V: Tensor, length: int) -> None:
        raise self.error

    def append(self, token_1: Tensor) -> None:
        pass


def make_rules(
    request: NewRequest, vocab_size: int, device: torch.device, kit: RuleKit | None = None
) -> tuple[LogitsRule, ...]:
    """The rules of a request in the order in which they apply; empty for most requests.

    Ids outside the vocabulary have no logit to change and are left out.
    """
    kit = kit or RuleKit()
    try:
        return (
            *_masks(request, vocab_size, device),
            *_custom(request, kit),
            *_penalties(request, vocab_size, device),
            *filter(None, [thinking_rule(request, vocab_size, device)]),
            *(rule for make in kit.final if (rule := make(request)) is not None),
        )
    except PenstockError as error:
        return (Broken(error),)


def _masks(request: NewRequest, vocab_size: int, device: torch.device) -> list[LogitsRule]:
    params = request.params
    rules: list[LogitsRule] = []
    if params.allowed_token_ids is not None:
        rules.append(AllowedTokens(_ids(_inside(params.allowed_token_ids, vocab_size), device), vocab_size))
    if words := [ids for ids in params.bad_words_ids if max(ids) < vocab_size]:
        rules.append(BadWords(words, _ids(request.tokens[request.prompt_len :], device)))
    stop_ids = _inside(request.stop_ids, vocab_size)
    if params.min_tokens and stop_ids:
        rules.append(MinTokens(_ids(stop_ids, device), request.prompt_len + params.min_tokens))
    bias = {token: value for token, value in (params.logit_bias or {}).items() if token < vocab_size}
    if bias:
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        rules.append(LogitBias(_ids(list(bias), device), values))
    return rules


def _custom(request: NewRequest, kit: RuleKit) -> list[LogitsRule]:
    rules: list[LogitsRule] = []
    for name, arguments in (request.params.logits_rules or {}).items():
        if name not in kit.factories:
            raise unknown_rule(name, kit.factories)
        rules.append(made_by(name, kit.factories[name], arguments, request))
    for function in request.params.logits_processors or ():
        rules.append(FunctionRule(getattr(function, "__name__", type(function).__name__), function, request))
    return rules


def _penalties(request: NewRequest, vocab_size: int, device: torch.device) -> list[LogitsRule]:
    params = request.params
    rules: list[LogitsRule] = []
    if params.repetition_penalty != 1.0:
        rules.append(RepetitionPenalty(params.repetition_penalty, _ids(request.tokens, device), vocab_size))
    if params.frequency_penalty or params.presence_penalty:
        output = _ids(request.tokens[request.prompt_len :], device)
        rules.append(CountPenalty(params.frequency_penalty, params.presence_penalty, output, vocab_size))
    if params.dry:
        rules.append(
            Dry(
                request.tokens,
                request.limit,
                multiplier=params.dry_multiplier,
                base=params.dry_base,
                allowed=params.dry_allowed_length,
                last_n=None if params.dry_penalty_last_n < 0 else params.dry_penalty_last_n,
                breakers=[ids for ids in params.dry_breaker_ids if max(ids) < vocab_size],
                vocab_size=vocab_size,
                device=device,
            )
        )
    return rules


def _inside(ids: Sequence[int], vocab_size: int) -> list[int]:
    return [token for token in ids if token < vocab_size]


def _ids(tokens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)
