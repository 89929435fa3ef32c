"""The reference pages that are made from the command line and from docstrings (``make docs``)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

from answers import one_answer_page
from house import ROOT
from penstock.base import env
from penstock.cli.app import app
from penstock.cli.config import NO_KEYS
from penstock.search import BeamSearchParams
from penstock.spec import EngineConfig, PoolingParams, SamplingParams, StructuredOutputs
from penstock.spec.encoder import ENCODERS, PARTS
from penstock.spec.families import FAMILIES
from penstock.spec.gguf import ARCHITECTURES

FOLDER = ROOT / "docs" / "reference"
MADE = "This page is generated from the code (`make docs`).\n"


def reference_pages() -> dict[Path, str]:
    pages = {"cli": cli_page, "sampling": sampling_page, "models": models_page, "one-answer": one_answer_page}
    return {FOLDER / f"{name}.md": page() for name, page in pages.items()}


# -- docs/reference/http.md --------------------------------------------------------------------------------------------


def http_page(codes: Mapping[int, set[str]]) -> str:
    """``codes``: of errors, by their status."""
    return str(_e2e().http_page(codes))


KEYS_PAGE = ROOT / "docs" / "how-to" / "keys.md"
ROLES = re.compile(r"(?<=<!-- made of the routes -->\n).*?(?=<!-- end -->)", re.DOTALL)


def keys_page() -> str:
    """As it is, with the table of who may use which route."""
    return ROLES.sub(lambda _: f"\n{_e2e().roles()}\n", KEYS_PAGE.read_text("utf-8"))


def open_routes() -> list[str]:
    """That ask for no key."""
    return list(_e2e().of_access(_e2e().app.ROUTES, "public"))


def _e2e() -> Any:
    """What knows the routes, which needs the packages that serving needs."""
    sys.path.append(str(ROOT / "tests" / "e2e"))
    return importlib.import_module("http_page")


# -- docs/reference/cli.md ---------------------------------------------------------------------------------------------

CLI_HEAD = f"""# Command line

`penstock COMMAND --help` says the same. Exit codes: 0 done; 1 the fault is ours or the machine's; 2 the request was
wrong; 3 the model or the configuration was wrong; 130 interrupted; 141 whoever read the output went away. With `--json`
an error is one JSON object on stderr. `PENSTOCK_DEBUG=1` shows the traceback of an error. `PENSTOCK_CONFIG` and
`PENSTOCK_SERVE_...` are for [`serve`](../configuration.md). `PENSTOCK_CACHE` is where
[packed weights](../how-to/start.md) are kept, and `PENSTOCK_CACHE_SIZE` how much of them.

Commands that run a model also take every [option of the engine](../configuration.md).

{MADE}"""


def cli_page() -> str:
    return CLI_HEAD + "".join(commands("penstock", typer.main.get_command(app)))


def commands(name: str, command: Any) -> Iterator[str]:
    """A section for each command and those under it. ``command`` is typer's, or that of the click it is built on."""
    if hasattr(command, "commands"):
        for inner, below in command.commands.items():
            yield from commands(f"{name} {inner}", below)
        return
    engine = {field.name for field in dataclasses.fields(EngineConfig)}
    runs_models = engine <= {parameter.name for parameter in command.params} | {"model", "seed"}
    positional = [p for p in command.params if p.param_type_name == "argument"]
    yield f"\n## {' '.join([name, *(f'[{p.metavar}]' for p in positional)])}\n\n{cell(command.help)}\n"
    yield "\n| | meaning |\n| --- | --- |\n"
    for parameter in command.params:
        if (runs_models and parameter.name in engine - {"model", "seed"}) or parameter.name == "help":
            continue
        if parameter in positional:
            yield f"| `{parameter.metavar}` | {cell(parameter.help)} |\n"
        else:
            flags = [*parameter.opts, *parameter.secondary_opts]
            yield f"| {', '.join(f'`{flag}`' for flag in flags)} | {cell(parameter.help)}{default(parameter)} |\n"
    if runs_models:
        yield "| engine options | [configuration](../configuration.md) |\n"


def server_options() -> Iterator[str]:
    """A row for each option that ``penstock serve`` has beside those of an engine."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    engine = {field.name for field in dataclasses.fields(EngineConfig)}
    for parameter in serve.params:
        if parameter.name not in engine | NO_KEYS:
            told = "" if parameter.default in (None, False) else f"`{json.dumps(parameter.default)}`"
            variable = env.serve_option(parameter.name)
            yield f"| `{parameter.name}` | `{parameter.opts[0]}` | `{variable}` | {told} | {cell(parameter.help)} |\n"


def default(parameter: Any) -> str:
    plain = parameter.default is None or isinstance(parameter.default, bool | list | tuple)
    return "" if plain else f"  [default: {parameter.default}]"


# -- docs/reference/sampling.md ----------------------------------------------------------------------------------------

SAMPLING_HEAD = f"""# Sampling parameters

Names, meaning and defaults are vLLM's, else llama.cpp's. A value out of range is an error that names its limits. On the
command line most of these are options of [`run` and `chat`](cli.md); in a line of [`run --input`](../how-to/batch.md)
and in Python all of them can be given.

