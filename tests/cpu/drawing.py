"""Requests, rows of logits and draws of them, for the tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from penstock.core.plan import NewRequest
from penstock.sampling import Drawn, RuleKit, Sampler, blocks, make_rules
from penstock.spec import SamplingParams, TokenLogprobs

CPU = torch.device("cpu")


def request(
    tokens: Sequence[int] = (1, 2, 3),
    prompt_len: int = 2,
    seed: int = 0,
    sample: int = 0,
    stop: Sequence[int] = (),
    **params: Any,
) -> NewRequest:
    return NewRequest(
        id=0,
        tokens=tuple(tokens),
        prompt_len=prompt_len,
        tables=(),
        params=SamplingParams(**params),
        seed=seed,
        sample=sample,
        stop_ids=tuple(stop),
        limit=len(tokens) + 64,
    )


def draw(
    logits_RV: torch.Tensor, requests: Sequence[NewRequest], chunk: int = 1 << 16, kit: RuleKit | None = None
) -> Drawn:
    sampler = Sampler(len(requests), logits_RV.shape[1], CPU, chunk, kit)
    for row, new in enumerate(requests):
        sampler.place(row, new)
    positions = np.array([len(new.tokens) for new in requests])
    return sampler.draw(logits_RV.clone(), np.arange(len(requests)), positions)


def kept(logits_RV: torch.Tensor, **params: Any) -> list[set[int]]:
    """Of each row the tokens that filters leave."""
    rows = np.arange(len(logits_RV))
    sampler = Sampler(len(rows), logits_RV.shape[1], CPU)
    for row in rows:
        sampler.place(row, request(**params))
    found = sampler._candidates(int(sampler.kind[0]), logits_RV, blocks.maxima(logits_RV), rows)
    assert len(found.rows_N) == len({*zip(found.rows_N.tolist(), found.tokens_N.tolist(), strict=True)})
    return [set(found.tokens_N[found.rows_N == row].tolist()) for row in rows]


def apply_rules(new: NewRequest, logits_V: torch.Tensor, kit: RuleKit | None = None) -> torch.Tensor:
    out = logits_V.clone()
    for rule in make_rules(new, len(logits_V), CPU, kit):
        rule.apply(out, len(new.tokens))
    return out


def logprobs(drawn: Drawn) -> dict[int, TokenLogprobs]:
    return drawn.logprobs.entries(drawn.logprobs.columns) if drawn.logprobs else {}


def random_logits(seed: int, rows: int, vocab_size: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
