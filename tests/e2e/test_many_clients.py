"""512 clients at a time on a bundled model: none lost, none mixed up, and nothing piles up. docs/benchmarks.md has the
speeds, and what half an hour of it left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.load.machine import resident_bytes
from penstock.spec.location import locate
from servers import Server, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CLIENTS, REQUESTS = 512, 5000
LENGTHS = ("--input-len", "uniform:8:64", "--output-len", "uniform:16:64")
SAMPLING = ("--temperature", "0.8", "--extra-body", '{"seed": 7}')


def load(server: Server, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one load, each of whose prompts is another; a hundred answers are asked for again, alone."""
    bench = [sys.executable, "-m", "penstock.cli", "bench", "serve", "--url", server.url, "--json", "r.json"]
    options = ("--requests", str(REQUESTS), "--concurrency", str(CLIENTS), "--verify", "100", "--seed", str(seed))
    done = subprocess.run([*bench, *options, *LENGTHS, *SAMPLING], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "r.json").read_text())
    [point] = report["points"]
    return dict(point["figures"], verified=point["verified"])


def test_none_is_lost_or_mixed_up_and_nothing_piles_up(tmp_path: Path) -> None:
    model = locate("penstock-nano")
    assert isinstance(model, Path)
    server = start(model, "--quant", "int8", "--max-num-seqs", str(CLIENTS))
    sizes = []
    for seed in range(3):
        figures = load(server, seed, tmp_path)
        assert figures["succeeded"] == figures["requests"] == REQUESTS and not figures["errors"]
        assert figures["peak_in_flight"] == CLIENTS
        assert figures["verified"] == [100, 0]  # asked for, and other than before
        server.wait_until_idle()
        assert server.metric("penstock_kv_blocks_used") == server.metric("penstock_queue_tokens") == 0
        sizes.append(resident_bytes(server.process.pid))
    print([size >> 20 for size in sizes], "MiB")
    assert sizes[2] < 1.05 * sizes[1]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
