"""What `make sanitize` and `make emulate` cannot check is a failure, or said; and no check passes that did not end."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sanitize": "apt install valgrind", "emulate": "no AVX2|apt install"}
FEW = ("bash", "cat", "dirname", "env", "grep", "mkdir")


def tools(folder: Path, **programs: str) -> dict[str, str]:
    """An environment with a few of the system's programs, and with those."""
    for name in FEW:
        (folder / name).symlink_to(shutil.which(name) or name)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tool_that_is_not_there_fails_at_once(script: str, tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "tests" / "native" / script], env=tools(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert any(said in done.stderr for said in SCRIPTS[script].split("|")) and "--allow-missing" in done.stderr


def common(command: str, arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    text = f"set -euo pipefail; source {ROOT / 'tests' / 'native' / 'common'}; {command}"
    return subprocess.run(["bash", "-c", text, "script", *arguments], env=env, capture_output=True, text=True)


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    command = 'missing A "no a"; missing B "no b"; echo "with $*"; done_but_for_skipped'
    allowed = common(command, ["-k", "x y", "--allow-missing"], tools(tmp_path))
    assert allowed.returncode == 0
    assert allowed.stdout.splitlines() == ["with -k x y", "== NOT checked: A (no a)", "== NOT checked: B (no b)"]
    assert common("done_but_for_skipped", [], {"PATH": str(tmp_path)}).stdout == ""


@pytest.mark.parametrize("status", [0, 1, 2, 9, 126, 127, 139])
def test_only_a_replay_that_ended_has_kept_to_its_memory(status: int, tmp_path: Path) -> None:
    """Of these, 1 says that bits differ, 2 that the record ends too soon, 9 is valgrind's own, 139 a crash."""
    done = common("memory_is_kept replay calls", [], tools(tmp_path, valgrind=f"exit {status}"))
    assert done.returncode == (0 if status <= 1 else status)
