"""Steps that raise and logits that are no numbers: who is guilty fails, and the others answer as if undisturbed."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from penstock.assemble import Assembled, build_engine
from penstock.core.plan import StepPlan
from penstock.core.service import Submission, Update
from penstock.llm.requests import Requests
from penstock.runtime.local import Launched, StepRunner
from penstock.spec import EngineConfig, SamplingParams, StructuredOutputs

GUILTY = 10**6
"""Requests of this seed and above are at fault."""


class Failpoint:
    """Carries out a model's steps. With a guilty request, from some token of it on, they raise, computed or not."""

    def __init__(self, runner: StepRunner, seed: int) -> None:
        self.runner, self.dice = runner, random.Random(seed)
        self.guilty: dict[int, int] = {}  # and the position from which it is
        self.raised = 0

    def launch(self, plan: StepPlan) -> Launched:
        for new in plan.new:
            if new.seed >= GUILTY:
                self.guilty.setdefault(new.id, new.prompt_len + self.dice.randint(-3, 12))
        at_fault = any(start + count > self.guilty.get(id, 1 << 30) for id, start, count in plan.slices)
        late = self.dice.random() < 0.5
        if not at_fault or late:
            launched = self.runner.launch(plan)
        if at_fault:
            self.raised += 1
            raise ValueError("a fault of one request")
        return launched


@pytest.fixture(scope="module")
def engine() -> Iterator[Assembled]:
    engine = build_engine(EngineConfig(num_threads=1, max_num_batched_tokens=64, max_model_len=256, kv_memory="4M"))
    yield engine
    engine.close()


def requests(engine: Assembled, guilty: tuple[int, ...]) -> list[Submission]:
    make, jobs = Requests(engine, next_seed=lambda: 0), []
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 2},
        {"frequency_penalty": 0.8, "repetition_penalty": 1.2},
        {"n": 3, "logprobs": 0},
        {"structured_outputs": StructuredOutputs(regex="[a-z]{5,40}")},
    ]
    for i in range(24):
        params = SamplingParams(seed=i + GUILTY * (i in guilty), max_tokens=16 + i % 5, **kinds[i % 4])
        prompt = make.tokenize(f"Chapter {i}. There was once" + " a house by the sea" * (i % 3))
        jobs.append(make.job(prompt, params, request_id=str(i)).submission)
    return jobs


def answers(engine: Assembled, submissions: list[Submission]) -> dict[tuple[str, int], tuple[Any, ...]]:
    news: queue.SimpleQueue[Update] = queue.SimpleQueue()
    for submission in submissions:
        engine.service.submit(submission, news.put)
    said: dict[tuple[str, int], tuple[Any, ...]] = {}
    ended, samples = 0, sum(submission.params.n for submission in submissions)
    while ended < samples:
        update = news.get(timeout=60)
        tokens, logprobs, _ = said.get((update.id, update.sample), ((), (), None))
        code = update.error.code if update.error else update.finish_reason
        said[update.id, update.sample] = tokens + update.tokens, logprobs + update.logprobs, code
        ended += update.finish_reason is not None
    return said


@pytest.fixture(scope="module")
def undisturbed(engine: Assembled) -> dict[tuple[str, int], tuple[Any, ...]]:
    return answers(engine, requests(engine, ()))


def check(
    disturbed: dict[tuple[str, int], tuple[Any, ...]],
    undisturbed: dict[tuple[str, int], tuple[Any, ...]],
    guilty: tuple[int, ...],
    code: str,
) -> None:
    for key, answer in undisturbed.items():
        if int(key[0]) in guilty:
            assert disturbed[key][2] == code
        else:
            assert disturbed[key] == answer


@pytest.mark.parametrize(("seed", "guilty"), [(0, (0,)), (1, (7,)), (2, (23, 8)), (3, (2, 10, 17))])
def test_a_step_that_raises_fails_only_who_is_guilty(
    engine: Assembled, undisturbed: Any, seed: int, guilty: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    failpoint = Failpoint(engine.executor.runner, seed)  # type: ignore[union-attr]
    monkeypatch.setattr(engine.executor, "runner", failpoint)
    check(answers(engine, requests(engine, guilty)), undisturbed, guilty, "step_failed")
    samples = sum(3 if i % 4 == 2 else 1 for i in guilty)
    assert samples <= failpoint.raised <= 7 * samples
    assert engine.service.status().blocks_used == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("guilty", [(5,), (0, 10, 19)])
def test_logits_that_are_no_numbers_fail_only_their_request(
    engine: Assembled, undisturbed: Any, guilty: tuple[int, ...], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry of a row, after some tokens. Nothing is drawn from it."""
    sampler: Any = engine.executor.runner.sampler  # type: ignore[union-attr]
    place, draw, spoiled, draws = sampler.place, sampler.draw, dict[int, int](), [0]

    def placed(row: int, new: Any) -> None:
        place(row, new)
        spoiled.pop(row, None)
        if new.seed >= GUILTY:
            spoiled[row] = new.prompt_len + 4

    def drawn(logits_RV: torch.Tensor, rows: Any, positions: Any) -> Any:
        for r, row in enumerate(rows.tolist()):
            if positions[r] >= spoiled.get(row, 1 << 30):
                logits_RV[r, 11] = value
                draws[0] += 1
        return draw(logits_RV, rows, positions)

    monkeypatch.setattr(sampler, "place", placed)
    monkeypatch.setattr(sampler, "draw", drawn)
    said = answers(engine, requests(engine, guilty))
    check(said, undisturbed, guilty, "numerical_error")
    assert all(len(said[str(i), 0][0]) == 4 for i in guilty) and draws[0]
    assert engine.service.status().blocks_used == 0
