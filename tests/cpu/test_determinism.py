"""``penstock bench determinism``: what is measured is the product beside something else, and what it lacks is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.base import ConfigError, EngineError
from penstock.bench.any_order import FLAGS, SOURCES, build_library
from penstock.cli.app import app
from penstock.kernels import native

ROOT = Path(__file__).parents[2]


def test_flags_are_those_of_the_build() -> None:
    text = (ROOT / "CMakeLists.txt").read_text("utf-8").replace("${avx512}", FLAGS["avx512"])
    for name, flags in FLAGS.items():
        assert name == "portable" or f"kernels({name} {flags})" in text, name


def test_a_compiler_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as missing:
        build_library(tmp_path, "avx2")
    assert missing.value.code == "compiler_missing" and "g++" in missing.value.why


def test_sources_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as missing:
        build_library(tmp_path, "avx2", tmp_path)
    assert missing.value.code == "native_sources_missing" and str(tmp_path) in missing.value.why


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_what_the_compiler_refuses_is_told(tmp_path: Path) -> None:
    shutil.copytree(SOURCES, tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "kernels.cpp").write_text("#error not today\n")
    with pytest.raises(EngineError) as refused:
        build_library(tmp_path, "portable", tmp_path / "csrc")
    assert refused.value.code == "bench_build_failed" and "not today" in refused.value.why


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not native() or shutil.which("g++") is None, reason="no compiler")
def test_all_builds_agree_and_take_their_time(tmp_path: Path) -> None:
    """The command itself holds the first build against the installed kernels, byte for byte."""
    sizes = ["--shape", "tiny", "--prompt", "40", "--context", "600", "--rounds", "1", "--threads", "1"]
    ran = CliRunner().invoke(app, ["bench", "determinism", "--work", str(tmp_path), *sizes, "--json"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert len(report["costs"]) == 20 and len(report["limits"]) == 2
    for cost in report["costs"]:
        assert 0 < cost["low"] <= cost["ratio"] <= cost["high"] and cost["seconds"] > 0 and cost["share"] > 0
        assert 0 <= cost["apart"] < 1e-2, cost["name"]
    assert any(cost["apart"] > 0 for cost in report["costs"])  # or nothing was added in another order
