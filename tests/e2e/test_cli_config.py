"""Where options of a server come from: file, environment, command line, each with its origin."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import argv, penstock, running

Rows = dict[str, tuple[Any, str]]
"""Each option's value and where it comes from."""


def parts(*arguments: str | Path, **environment: str) -> tuple[Rows, list[Rows]]:
    """The server's options, and those of each of its models."""
    done = penstock("config", "show", "--origin", "--json", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)
    own, *models = [
        {name: (row["value"], row["origin"]) for name, row in rows.items()} for rows in (own, *own.pop("models"))
    ]
    return own, models


def shown(*arguments: str | Path, **environment: str) -> Rows:
    """Of a server of one model."""
    own, (model,) = parts(*arguments, **environment)
    return own | {name: row for name, row in model.items() if name not in own}


def test_a_later_source_wins_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax-num-seqs = 2\ndepth = 3\nweight_cache = false\nmodel = "a"\nkv_memory = "1G"\n')
    rows = shown("--config", file, "--port", "7", PENSTOCK_SERVE_PORT="6", PENSTOCK_SERVE_DEPTH="5")
    expected = {
        "port": (7, "command line"),
        "depth": (5, "PENSTOCK_SERVE_DEPTH"),
        "max_num_seqs": (2, str(file)),
        "weight_cache": (False, str(file)),
        "model": ("a", str(file)),
        "kv_memory": ("1G", str(file)),
        "host": ("127.0.0.1", "default"),
        "seed": (0, "default"),
    }
    assert {name: rows[name] for name in expected} == expected
    assert shown("m", "--config", file)["model"] == ("m", "command line")
    assert shown(PENSTOCK_CONFIG=str(file)) == shown("--config", file)
    assert shown("--weight-cache", "--config", file)["weight_cache"] == (True, "command line")
    text = penstock("config", "show", "--config", file).stdout.decode()
    assert "max_num_seqs            2\n" in text and "serve.toml" not in text
    assert f"2          {file}\n" in penstock("config", "show", "--origin", "--config", file).stdout.decode()


def test_every_model_is_shown_as_it_would_be_loaded(tmp_path: Path) -> None:
    """Those of the command line and those of tables, of which one puts itself first by its name there."""
    file = tmp_path / "serve.toml"
    file.write_text(
        'keep_alive = "2m"\n[models.small]\npath = "nano"\naliases = ["x", "y"]\nkeep-alive = "1m"\n'
        "[models.large]\npin = true\nmax-num-seqs = 2\n"
    )
    own, models = parts("a", "large", "b", "--config", file, "--max-num-seqs", "3", PENSTOCK_SERVE_DEPTH="2")
    assert own["keep_alive"] == ("2m", str(file)) and "max_num_seqs" not in own and "model" not in own
    line, table, none = "command line", str(file), "default"
    names = ("model", "served_model_name", "aliases", "pin", "keep_alive", "max_num_seqs", "depth", "quant")
    depth, quant = (2, "PENSTOCK_SERVE_DEPTH"), ("none", none)
    plain = ((None, none), ([], none), (False, none), ("2m", table), (3, line), depth, quant)
    large = (("large", table), ([], none), (True, table), ("2m", table), (2, table), depth, quant)
    small = (("small", table), (["x", "y"], table), (False, none), ("1m", table), (3, line), depth, quant)
    assert [tuple(model[name] for name in names) for model in models] == [
        (("a", line), *plain),
        (("large", table), *large),
        (("b", line), *plain),
        (("nano", table), *small),
    ]
    text = penstock("config", "show", "a", "--config", file).stdout.decode()
    first, *blocks = text.split("\n\n")
    assert first.startswith("host ") and len(blocks) == 3 and re.search(r"^aliases +x, y$", blocks[1], re.MULTILINE)
    refused = penstock("config", "show", "a", "b", "--served-model-name", "c")
    assert refused.returncode == 3 and b"--served-model-name c cannot be used here" in refused.stderr


def test_where_spans_go_is_shown(tmp_path: Path) -> None:
    """The variable of OpenTelemetry comes before every source of Penstock's own, the last of which wins."""
    file, name = tmp_path / "serve.toml", "OTEL_EXPORTER_OTLP_ENDPOINT"
    file.write_text('otlp_endpoint = "http://file"\n')
    given = {name: "http://otel"}
    assert shown(**given)["otlp_endpoint"] == ("http://otel", name)
    assert shown("--config", file, **given)["otlp_endpoint"] == ("http://file", str(file))
    assert shown(**{name: ""})["otlp_endpoint"] == (None, "default")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "did you mean port?"), ("port = [1]", "it is a list"), ("[serve]\nport = 1", "it is a dict"),
        ("port = 1979-05-27", "it is a date"), ("port = 'x'", "port = 'x' in"), ("port = 70000", "port = '70000' in"),
        ("port = true", "port = 'true' in"), ("max_num_seqs = 1.5", "max_num_seqs = '1.5' in"),
        ("weight_cache = 'maybe'", "weight_cache = 'maybe' in"), ("backend = 'best'", "'auto'"), ("port =", "not TOML"),
        ("port = 1\nport = 2", "not TOML"), ("\xff", "not TOML"), ("a = " + "[" * 5000, "not TOML"),
        ("[models.a]\nquantt = 1", "did you mean quant?"), ("[models.a]\nquant = 'int3'", "'int3'"),
        ("models = 1", "holds a table"),
        ("config = 'other.toml'", "no option"), ("origin = true", "no option"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_bytes(text.encode("latin-1"))
    for command in (["serve"], ["config", "show"]):
        done = penstock(*command, "--config", file)
        errors = done.stderr.decode()
        assert done.returncode == 3 and done.stdout == b"" and re.search(r"code: (config|option)_invalid\n$", errors), (
            errors
        )
        assert says in errors and "Traceback" not in errors and len(errors.splitlines()) <= 4, errors


def test_a_bad_environment_is_refused_by_name() -> None:
    done = penstock("serve", PENSTOCK_SERVE_PORT="x")
    assert done.returncode == 3 and b"'x' in PENSTOCK_SERVE_PORT" in done.stderr
    done = penstock("config", "show", "--json", PENSTOCK_SERVE_HOTS="x")
    error = json.loads(done.stderr)["error"]
    assert error["fix"] == "did you mean host?" and "PENSTOCK_SERVE_HOTS" in error["what"]
    assert penstock("serve", "--config", "none.toml").stderr.startswith(b"Error: none.toml cannot be read")


def test_serve_runs_with_it(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        f'model = "{stories}"\nserved_model_name = "named"\nport = 0\nnum_threads = 1\nmax_model_len = 64\n'
    )
    with running(
        argv("serve", "--config", file, "--max-model-len", "48"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving named at ")
        (model,) = httpx.get(f"{line.split()[-1]}/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("named", 48)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
