"""Checks of what is written beside the code, and the pages that are written from it (``make docs``)."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from house import ROOT, Function, Source, base_names, dotted, package_sources
from penstock.spec import EngineConfig
from reference import KEYS_PAGE, http_page, keys_page, reference_pages, server_options


def markdown_pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])


def broken_references(name: str, text: str, sources: Iterable[Source]) -> list[str]:
    """Relative links, and files and `file.py:name` in backquotes, that lead nowhere. ``name``: the page's path."""
    modules = {source.path: source for source in sources}
    out = []
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        if not (ROOT / name).parent.joinpath(link).exists():
            out.append(f"{name}: link to {link}")
    for path, qualified in re.findall(r"`([\w/.-]+\.py)(?::([\w.]+))?`", text):
        found = [m for p, m in modules.items() if p == path or p.endswith(f"/{path}")]
        if qualified:
            found = [m for m in found if qualified in qualified_names(m.tree)]
        elif (ROOT / path).exists():
            continue
        if not found:
            out.append(f"{name}: `{path}{qualified and ':' + qualified}`")
    return out


def qualified_names(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef):
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from qualified_names(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (prefix + dotted(target) for target in targets)


# Written with a class in each name, so that this file does not break its own rule.
PLACES = re.compile(r"(?<![\w.~-])/(?:[h]ome|[r]oot|[U]sers|[w]ork)/\w|/[o]pt/(?:wheels|pypi)")
HOSTS = re.compile(
    r"[p]ypi\.org|[p]ythonhosted|[d]ownload\.pytorch|[g]hcr\.io|[d]ocker\.io|[q]uay\.io|[-]-(extra-)?index-url"
)


def machine_traces(files: Iterable[tuple[str, str]]) -> list[str]:
    """``files``: name and text. Nothing tracked may depend on, or tell of, the machine it was written on."""
    out = []
    for name, text in files:
        for number, line in enumerate(text.splitlines(), 1):
            for match in (*PLACES.finditer(line), *HOSTS.finditer(line)):
                out.append(f"{name}:{number}: {match.group()}")
    return out


# -- docs/errors.md ---------------------------------------------------------------------------------------------------

ERRORS_PAGE = ROOT / "docs" / "errors.md"

HEAD = """# Error codes

Every error says what failed, why with numbers, and what to do, and carries a code that never changes. In Python it is a
`penstock.PenstockError` with `.code`, `.what`, `.why` and `.fix`; over HTTP the code is `error.code` in OpenAI's error
shape, but for `prompt_too_long`: clients of OpenAI's API look for `context_length_exceeded`, and those of Anthropic's
for "prompt is too long" in the text. The command line prints all four and ends with 2 for a bad request, 3 for a model
or configuration that cannot run, and 1 for anything else.

This page is generated from the code (`make docs`). "…" stands for what the message fills in.

| code | HTTP | says | what to do |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True, order=True)
class ErrorSite:
    code: str
    status: int
    what: str
    fix: str


def error_statuses(sources: Iterable[Source]) -> dict[str, int]:
    """HTTP status of each error class, inherited where the class sets none."""
    classes = {n.name: n for s in sources for n in s.nodes if isinstance(n, ast.ClassDef)}
    statuses = {"PenstockError": 500}
    while found := {
        name: next(iter(own_status(node)), statuses[base])
        for name, node in classes.items()
        for base in base_names(node)
        if base in statuses and name not in statuses
    }:
        statuses |= found
    return statuses


def own_status(node: ast.ClassDef) -> Iterator[int]:
    for line in node.body:
        if isinstance(line, ast.Assign) and dotted(line.targets[0]) == "status":
            yield ast.literal_eval(line.value)


def error_sites(sources: list[Source]) -> list[ErrorSite]:
    """Where errors with a known code are made; where a function is given the code, or part of it, its calls."""
    statuses, makers = error_statuses(sources), error_makers(sources)
    sites = set()
    for source in sources:
        for node in source.nodes:
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func).split(".")[-1]
            if name in statuses and node.args:
                sites.add(error_site(node, statuses[name], {}))
            for maker in makers.get(name, ()):
                if maker.is_called(name, source):
                    status = statuses[dotted(maker.error.func).split(".")[-1]]
                    sites.add(error_site(maker.error, status, maker.arguments(node)))
    return sorted(site for site in sites if site is not None)


@dataclass(frozen=True)
class ErrorMaker:
    """A function whose parameters are the code of an error, or part of it."""

    module: str
    function: ast.FunctionDef
    error: ast.Call

    def is_called(self, name: str, source: Source) -> bool:
        """Whether a file means this function by that name: it is its own, or imported from its module or package."""
        imports = [n for n in source.nodes if isinstance(n, ast.ImportFrom) and name in {a.name for a in n.names}]
        return any(f"{self.module}.".startswith(f"{place}.") for place in [source.module, *(n.module for n in imports)])

    def arguments(self, call: ast.Call) -> dict[str, ast.expr]:
        parameters = [a.arg for a in self.function.args.args if a.arg != "self"]
        return dict(zip(parameters, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}


def error_makers(sources: list[Source]) -> dict[str, list[ErrorMaker]]:
    """By the name of the function."""
    statuses = error_statuses(sources)
    makers: dict[str, list[ErrorMaker]] = {}
    for source in sources:
        for function in source.nodes:
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in statuses and node.args:
                    names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
                    if names and names <= {a.arg for a in function.args.args}:
                        makers.setdefault(function.name, []).append(ErrorMaker(source.module, function, node))
    return makers


def error_site(node: ast.Call, status: int, values: Mapping[str, ast.expr]) -> ErrorSite | None:
    """``values``: what the names in it stand for. None if its code is not known."""
    given = dict(zip(("code", "what"), node.args, strict=False)) | {k.arg: k.value for k in node.keywords if k.arg}
    code, fixed = message(given["code"], values), given.get("status")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", code):
        return None
    status = fixed.value if isinstance(fixed, ast.Constant) else status
    return ErrorSite(code, status, message(given.get("what"), values), message(given.get("fix"), values))


def message(node: ast.expr | None, values: Mapping[str, ast.expr] = MappingProxyType({})) -> str:
    """The text of a string or f-string, "…" for whatever is filled in and not among ``values``."""
    if isinstance(node, ast.FormattedValue):
        return message(node.value, values)
    if isinstance(node, ast.Name) and node.id in values:
        return message(values[node.id])
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("|", "\\|").replace("\n", " ")
    if isinstance(node, ast.JoinedStr):
        return re.sub(r"…(\s*…)+", "…", "".join(message(part, values) for part in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left, values) + message(node.right, values)
    if isinstance(node, ast.BoolOp):
        return message(node.values[-1], values)
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (message(node.body, values), message(node.orelse, values))))
    return "…"


def errors_page(sources: list[Source]) -> str:
    rows: dict[str, list[ErrorSite]] = {}
    for site in error_sites(sources):
        rows.setdefault(site.code, []).append(site)
    lines = []
    for code, sites in rows.items():
        statuses = ", ".join(map(str, sorted({site.status for site in sites})))
        says = "<br>".join(dict.fromkeys(site.what for site in sites))
        fixes = "<br>".join(dict.fromkeys(site.fix for site in sites if site.fix))
        lines.append(f"| `{code}` | {statuses} | {says} | {fixes} |\n")
    return HEAD + "".join(lines)


# -- docs/configuration.md ------------------------------------------------------------------------------------------

CONFIGURATION_PAGE = ROOT / "docs" / "configuration.md"

CONFIGURATION_HEAD = """# Configuration

Every field of `EngineConfig` (`spec/config.py`) is a keyword of `LLM(...)` and an option of every command that runs a
model. A value that is absent is decided from the model and the machine. Nothing else configures an engine.

`penstock serve` reads its options from a file too, and from the environment. A later source wins:

1. the TOML file that `--config` or `PENSTOCK_CONFIG` names: `max_num_seqs = 16`
2. the environment: `PENSTOCK_SERVE_MAX_NUM_SEQS=16`
3. the command line: `--max-num-seqs 16`

Tables `[models.NAME]` are [models of their own](how-to/several-models.md).

`OTEL_EXPORTER_OTLP_ENDPOINT` is `otlp_endpoint` where none of these says it.

A key that is no option is an error, and so is a value that the option would not take. `penstock config show --origin`,
given the same file, environment and options, tells every value and where it comes from: those of the server, and then
those of each model that it would have.

This page is generated from the code (`make docs`).

## An engine

| `LLM(...)` | command line | default | meaning |
| --- | --- | --- | --- |
"""


def configuration_page() -> str:
    lines = []
    for field in dataclasses.fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        option = "`MODEL`" if field.name == "model" else f"`{flag}`"
        if isinstance(field.default, bool):
            option = f"`{flag}` / `--no-{flag[2:]}`"
        default = "" if field.default is None else f"`{field.default!r}`".replace("'", '"')
        lines.append(f"| `{field.name}` | {option} | {default} | {field.metadata['help']} |\n")
    return CONFIGURATION_HEAD + "".join(lines) + SERVER_HEAD + "".join(server_options())


SERVER_HEAD = """
## A server

All of the above, and these, in a file by the name of the first column:

| file | command line | environment | default | meaning |
| --- | --- | --- | --- | --- |
"""


HTTP_PAGE = ROOT / "docs" / "reference" / "http.md"
ELSEWHERE = {"bench", "cli", "compress", "formats", "host", "hub", "models", "quant", "train"}
"""Rooms that no request reaches, or only when a server starts."""


def refusals(sources: list[Source]) -> dict[int, set[str]]:
    """Codes by status, of what a client can be told; where the fault is the server's there is but one for each file."""
    codes: dict[int, set[str]] = {}
    for site in error_sites([source for source in sources if source.room not in ELSEWHERE]):
        if site.status != 500:
            codes.setdefault(site.status, set()).add(site.code)
    return codes


def generated_pages(sources: list[Source]) -> dict[Path, str]:
    made = {ERRORS_PAGE: errors_page(sources), CONFIGURATION_PAGE: configuration_page()}
    return made | {HTTP_PAGE: http_page(refusals(sources)), KEYS_PAGE: keys_page()} | reference_pages()


if __name__ == "__main__":
    for page, content in generated_pages(package_sources()).items():
        page.write_text(content, "utf-8")
