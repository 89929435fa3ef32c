"""``Ops.draw``: where it decides, it draws what the sampler's exact arithmetic does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.plan import NewRequest
from penstock.kernels import UNDECIDED, Draw, make_ops, native
from penstock.sampling import Sampler
from penstock.spec import SamplingParams

pytestmark = pytest.mark.skipif(not native(), reason="installed without a compiler")


def kernel() -> Draw:
    draw = make_ops("cpu").draw
    assert draw is not None
    return draw


class Watched:
    """Attributes:
    drawn, left: rows asked for and rows left undecided.
    """

    def __init__(self) -> None:
        self.kernel, self.drawn, self.left = kernel(), 0, 0

    def __call__(self, logits_RV: Tensor, limits_R5: Tensor, sites_R5: Tensor) -> Tensor:
        tokens_R = self.kernel(logits_RV, limits_R5, sites_R5)
        self.drawn += len(tokens_R)
        self.left += int((tokens_R == UNDECIDED).sum())
        return tokens_R


def rows_of_logits(rng: random.Random, rows: int) -> Tensor:
    """Flat and steep, with ties, forbidden tokens and a few that stand out."""
    size, scale = rng.choice([3, 37, 64, 100, 512, 1000, 4097, 20_000]), rng.choice([0.01, 1, 4, 30, 1000])
    logits_RV = torch.randn(rows, size, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * scale
    if rng.random() < 0.3:
        logits_RV = logits_RV.round()
    if rng.random() < 0.05:
        logits_RV[torch.rand(rows, size) < 0.5] = rng.choice([-torch.inf, torch.inf, torch.nan])
    if rng.random() < 0.2:
        logits_RV[:, :5] += 10 * scale
    return logits_RV


def params(rng: random.Random, size: int) -> SamplingParams:
    some = [token for token in range(size) if rng.random() < 0.5] or [0]
    return SamplingParams(
        allowed_token_ids=some if rng.random() < 0.2 else None,
        temperature=rng.choice([0.0, 1e-4, 0.3, 0.8, 1.0, 2.0, 50.0]),
        top_p=rng.choice([1.0, 1.0, 0.999, 0.95, 0.5, 0.01]),
        top_k=rng.choice([0, 0, 1, 5, 20, 64, 300]),
        min_p=rng.choice([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
        typical_p=rng.choice([1.0] * 9 + [0.5]),
    )


def draw(sampler: Sampler, logits_RV: Tensor, asked: list[SamplingParams], rng: random.Random) -> list[int]:
    for row, request in enumerate(asked):
        seed, sample = rng.randrange(-(2**63), 2**64), rng.randrange(4)
        new = NewRequest(
            id=row,
            tokens=(1,),
            prompt_len=1,
            tables=((0,),),
            params=request,
            seed=seed,
            sample=sample,
            stop_ids=(),
            limit=2**20,
        )
        sampler.place(row, new)
    positions = np.array([rng.randrange(1, 2**20) for _ in asked])
    codes: list[int] = sampler.draw(logits_RV.clone(), np.arange(len(asked)), positions).codes_R.tolist()
    return codes


@torch.inference_mode()
def test_draws_are_those_of_the_sampler() -> None:
    rng, watched = random.Random(0), Watched()
    for case in range(300):
        logits_RV = rows_of_logits(rng, rng.randint(1, 6))
        size = logits_RV.shape[1]
        asked = [params(rng, size) for _ in logits_RV]
        answers = [
            draw(Sampler(8, size, torch.device("cpu"), **options), logits_RV, asked, random.Random(case))  # type: ignore[arg-type]
            for options in ({"kernel": watched}, {})
        ]
        assert answers[0] == answers[1], asked
    assert watched.left < 0.15 * watched.drawn, (watched.left, watched.drawn)


@torch.inference_mode()
@pytest.mark.parametrize(
    "asked",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        SamplingParams(temperature=1.0, top_p=0.95),
        SamplingParams(temperature=1.0, min_p=0.05),
    ],
    ids=["greedy", "open", "top-k and top-p", "top-p", "min-p"],
)
def test_a_large_vocabulary_is_decided(asked: SamplingParams) -> None:
    """As models make them: a few hundred likely tokens before a long tail."""
    generator, watched = torch.Generator().manual_seed(1), Watched()
    logits_RV = torch.randn(40, 50_000, generator=generator) * 2
    logits_RV[:, ::200] += 12
    sampler, exact = (Sampler(40, 50_000, torch.device("cpu"), **k) for k in ({"kernel": watched}, {}))  # type: ignore[arg-type]
    everyone = [asked] * len(logits_RV)
    assert draw(sampler, logits_RV, everyone, random.Random(2)) == draw(exact, logits_RV, everyone, random.Random(2))
    assert watched.left == 0


def limits(*rest: float) -> Tensor:
    """Of one row, with what is not given off."""
    return torch.tensor([[*rest, *(1.0, -torch.inf, torch.inf, 1e9, 0.0)[len(rest) :]]], dtype=torch.float64)


@torch.inference_mode()
@pytest.mark.parametrize("size", [3, 64, 65, 1000])
@pytest.mark.parametrize("wrong", [torch.inf, torch.nan, -torch.inf])
def test_rows_that_are_not_finite_are_left(size: int, wrong: float) -> None:
    """But for -inf, if it may be a rule's; wherever it stands in a vector or in the row's end."""
    logits_RV = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    logits_RV.diagonal().fill_(wrong)
    sites_R5 = torch.ones(size, 5, dtype=torch.int64)
    for ruled in (0.0, 1.0):
        limits_R5 = limits(1.0, -torch.inf, torch.inf, 1e9, ruled).expand(size, 5).contiguous()
        left_R = kernel()(logits_RV, limits_R5, sites_R5) == UNDECIDED
        assert left_R.any() == (wrong != -torch.inf or not ruled) and left_R.all() == left_R.any()
    nothing_1V = torch.full((1, size), -torch.inf)
    assert kernel()(nothing_1V, limits(0.0, -torch.inf, torch.inf, 1e9, 1.0), sites_R5[:1]).tolist() == [UNDECIDED]


@torch.inference_mode()
def test_denormal_logits_count() -> None:
    logits_RV = torch.tensor([[0.0, 1e-40, 0.0]])
    assert kernel()(logits_RV, limits(0.0), torch.ones(1, 5, dtype=torch.int64)).tolist() == [1]
