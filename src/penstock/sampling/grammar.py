"""Structured outputs at the draw: a grammar's mask over the logits, and its word on the token drawn."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from penstock.core.plan import NewRequest
from penstock.grammar import Grammars, Matcher

MAX_REFUSALS = 4
"""Draws of one position that may be refused before the token is the known ending's."""


class GrammarRule:
    """Only tokens that the grammar allows. State lives here, beside the sampler; it needs each token on the host, so it
    waits for the one before at the next draw and not when that was drawn.
    """

    def __init__(self, matcher: Matcher, device: torch.device) -> None:
        self.matcher, self.device = matcher, device
        self._drawn: Tensor | None = None
        self._refusals = 0

    def apply(self, logits_V: Tensor, length: int) -> None:
        if self._drawn is not None:
            self.matcher.advance(int(self._drawn))
            self._drawn = None
        self._refusals = 0
        allowed_V = torch.from_numpy(self.matcher.mask(len(logits_V))).to(self.device, non_blocking=True)
        logits_V.masked_fill_(~allowed_V, -torch.inf)

    def append(self, token_1: Tensor) -> None:
        self._drawn = token_1

    @property
    def vets(self) -> bool:
        """The token to be drawn must be shown to ``admits``."""
        return self.matcher.looks

    def admits(self, token: int) -> bool:
        """Whether the token drawn may stand. If not, ``refuse`` it and draw again."""
        return self.matcher.admits(token)

    def refuse(self, logits_V: Tensor, token: int) -> None:
        """Takes a token out of the row; after some of them, everything but the start of a known ending."""
        self._refusals += 1
        forced = self.matcher.next_token() if self._refusals == MAX_REFUSALS else None
        if forced is None or forced == token:
            logits_V[token] = -torch.inf
        else:
            kept = logits_V[forced].clone()
            logits_V.fill_(-torch.inf)
            logits_V[forced] = kept


def grammar_rule(
    request: NewRequest, grammars: Grammars, eos_ids: Collection[int], device: torch.device
) -> GrammarRule:
    """The rule of a request with ``structured_outputs``, its state rebuilt from the tokens it has emitted.

    Raises:
        InvalidRequest: as ``Grammars.compile``; only if it was not compiled before it was submitted.
    """
    wanted = request.params.structured_outputs
    assert wanted is not None
    end_ids = (*request.stop_ids, *sorted(set(eos_ids).difference(request.stop_ids)))
    matcher = Matcher(grammars.compile(wanted), request.limit - request.prompt_len, end_ids)
    for token in request.tokens[request.prompt_len :]:
        matcher.advance(token)
    return GrammarRule(matcher, device)
