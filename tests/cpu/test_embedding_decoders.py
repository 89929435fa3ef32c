"""Vectors and prompt log-probabilities of decoders: against transformers, and bits that know no scheduler."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoder_models import write_json
from oracle import TOLERANCE, Reference, build_reference, error
from penstock.assemble import load_executor
from penstock.core.engine import Engine
from penstock.core.service import Submission, Task, Update
from penstock.kernels import Batch, Forward
from penstock.runtime.pooling import Vector
from penstock.spec import EngineConfig, ModelSpec, SamplingParams, TokenLogprobs, Vocabulary
from penstock.spec.encoder import read_any_spec
from penstock.spec.pooling import read_pooling

WAYS: dict[str, dict[str, object]] = {
    "whole": {"max_num_batched_tokens": 512},
    "chunk 1": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "chunk 7, overlap, tight pool": {"max_num_batched_tokens": 7, "max_num_seqs": 4, "depth": 2, "tight": True},
    "chunk 64, tight pool": {"max_num_batched_tokens": 64, "max_num_seqs": 5, "block_size": 8, "tight": True},
}
MAX_LEN = 64


@dataclass
class Answer:
    """All that was told of one submission."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    vector: tuple[float, ...] | None = None
    reason: str | None = None


def serve(
    reference: Reference,
    batch: Sequence[Submission],
    *,
    backend: str,
    tight: bool = False,
    flaky: bool = False,
    **options: object,
) -> tuple[dict[str, Answer], Counter[str]]:
    """Answers to submissions that arrive together; twice, so that the second time prefixes are cached.

    Args:
        flaky: most steps of several requests raise.
    """
    config = EngineConfig(
        device="cpu",
        backend=backend,  # type: ignore[arg-type]
        dtype="float32",
        max_model_len=MAX_LEN,
        num_threads=1,
        kv_memory="256M",
        **options,  # type: ignore[arg-type]
    )
    loaded = load_executor(reference.folder, config, Vocabulary(size=reference.spec.vocab_size))
    setup = loaded.setup
    if tight:  # the scheduler is told of just enough blocks for the longest request and its chunk
        seen = [min(MAX_LEN, (pool.window or MAX_LEN) + config.max_num_batched_tokens) for pool in setup.pools]
        blocks = [-(-length // setup.block_size) + 1 for length in seen]
        setup = replace(setup, pools=tuple(replace(p, blocks=n) for p, n in zip(setup.pools, blocks, strict=True)))
    if flaky:
        runner, rng = loaded.executor.runner, random.Random(0)  # type: ignore[attr-defined]
        runner.forward = Flaky(runner.forward, rng)
    answers: dict[str, Answer] = {}

    def deliver(updates: list[Update]) -> None:
        for update in updates:
            assert update.error is None, update.error
            answer = answers.setdefault(f"{update.id}.{update.sample}", Answer())
            assert answer.reason is None
            answer.tokens += update.tokens
            answer.logprobs += update.logprobs
            answer.prompt += update.prompt_logprobs
            answer.vector, answer.reason = update.vector, update.finish_reason

    loop = Engine(setup.scheduler(), loaded.executor, deliver, setup.depth)
    for turn in range(2):
        for submission in batch:
            loop.post(replace(submission, id=f"{turn}.{submission.id}"))
        while loop.busy:
            loop.launch(0.0)
            loop.land()
    loaded.executor.close()
    counters = loop.scheduler.counters
    first, second = ({key[2:]: answer for key, answer in answers.items() if key[0] == turn} for turn in "01")
    assert len(first) == sum(submission.params.n for submission in batch)
    assert first == second or backend == "torch"
    return first, Counter(
        preemptions=counters.preemptions, hits=counters.prefix_hit_tokens, failures=counters.failed_steps
    )


@dataclass
class Flaky:
    """Raises now and then, after K and V were written."""

    forward: Forward
    rng: random.Random

    def __call__(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ends = self.forward(ids_T, batch)
        if len(batch.contexts) > 1 and self.rng.random() < 0.6:
            raise ValueError("a cosmic ray")
        return ends


def submissions(reference: Reference, rng: random.Random) -> list[Submission]:
    """Vectors, prompts to report and plain generations, most with the same beginning."""
    stem = reference.tokens(rng, 33)
    kinds: list[tuple[Task, int, int, SamplingParams]] = [
        ("mean", 33, 6, SamplingParams()),
        ("last", 33, 17, SamplingParams()),
        ("generate", 33, 3, SamplingParams(temperature=0.0, max_tokens=15, logprobs=1)),
        ("generate", 20, 5, SamplingParams(temperature=1.0, max_tokens=15, prompt_logprobs=3, logprobs=0, n=2)),
        ("mean", 0, 1, SamplingParams()),
        ("generate", 0, 30, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)),
        ("last", 0, MAX_LEN, SamplingParams()),
        ("mean", 0, MAX_LEN, SamplingParams()),
    ]
    return [
        Submission(id=str(i), tokens=(*stem[:cut], *reference.tokens(rng, extra)), params=params, seed=i, task=task)
        for i, (task, cut, extra, params) in enumerate(kinds)
    ]


def hidden(reference: Reference, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        out = reference.model(torch.tensor([list(tokens)]), output_hidden_states=True)
    return out.hidden_states[-1][0]


def check_vector(reference: Reference, submission: Submission, answer: Answer) -> None:
    rows_TD = hidden(reference, submission.tokens)
    expected_D = rows_TD.mean(0) if submission.task == "mean" else rows_TD[-1]
    assert answer.vector is not None and not answer.tokens and answer.reason == "stop"
    assert error(torch.tensor([answer.vector]), expected_D[None]) <= TOLERANCE


def check_prompt(reference: Reference, submission: Submission, answer: Answer) -> None:
    """Values within the tolerance of logits; ranks and the likeliest tokens wherever the reference is sure of them."""
    logits_TV = reference.logits(submission.tokens)[:-1]
    logprobs_TV, noise = logits_TV.log_softmax(-1), TOLERANCE * float(logits_TV.abs().max())
    assert len(answer.prompt) == len(logprobs_TV)
    for entry, token, row_V in zip(answer.prompt, submission.tokens[1:], logprobs_TV, strict=True):
        assert abs(entry.drawn - float(row_V[token])) <= noise
        low, high = (int((row_V > row_V[token] + shift).sum()) + 1 for shift in (noise, -noise))
        assert low <= entry.rank <= high
        assert len(entry.top) == submission.params.prompt_logprobs
        for (id, value), expected in zip(entry.top, row_V.topk(max(1, len(entry.top))).values.tolist(), strict=False):
            assert abs(value - expected) <= noise and abs(value - float(row_V[id])) <= noise


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_against_transformers(family: str, tmp_path: Path) -> None:
    rng = random.Random(f"vectors {family}")
    reference = build_reference(family, rng, tmp_path)
    batch = submissions(reference, rng)
    events: Counter[str] = Counter()
    for options in list(WAYS.values())[1:]:
        answers, happened = serve(reference, batch, backend="torch", **options)  # type: ignore[arg-type]
        events += happened
        for submission in batch:
            answer = answers[f"{submission.id}.0"]
            if submission.task != "generate":
                check_vector(reference, submission, answer)
            elif submission.params.prompt_logprobs is not None:
                check_prompt(reference, submission, answer)
    print(events)
    assert events["preemptions"] and events["hits"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_one_answer(family: str, tmp_path: Path) -> None:
    """On ``ref``: alone and whole, or among generations in any chunks, preempted, from a warm cache."""
    rng = random.Random(f"one answer {family}")
    small = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "vocab_size": 67,
    }
    window = {"sliding_window": 20} if family == "mistral" else {}
    reference = build_reference(family, rng, tmp_path, num_hidden_layers=2, **small, **window)
    batch = submissions(reference, rng)
    expected: dict[str, Answer] = {}
    for submission in batch:
        expected |= serve(reference, [submission], backend="ref", **WAYS["whole"])[0]  # type: ignore[arg-type]
    for submission in batch:
        if submission.task != "generate":
            check_vector(reference, submission, expected[f"{submission.id}.0"])
    assert all(not answer.prompt for key, answer in expected.items() if key.endswith(".1"))
    events: Counter[str] = Counter()
    for options in WAYS.values():
        answers, happened = serve(reference, batch, backend="ref", **options)  # type: ignore[arg-type]
        events += happened
        assert answers == expected
    print(events)
    assert events["preemptions"] and events["hits"]


def test_failed_steps_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sums that were under way begin anew, and what was reported is not reported again."""
    caplog.set_level("CRITICAL")
    rng = random.Random("flaky")
    reference = build_reference("qwen3", rng, tmp_path, hidden_size=24, head_dim=8, vocab_size=67)
    batch, options = submissions(reference, rng), {"max_num_batched_tokens": 24}
    expected, _ = serve(reference, batch, backend="ref", **options)  # type: ignore[arg-type]
    answers, events = serve(reference, batch, backend="ref", flaky=True, **options)  # type: ignore[arg-type]
    print(events)
    assert events["failures"] >= 3
    assert answers == expected


@pytest.mark.parametrize("task", ["mean", "last"])
def test_the_pooling_mutation_is_caught(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row taken one too early; a mean whose first row counts as the second."""
    rng = random.Random("mutation")
    reference = build_reference("llama", rng, tmp_path)
    batch = [s for s in submissions(reference, rng) if s.task == task and len(s.tokens) > 1][:1]
    honest = Vector.wanted

    def wanted(self: Vector, start: int, count: int, length: int) -> range:
        rows = honest(self, start, count, length)
        return range(max(1, rows.start), rows.stop) if task == "mean" else range(rows.start - 1, rows.stop - 1)

    def finish(self: Vector, length: int) -> tuple[float, ...]:
        return tuple((self._value / self.rows).tolist())  # type: ignore[operator]

    monkeypatch.setattr(Vector, "finish", finish)
    answers, _ = serve(reference, batch, backend="torch", **WAYS["whole"])  # type: ignore[arg-type]
    check_vector(reference, batch[0], answers[f"{batch[0].id}.0"])
    monkeypatch.setattr(Vector, "wanted", wanted)
    answers, _ = serve(reference, batch, backend="torch", **WAYS["whole"])  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        check_vector(reference, batch[0], answers[f"{batch[0].id}.0"])


def test_decoders_without_a_head(tmp_path: Path) -> None:
    """Saved as transformers' Qwen3Model: no head and no prefix; and a Qwen3ForCausalLM whose names lost the prefix."""
    rng = random.Random("headless")
    reference = build_reference("qwen3", rng, tmp_path / "whole", tie_word_embeddings=False)
    reference.model.model.save_pretrained(tmp_path / "bare")
    assert not any(
        name.startswith(("model.", "lm_head")) for name in load_file(tmp_path / "bare" / "model.safetensors")
    )
    spec = read_any_spec(tmp_path / "bare")
    assert isinstance(spec, ModelSpec) and read_pooling(tmp_path / "bare", spec).headless
    assert not read_pooling(reference.folder, reference.spec).headless
    batch = [s for s in submissions(reference, rng) if s.task == "last"]
    bare = Reference(tmp_path / "bare", reference.model, spec)
    for submission in batch:
        answers, _ = serve(bare, batch, backend="torch")
        check_vector(reference, submission, answers[f"{submission.id}.0"])

    tied = build_reference("qwen3", rng, tmp_path / "tied", tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): t for name, t in load_file(tied.folder / "model.safetensors").items()}
    save_file(tensors, tied.folder / "model.safetensors")
    batch = [s for s in submissions(tied, rng) if s.task == "mean"]
    answers, _ = serve(tied, batch, backend="torch")
    for submission in batch:
        check_vector(tied, submission, answers[f"{submission.id}.0"])


def test_default_pooling_of_decoders(tmp_path: Path) -> None:
    reference = build_reference("llama", random.Random("default"), tmp_path)
    assert read_pooling(tmp_path, reference.spec).pooling == "last"
    write_json(tmp_path / "modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "p"}])
    (tmp_path / "p").mkdir()
    write_json(tmp_path / "p" / "config.json", {"pooling_mode_mean_tokens": True})
    assert read_pooling(tmp_path, reference.spec).pooling == "mean"
    write_json(tmp_path / "p" / "config.json", {"pooling_mode_cls_token": True})
    with pytest.raises(Exception, match="unsupported_pooling"):
        read_pooling(tmp_path, reference.spec)
