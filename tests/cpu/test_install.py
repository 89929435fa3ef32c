"""Installed where no C++ compiler is good enough: all is there but the native kernels, and the user is told."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAYS = """
import logging
from penstock import LLM, SamplingParams
from penstock.kernels import native

logging.basicConfig()
assert not native()
llm = LLM(dtype="float32", num_threads=1)
assert llm.engine.config.backend == "torch"
[output] = llm.generate(["Once upon a time"], SamplingParams(max_tokens=4, temperature=0))
assert len(output.outputs[0].token_ids) == 4
llm.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "old"])
def test_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    wrapper = tmp_path / "old"  # knows no standard after C++17, whatever it is asked for
    wrapper.write_text('#!/bin/sh\nexec c++ "$@" -std=c++17\n')
    wrapper.chmod(0o755)
    target, source = tmp_path / "installed", tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    given = "/nonexistent" if compiler == "none" else str(wrapper)
    environment = os.environ | {"CXX": given, "CC": "/nonexistent"}
    subprocess.run([*install, "--target", str(target), str(source)], check=True, env=environment)
    packages = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    run = subprocess.run(  # -S: the editable installation of the tests is not found
        [sys.executable, "-S", "-c", SAYS],
        env=os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "without its native CPU kernels" in run.stderr and run.stderr.count("native CPU kernels") == 1
