"""``penstock bench throughput``: that its figures are of what it says they are of."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.bench.checkpoints import SHAPES, write_checkpoint
from penstock.bench.job import Job
from penstock.bench.limits import Limits, limit_seconds
from penstock.bench.throughput import measure_throughput, table
from penstock.cli.app import app
from penstock.spec.hf import model_spec, read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.sizing import active_parameters, parameters
from penstock.text import load_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("peer", [None, "transformers"])
def test_runs_each_side_in_turn(peer: str | None) -> None:
    report = measure_throughput(BUNDLED, peer=peer, prompts=3, inputs=9, outputs=5, threads=1, rounds=2)
    assert [side.name for side in report.sides] == ["penstock", *([peer] if peer else [])]
    assert (report.ratio is None) == (peer is None)
    assert len(report.limits) == 3 and all(min(x.read_rate, x.fp32, x.bf16, x.int8) > 1e7 for x in report.limits)
    for side in report.sides:
        assert len(side.each) == 2 and min(side.each) > 0 and side.share > 0
        assert 50 << 20 < side.peak_bytes < 4 << 30 and side.excess_bytes < side.peak_bytes
        assert side.name in table(report)


def test_limit_is_bytes_and_flops() -> None:
    spec = read_model_spec(BUNDLED)
    job = Job(model="", prompts=2, inputs=3, outputs=2, threads=1, vocab_size=spec.vocab_size, kv_bytes=0)
    endless = float("inf")

    def reading(job: Job, bits: int = 16) -> float:
        return limit_seconds(spec, job, Limits(1.0, endless, endless, endless), bits)

    # One step of decoding, with 3 prompt tokens and the first drawn one known.
    kv = 2 * 4 * 2 * spec.layers * spec.kv_size * 2
    weights = 2 * parameters(spec)
    assert reading(job) == weights + kv
    assert reading(replace(job, outputs=3)) == 2 * weights + kv + kv * 5 // 4
    assert reading(job, 4) == weights / 4 + kv / 2 and reading(job, 8) == (weights + kv) / 2
    assert reading(replace(job, shared=2)) == weights + kv * 6 // 8  # the two shared tokens are read once

    def multiplying(job: Job, bits: int, *rates: float) -> float:
        return limit_seconds(spec, job, Limits(endless, *rates), bits)

    table, attention = spec.vocab_size * spec.hidden, 4 * spec.layers * spec.q_size
    prompt = 2 * (2 * (parameters(spec) - table) * 3 + attention * (1 + 2 + 3))
    assert multiplying(replace(job, outputs=1), 16, 0.5, 1.0, 9.0) == prompt
    assert multiplying(replace(job, outputs=1), 8, 0.5, 1.0, 2.0) == prompt / 2
    assert multiplying(job, 16, 1.0, 0.5, 9.0) == prompt + 2 * (2 * parameters(spec) + attention * 4)


def test_limit_counts_the_experts_that_a_step_can_expect_to_need() -> None:
    spec = model_spec(SHAPES["moe-64"])
    assert spec.moe is not None and (spec.moe.experts, spec.moe.active) == (64, 8)
    job = Job(model="", prompts=1, inputs=1, outputs=2, threads=1, vocab_size=9, kv_bytes=0)
    bytes_only = Limits(1.0, *[float("inf")] * 3)
    reads = [limit_seconds(spec, replace(job, prompts=n), bytes_only) for n in (1, 2, 1000)]
    kv = 2 * 2 * 2 * spec.layers * spec.kv_size
    dense, chosen = active_parameters(spec), (parameters(spec) - active_parameters(spec)) / 7
    assert reads[0] == 2 * dense + kv
    assert reads[1] == pytest.approx(2 * (dense + chosen * 7 / 8) + 2 * kv)
    assert reads[2] == pytest.approx(2 * parameters(spec) + 1000 * kv)


@pytest.mark.slow
def test_the_checkpoint_written_for_it(tmp_path: Path) -> None:
    spec = read_model_spec(write_checkpoint(tmp_path))
    assert round(parameters(spec) / 1e6) == 596 and spec.qk_norm == "head"
    tokenizer = load_tokenizer(tmp_path, spec.vocab_size)
    assert tokenizer.vocabulary.size == spec.vocab_size


def test_unknown_peer() -> None:
    done = CliRunner().invoke(app, ["bench", "throughput", "--peer", "abacus"])
    assert done.exit_code != 0


def test_jobs_travel_as_json() -> None:
    job = Job(model="m", prompts=2, inputs=3, outputs=2, threads=1, vocab_size=7, kv_bytes=9)
    assert Job(**json.loads(json.dumps(asdict(job)))) == job
    tokens = job.tokens()
    assert [len(prompt) for prompt in tokens] == [3, 3] and all(0 <= t < 7 for prompt in tokens for t in prompt)
