"""``penstock bench`` against servers of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import penstock


@pytest.mark.slow  # the page on benchmarks runs it against a server
def test_quick_measures_the_bundled_model(tmp_path: Path) -> None:
    done = penstock(
        "bench", "serve", "--quick", "--max-num-seqs", "16", "--json", "r.json", "--html", "r.html", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["model"] == "penstock-tiny" and "--max-num-seqs 16" in report["server"]
    assert [point["load"] for point in report["points"]] == ["1 at a time", "8 at a time", "32 at a time"]
    for point in report["points"]:
        f = point["figures"]
        assert (f["succeeded"], f["errors"], f["output_tokens"]) == (64, {}, 64 * 32)
        assert f["input_tokens"] == 64 * 64 and f["cached_tokens"] == 0
        assert 0 < f["ttft"]["p50"] <= f["ttft"]["p99"] <= f["e2e"]["max"] < f["seconds"] and f["itl"]["n"] > 1000
        assert (
            point["server"]["peak_bytes"] > 50 << 20 and point["server"]["cpu"] > 0 and 0 < point["client"]["cpu"] < 1
        )
        assert 0 < point["limit"]["share"] < 1.5
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 7 and "32 at a time" in page
    text = done.stdout.decode()
    assert "of what this machine allows" in text and "TTFT  time to first token" in text
    assert b"Traceback" not in done.stderr


@pytest.mark.slow  # the page on benchmarks runs each of them
def test_offline_and_latency_feed_cost(tmp_path: Path) -> None:
    small = ("--requests", "12", "--input-len", "20", "--output-len", "8", "--num-threads", "1", "--json", "o.json")
    assert penstock("bench", "offline", *small, cwd=tmp_path).returncode == 0
    short = ("--rounds", "3", "--input-len", "8,32", "--output-len", "4", "--num-threads", "1", "--json", "l.json")
    assert penstock("bench", "latency", *short, cwd=tmp_path).returncode == 0
    done = penstock("bench", "cost", "o.json", "l.json", "--price-per-hour", "2", "--json", cwd=tmp_path)
    costs = json.loads(done.stdout)["costs"]
    assert [cost["load"] for cost in costs] == ["offline", "8 in, 1 at a time", "32 in, 1 at a time"]
    for cost in costs:
        assert abs(cost["output"] - 1e6 * 2 / 3600 / cost["output_per_s"]) < 0.01 * cost["output"]
    offline = json.loads((tmp_path / "o.json").read_text())["points"][0]["figures"]
    assert (offline["input_tokens"], offline["output_tokens"], offline["ttft"]) == (240, 96, None)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    done = penstock("bench", "serve", "--kv-memory", "1K", cwd=tmp_path)
    assert done.returncode == 1 and b"code: server_did_not_start" in done.stderr and b"code: kv" in done.stderr
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"--kv-memory\x001K" in command for command in commands)
