"""``penstock bench throughput``: that its figures are of what it says they are of."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.bench.job import Job
from penstock.bench.throughput import Limits, limit_seconds, measure_throughput, table, write_checkpoint
from penstock.cli.app import app
from penstock.spec.hf import read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.sizing import parameters
from penstock.text import load_tokenizer


@pytest.mark.parametrize("peer", [None, pytest.param("transformers", marks=pytest.mark.slow)])
def test_runs_each_side_in_turn(peer: str | None) -> None:
    report = measure_throughput(BUNDLED, peer=peer, prompts=3, inputs=9, outputs=5, threads=1, rounds=2)
    assert [side.name for side in report.sides] == ["penstock", *([peer] if peer else [])]
    assert (report.ratio is None) == (peer is None)
    assert len(report.limits) == 3 and all(x.read_rate > 1e8 and x.matmul_rate > 1e8 for x in report.limits)
    for side in report.sides:
        assert len(side.each) == 2 and min(side.each) > 0 and side.share > 0
        assert 50 << 20 < side.peak_bytes < 4 << 30 and side.excess_bytes < side.peak_bytes
        assert side.name in table(report)


def test_limit_is_bytes_and_flops() -> None:
    spec = read_model_spec(BUNDLED)
    job = Job(model="", prompts=2, inputs=3, outputs=2, threads=1, vocab_size=spec.vocab_size, kv_bytes=0)
    endless = float("inf")
    # One step of decoding, with 3 prompt tokens and the first drawn one known.
    kv = 2 * 4 * 2 * spec.layers * spec.kv_size * 2
    weights = 2 * parameters(spec) + spec.max_positions * spec.head_dim * 4
    assert limit_seconds(spec, job, Limits(1.0, endless)) == weights + kv
    flops = 2 * (parameters(spec) - spec.vocab_size * spec.hidden) * 6
    assert limit_seconds(spec, job, Limits(endless, 1.0)) == flops
    assert limit_seconds(spec, replace(job, outputs=3), Limits(1.0, endless)) == 2 * weights + kv + kv * 5 // 4


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
