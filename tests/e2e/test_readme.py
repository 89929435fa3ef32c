"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def readme(pytestconfig: pytest.Config) -> str:
    return (pytestconfig.rootpath / "README.md").read_text("utf-8")


def test_python_example_runs(readme: str, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20


def test_commands_are_targets(readme: str, pytestconfig: pytest.Config) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    lines = [line.split("#")[0].split() for line in commands.splitlines()]
    assert lines == [["make", "run"], ["make", "test"]]
    for line in lines:
        subprocess.run([*line, "--dry-run"], cwd=pytestconfig.rootpath, check=True, capture_output=True)


def test_readme_is_one_screen(readme: str) -> None:
    assert len(readme.splitlines()) <= 50
