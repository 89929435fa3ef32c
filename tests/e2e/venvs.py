"""A venv for each of other people's packages that slow tests drive, made once and kept in ``build/venvs``."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = {
    "openai2": ("openai==2.54.0",),
    "litellm": ("litellm==1.110.2",),
    "langchain": ("langchain-openai==1.7.4",),
    "schemathesis": ("schemathesis==4.32.5",),
}
NOWHERE = ("No matching distribution found", "NewConnectionError", "Temporary failure in name resolution")
"""What pip says where it reaches no registry."""


def python_of(name: str) -> Path:
    """The interpreter of a venv. Skips the test where nothing can be installed, or fails it where CI is true."""
    venv, pins = ROOT / "build" / "venvs" / name, "\n".join(PINS[name])
    venv.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        done = venv / "installed"
        if not done.is_file() or done.read_text() != pins:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
            pip = [str(venv / "bin/python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            made = subprocess.run([*pip, "--prefer-binary", *PINS[name]], capture_output=True, text=True)
            if made.returncode and any(sign in made.stderr for sign in NOWHERE) and os.environ.get("CI") != "true":
                pytest.skip(f"{PINS[name][0]} cannot be installed: no registry is reachable")
            assert made.returncode == 0, made.stderr[-2000:]
            done.write_text(pins)
    return venv / "bin/python"
