"""The oracle through the whole engine: greedy tokens equal transformers', whatever the scheduler does."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import FAMILIES
from oracle import Reference, build_reference
from penstock.assemble import load_executor
from penstock.core.engine import Engine
from penstock.core.scheduler import Counters
from penstock.core.service import Submission, Update
from penstock.spec import EngineConfig, SamplingParams, Vocabulary

STEPS, MARGIN = 64, 1e-3

WAYS = {
    "chunk 1": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "chunk 7, overlap": {"max_num_batched_tokens": 7, "max_num_seqs": 4, "depth": 2},
    "chunk 64, tight pool": {"max_num_batched_tokens": 64, "max_num_seqs": 4, "tight": True},
    "whole, tight pool, overlap": {"max_num_batched_tokens": 512, "depth": 2, "block_size": 8, "tight": True},
}


def serve(
    reference: Reference,
    prompts: list[list[int]],
    *,
    tight: bool = False,
    backend: str = "torch",
    steps: int = STEPS,
    **options: object,
) -> tuple[list[list[int]], Counters]:
    """Greedy completions of prompts that arrive together; twice, so that the second time the prefixes are cached."""
    config = EngineConfig(
        device="cpu",
        backend=backend,
        dtype="float32",
        max_model_len=128,
        num_threads=1,
        kv_memory="256M",
        **options,  # type: ignore[arg-type]
    )
    loaded = load_executor(reference.folder, config, Vocabulary(size=reference.spec.vocab_size))
    setup = loaded.setup
    if tight:  # the scheduler is told of just enough blocks for one request and a half
        blocks = 3 * 128 // (2 * setup.block_size)
        setup = replace(setup, pools=tuple(replace(pool, blocks=blocks) for pool in setup.pools))
    got: dict[str, list[int]] = {}

    def deliver(updates: list[Update]) -> None:
        for update in updates:
            assert update.error is None, update.error
            got.setdefault(update.id, []).extend(update.tokens)

    loop = Engine(setup.scheduler(), loaded.executor, deliver, setup.depth)
    params = SamplingParams(temperature=0.0, max_tokens=steps)
    for turn in range(2):
        for i, prompt in enumerate(prompts):
            loop.post(Submission(id=f"{turn}.{i}", tokens=tuple(prompt), params=params, seed=0))
        while loop.busy:
            loop.launch(0.0)
            loop.land()
    loaded.executor.close()
    first, second = ([got[f"{turn}.{i}"] for i in range(len(prompts))] for turn in range(2))
    assert first == second or backend == "torch"
    return first + second, loop.scheduler.counters


def agreement(reference: Reference, prompt: list[int], tokens: list[int]) -> int:
    """Steps up to the reference's first near-tie, in a router or at the end; fails at a step that differs before it."""
    certain = max(0, reference.certain(prompt + tokens) - len(prompt) + 1)
    logits_TV = reference.logits(prompt + tokens)[len(prompt) - 1 : -1][:certain]
    top = logits_TV.topk(2, dim=-1)
    for step, (values, ids) in enumerate(zip(top.values, top.indices, strict=True)):
        if values[0] - values[1] < MARGIN:
            return step
        assert int(ids[0]) == tokens[step], f"step {step}: {tokens[step]}, transformers {int(ids[0])}"
    return len(logits_TV)


FAST = ("llama", "gemma3_text", "gpt_oss")


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_greedy_tokens_whatever_the_scheduler_does(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rng = random.Random(f"engine {family}")
    reached, events = [], Counters()
    for index, options in enumerate(WAYS.values()):
        reference = build_reference(family, rng, tmp_path / str(index))
        stem = reference.tokens(rng, 33)
        prompts = [stem[:cut] + reference.tokens(rng, extra) for cut, extra in ((33, 3), (33, 20), (20, 1), (0, 40))]
        answers, counters = serve(reference, prompts, **options)  # type: ignore[arg-type]
        events.preemptions += counters.preemptions
        events.prefix_hit_tokens += counters.prefix_hit_tokens
        for prompt, tokens in zip(prompts * 2, answers, strict=True):
            assert len(tokens) == STEPS
            reached.append(agreement(reference, prompt, tokens))
    share = sum(steps == STEPS for steps in reached) / len(reached)
    print(f"{family}: {share:.0%} of {len(reached)} runs reach {STEPS} steps; {events}")
    assert share >= 0.9
    assert events.prefix_hit_tokens and events.preemptions


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text"])
def test_windows_keep_one_answer(family: str, tmp_path: Path) -> None:
    """On ``ref`` a model with windowed layers gives the same tokens in every way, cached or not."""
    rng = random.Random(f"windows {family}")
    window: dict[str, object] = {"sliding_window": 20}
    if family == "qwen2":  # the first layer sees everything, the others slide: two KV groups
        window |= {"use_sliding_window": True, "max_window_layers": 1}
    reference = build_reference(family, rng, tmp_path, **window)  # Gemma 3: a rope for each of the groups, too
    assert 20 in reference.spec.windows
    stem = reference.tokens(rng, 50)
    prompts = [stem[:cut] + reference.tokens(rng, extra) for cut, extra in ((50, 3), (50, 9), (37, 1), (0, 30))]
    answers = [serve(reference, prompts, backend="ref", steps=24, **options)[0] for options in WAYS.values()]  # type: ignore[arg-type]
    assert all(answer == answers[0] for answer in answers)
