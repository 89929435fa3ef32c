"""What a user installs: the built wheel, in a venv of its own, answers from any folder with the model it carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

BUNDLED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def command(*args: str | Path, cwd: str | Path = "/") -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PENSTOCK_", "VIRTUAL_ENV"))}
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=pytestconfig.rootpath)
    (built,) = out.glob("penstock-*.whl")
    return built


@pytest.fixture(scope="module")
def venv_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv that holds the wheel and borrows its dependencies from the venv of the tests.

    A path named in a .pth file comes after the venv's own packages, and .pth files found there (such as the one
    of an editable install) are not read, so ``penstock`` can only be the wheel's.
    """
    venv = tmp_path_factory.mktemp("venv")
    command(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    command(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    own = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_wheel_holds_the_package_the_model_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"penstock/bundled/{name}" for name in (*BUNDLED, "MODEL_CARD.md")} <= set(names)
    assert "penstock/py.typed" in names
    page = {f"penstock/serving/page/{name}" for name in ("index.html", "style.css", "icon.svg", "app.js", "api.js")}
    assert page <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"penstock"}


def test_wheel_answers_from_the_root_folder(venv_bin: Path) -> None:
    origin = command(venv_bin / "python", "-c", "import penstock; print(penstock.__file__)").strip()
    assert Path(origin).is_relative_to(venv_bin.parent)

    options = ["--json", "--max-tokens", "24", "--temperature", "0"]
    answers = [json.loads(command(venv_bin / "penstock", "run", *options, "Once upon a time")) for _ in range(2)]
    for answer in answers:
        tokens, reason = len(answer["token_ids"]), answer["finish_reason"]
        assert (tokens, reason) == (24, "length") or (0 < tokens <= 24 and reason == "stop")
        assert answer["text"].strip()
        assert answer["usage"]["completion_tokens"] == tokens
        assert answer["timings"]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