{MADE}"""
KINDS = (SamplingParams, StructuredOutputs, BeamSearchParams, PoolingParams)


def sampling_page() -> str:
    return SAMPLING_HEAD + "".join(map(fields_section, KINDS))


def fields_section(kind: type) -> str:
    """What a dataclass of parameters says of itself: its summary, and its fields with defaults and meaning."""
    summary, meaning = read_docstring(inspect.getdoc(kind) or "")
    defaults = {
        field.name: "" if field.default in (None, dataclasses.MISSING) else f"`{field.default!r}`".replace("|", "\\|")
        for field in dataclasses.fields(kind)
        if not field.name.endswith("_ids") or field.name in ("stop_token_ids", "allowed_token_ids")
    }
    grouped = [([n for n in names if n in defaults], text) for names, text in meaning]
    rows = [
        f"| {', '.join(map('`{}`'.format, names))} | {', '.join(filter(None, map(defaults.get, names)))} | {text} |\n"
        for names, text in grouped
        if names
    ]
    described = {name for names, _ in meaning for name in names}
    if missing := defaults.keys() - described:
        raise ValueError(f"the docstring of {kind.__name__} does not describe {sorted(missing)}")
    return f"\n## {kind.__name__}\n\n{summary}\n\n| field | default | meaning |\n| --- | --- | --- |\n{''.join(rows)}"


def read_docstring(text: str) -> tuple[str, list[tuple[list[str], str]]]:
    """Its first paragraphs, and the entries of "Attributes:", each with the names it is about."""
    head, _, rest = text.partition("Attributes:\n")
    attributes = re.split(r"\n(?=\S)", rest)[0] if "\n\n" in rest else rest
    entries = []
    for entry in re.findall(r"^ {4}(\w.*(?:\n {5,}.*)*)", attributes, re.MULTILINE):
        names, meaning = entry.split(": ", 1)
        entries.append(([name.strip() for name in names.split(",")], cell(meaning)))
    return "\n\n".join(map(cell, head.strip().split("\n\n"))), entries


def cell(text: str | None) -> str:
    """One line of Markdown, with code in single backquotes."""
    line = re.sub(r"\s+", " ", re.sub(r"``(.+?)``", r"`\1`", text or "")).strip()
    return re.sub(r"(?<!\\)\|", "\\|", line)


# -- docs/reference/models.md ------------------------------------------------------------------------------------------

MODELS_HEAD = f"""# Families and formats

A model folder is run if its `config.json` names one of these architectures and asks for nothing that is not
implemented. Anything else is refused by name, with the nearest family, before a weight is read. A GGUF file is run
if its `general.architecture` is in the second table.

{MADE}
| `architectures` | family | |
| --- | --- | --- |
"""
GGUF_HEAD = """
| `general.architecture` | as |
| --- | --- |
"""
MODELS_TAIL = """
| what | read |
| --- | --- |
| weights | safetensors, one file or shards; float32, bfloat16, float16; MXFP4 experts are decoded at load |
| tokenizers | `tokenizer.json`, `tekken.json`, SentencePiece, tiktoken, `vocab.json`+`merges.txt`, `vocab.txt`, GGUF |
| chat templates | `chat_template.jinja`, or in `tokenizer_config.json`; in a sandbox with a budget |
| pooling | `modules.json` of sentence-transformers: mean, last token, first token, normalized or not |
| weights in GGUF | F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, in any mixture; one file |
| not in this build | adapters (LoRA), other quantizations |

Code in a model folder is never run, and formats that can run code (`.bin`, `.pt`) are never read.
"""


def models_page() -> str:
    rows = [f"| `{name}` | {family.name} | {traits(family)} |\n" for name, family in FAMILIES.items()]
    for family, start in ENCODERS.items():
        names = ", ".join(f"`{start}{end}`" for end in PARTS)
        rows.append(f"| {names} | {family} | encoder: vectors and scores |\n")
    files = [f"| `{name}` | {gguf_families(name, of)} |\n" for name, of in ARCHITECTURES.items()]
    return MODELS_HEAD + "".join(rows) + GGUF_HEAD + "".join(files) + MODELS_TAIL


def gguf_families(name: str, architecture: Any) -> str:
    others = ", mistral, mixtral" if name == "llama" else ""
    return FAMILIES[architecture.name].name + others


def traits(family: Any) -> str:
    """What sets a family apart, for a reader who looks for it."""
    marks = {
        "mixture of experts": family.expert_width is not None,
        "sliding windows": family.window not in ("none", "unrotated"),
        "norms on queries and keys": family.qk_norm != "none",
        "norms after blocks": family.norm_place != "pre",
        "attention sinks": family.sinks,
        "partial rotary": family.partial_rotary,
        "linear position biases (ALiBi)": family.alibi,
        "LayerNorm": family.norm == "layer",
        "text part only": family.text_config is not None,
    }
    never = [f"`{key}`" for key, only in family.fixed.items() if not only]
    marks[f"not with {' or '.join(never)}"] = bool(never)
    return ", ".join(mark for mark, has in marks.items() if has)
