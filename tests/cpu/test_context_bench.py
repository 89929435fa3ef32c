"""``penstock bench context``: that its steps are what it says they are."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.bench.context import measure_context, step_limit, table
from penstock.bench.limits import Limits
from penstock.cli.app import app
from penstock.spec import EngineConfig
from penstock.spec.hf import read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.sizing import kv_bytes_per_token, parameters


@pytest.mark.slow
def test_every_length_and_number_of_threads_is_measured() -> None:
    report = measure_context(EngineConfig(), [40, 300], [1, 2], rounds=2)
    assert [(each.context, each.threads) for each in report.readings] == [(40, 2), (300, 2), (40, 1)]
    for each in report.readings:
        median, least, greatest = each.ms
        assert 0 < least <= median <= greatest and each.share > 0
    assert set(report.prefill_ms) == {1, 2} and len(report.limits) == 3
    assert "behind    300 tokens" in table(report)


def test_the_limit_is_weights_and_keys_once() -> None:
    spec, endless = read_model_spec(BUNDLED), float("inf")
    limits = Limits(1.0, endless, endless, endless)
    kv = kv_bytes_per_token(spec, spec.dtype)
    assert step_limit(spec, 100, limits, 16) == 2 * parameters(spec) + 100 * kv
    assert step_limit(spec, 100, limits, 8) == parameters(spec) + 100 * kv / 2


@pytest.mark.slow
def test_command() -> None:
    ask = ["bench", "context", "--contexts", "20", "--threads", "1", "--rounds", "1"]
    done = CliRunner().invoke(app, [*ask, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["readings"][0]["context"] == 20
    for bad in ("0", "x", "1,,2"):
        refused = CliRunner().invoke(app, ["bench", "context", "--contexts", bad])
        assert refused.exit_code != 0 and "numbers from 1 to" in refused.output
