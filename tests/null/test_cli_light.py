"""The command line costs nothing until a command needs something."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest

from penstock.spec import EngineConfig

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "starlette", "uvicorn", "jinja2", "rich", "prometheus_client")


def penstock(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "penstock.cli", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=check)


@pytest.mark.parametrize(
    "code",
    [
        "import penstock",
        "import penstock.cli",
        "from penstock.cli import main; import contextlib, sys; sys.argv = ['penstock', '--help']\n"
        "with contextlib.suppress(SystemExit): main()",
        "from penstock.cli import main; import contextlib, sys; sys.argv = ['penstock', 'serve', '--help']\n"
        "with contextlib.suppress(SystemExit): main()",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    probe = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr) == []


def test_every_engine_field_is_an_option_with_its_help() -> None:
    text = " ".join(penstock("serve", "--help").stdout.split())
    for field in dataclasses.fields(EngineConfig):
        if field.name == "model":
            continue
        assert f"--{field.name.replace('_', '-')} " in text, field.name
        assert field.metadata["help"].split()[0] in text


def test_version() -> None:
    import penstock as package

    for argument in ("version", "--version"):
        assert penstock(argument).stdout == f"{package.__version__}\n"


def test_the_seed_is_explained() -> None:
    assert "without it the text is the same at every run" in " ".join(penstock("run", "--help").stdout.split())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_output_that_cannot_be_written_is_an_error_with_a_name() -> None:
    argv = [sys.executable, "-m", "penstock.cli", "version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("  code: output_failed\n"), done.stderr
    assert "no space left" in done.stderr and len(done.stderr.splitlines()) == 4
    closed = subprocess.run(["sh", "-c", f"{shlex.join(argv)} >&-"], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_usage_errors_exit_2() -> None:
    for arguments in (
        ["nonsense"],
        ["run", "--no-such-option", "x"],
        ["serve", "--port", "99999"],
        ["run", "--top-k", "x", "p"],
    ):
        done = penstock(*arguments, check=False)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
