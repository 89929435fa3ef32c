"""schemathesis against a real server: thousands of requests, of what its document allows and of what it does not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import BUNDLED
from servers import start
from venvs import python_of

CASES = 5_000
EXAMPLES = 60
"""Of each operation, beside those that schemathesis derives from the bounds."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_case_is_a_fault_of_the_server_and_answers_are_as_described(tmp_path: Path) -> None:
    """``positive_data_acceptance`` is left out: a schema cannot say that a model, file, rule or regular expression
    exists or compiles."""
    with (tmp_path / "log").open("w+") as log:
        server = start(BUNDLED, "--max-model-len", "128", log=log)
        command = [
            *(str(python_of("schemathesis").with_name("st")), "run", f"{server.url}/openapi.json", "--no-color"),
            *("--mode", "all", "--max-examples", str(EXAMPLES), "--seed", "1", "--request-timeout", "60"),
            *("--exclude-checks", "positive_data_acceptance", "--continue-on-failure"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        server.wait_until_idle()
        assert server.metric("penstock_kv_blocks_used") == server.metric("penstock_queue_tokens") == 0
        server.process.terminate()
        assert server.process.wait(60) == 0
        log.seek(0)
        said = [line for line in log if "unknown fields" not in line]
    report = done.stdout[done.stdout.find("= FAILURES =") :]
    assert done.returncode == 0, report[:6000] + done.stderr
    found = re.search(r"(\d+) generated", done.stdout)
    assert found and int(found[1]) >= CASES, done.stdout[-1000:]
    assert said == []
