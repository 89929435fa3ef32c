"""The command line costs nothing until a command needs something."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli.options import SAMPLING
from penstock.cli.sampling import FORMS
from penstock.spec import EngineConfig, SamplingParams

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "starlette", "uvicorn", "jinja2", "rich", "prometheus_client")


def penstock(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "penstock.cli", *arguments]
    env = os.environ | environment
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=check, env=env)


@pytest.mark.parametrize(
    "code",
    [
        "import penstock",
        "import penstock.cli",
        "from penstock.cli import main; import contextlib, sys; sys.argv = ['penstock', '--help']\n"
        "with contextlib.suppress(SystemExit): main()",
        "from penstock.cli import main; import contextlib, sys; sys.argv = ['penstock', 'serve', '--help']\n"
        "with contextlib.suppress(SystemExit): main()",
        "from penstock.cli import main; import contextlib, sys; sys.argv = ['penstock', 'run', '--temperature', 'x']\n"
        "with contextlib.suppress(SystemExit): main()",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    probe = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["run", "--help"], ["bench"]])
def test_commands_of_bench_are_imported_for_bench_alone(arguments: list[str]) -> None:
    code = (
        f"from penstock.cli import main; import contextlib, sys; sys.argv = {['penstock', *arguments]!r}\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(sorted(m for m in sys.modules if m in ('asyncio', 'penstock.bench.load.options')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = ["asyncio", "penstock.bench.load.options"] if arguments == ["bench"] else []
    assert done.stderr.splitlines()[-1] == repr(loaded)


def test_every_engine_field_is_an_option_with_its_help() -> None:
    text = " ".join(penstock("serve", "--help").stdout.split())
    for field in dataclasses.fields(EngineConfig):
        if field.name == "model":
            continue
        assert f"--{field.name.replace('_', '-')} " in text, field.name
        assert field.metadata["help"].split()[0] in text


NOT_ON_THE_COMMAND_LINE = """
    dry_penalty_last_n dry_sequence_breakers logit_bias allowed_token_ids prompt_logprobs detokenize skip_special_tokens
    spaces_between_special_tokens include_stop_str_in_output logits_rules logits_processors thinking_start thinking_end
    thinking_close thinking_soft bad_words_ids dry_breaker_ids thinking_ids shown_token_ids
""".split()
"""Fields of SamplingParams that a line of ``run --input`` or a script can give, and an option cannot."""


def test_every_sampling_parameter_is_an_option_or_deliberately_none() -> None:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    offered = SAMPLING.keys() - FORMS.keys() | {"structured_outputs"}
    assert offered <= known and known - offered == set(NOT_ON_THE_COMMAND_LINE)
    text = " ".join(penstock("run", "--help").stdout.split())
    for name, (_, meaning) in SAMPLING.items():
        assert f"--{name.replace('_', '-')} " in text and meaning.split()[0] in text, name
    assert "[default: the model's, else 256]" in text and "[default: 1]" in text


def test_usage_errors_are_json_under_json() -> None:
    done = penstock("models", "--json", "--jsn", check=False)
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 2 and error["code"] == "invalid_option" and "--json" in error["what"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = penstock(_PENSTOCK_COMPLETE=f"source_{shell}")
    assert "_PENSTOCK_COMPLETE" in done.stdout and f"complete_{shell}" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=60)


def completions(line: str, tmp_path: Path) -> list[str]:
    """What bash is offered after a line."""
    for name in ("models--org--one", "models--org--two"):
        folder = tmp_path / "hub" / name / "snapshots" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "HF_HUB_CACHE": str(tmp_path / "hub")}
    return penstock(_PENSTOCK_COMPLETE="complete_bash", **variables).stdout.split()


def test_models_options_and_commands_are_completed(tmp_path: Path) -> None:
    assert completions("penstock ch", tmp_path) == ["chat"]
    assert completions("penstock bench la", tmp_path) == ["latency"]
    assert completions("penstock run --top", tmp_path) == ["--top-p", "--top-k"]
    assert completions("penstock run --backend r", tmp_path) == ["ref"]
    assert completions("penstock chat penstock", tmp_path) == ["penstock-tiny", "penstock-nano"]
    assert completions("penstock show org/", tmp_path) == ["org/one", "org/two"]
    assert completions(f"penstock serve {tmp_path}/h", tmp_path) == [f"{tmp_path}/hub/"]


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
