"""What a request was given and what it was answered, for the inspector, where the operator has it kept."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from penstock.serving.limits import MAX_KEPT_TOKENS
from penstock.spec import SamplingParams
from penstock.text import Delta, Tokenizer


class KeptToken(msgspec.Struct, kw_only=True):
    """``logprob``: natural, under the raw softmax, before temperature and rules."""

    token: str
    logprob: float


class KeptTexts(msgspec.Struct, kw_only=True):
    """Of a request's first prompt, after the template, the last 4096 tokens; of its first answer the first 4096."""

    prompt: list[str]
    tokens: list[KeptToken]


@dataclass(slots=True)
class Texts:
    """In the making. ``asked``: its client asked for log-probabilities; else they are taken out of its answer."""

    tokenizer: Tokenizer
    prompt: Sequence[int]
    asked: bool
    tokens: array[int] = field(default_factory=lambda: array("I"))
    logprobs: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> Texts:
        return cls(tokenizer, array("I", prompt[-MAX_KEPT_TOKENS:]), params.logprobs is not None)

    def params(self, params: SamplingParams) -> SamplingParams:
        """The same, with the log-probability of each token; which tokens are drawn does not depend on that."""
        return params if self.asked else replace(params, logprobs=0)

    def add(self, delta: Delta) -> None:
        if delta.index == 0:
            for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=False):
                if len(self.tokens) < MAX_KEPT_TOKENS:
                    self.tokens.append(token)
                    self.logprobs.append(entry[token].logprob)
        if not self.asked:
            delta.logprobs = None

    def shown(self) -> KeptTexts:
        text = self.tokenizer.token_text
        told = zip(self.tokens, self.logprobs, strict=True)
        tokens = [KeptToken(token=text(token), logprob=logprob) for token, logprob in told]
        return KeptTexts(prompt=[text(token) for token in self.prompt], tokens=tokens)
