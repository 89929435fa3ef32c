"""The checkers behind the house rules: each takes sources and returns what breaks the rule, one line per breach.

They read syntax trees only and import nothing of the package, so they say the same on any machine.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "penstock"

FILE_LINES, FUNCTION_LINES, CLASS_METHODS, CORE_LINES = 400, 60, 15, 2500
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module. ``path`` is relative to the package, such as "core/kv/blocks.py"."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def module(self) -> str:
        parts = PurePosixPath("penstock", self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The folder or top-level file that the import table speaks of; "penstock" for the root ``__init__``."""
        return self.module.split(".")[1] if "." in self.module else "penstock"

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


def package_sources() -> list[Source]:
    return [Source(p.relative_to(PACKAGE).as_posix(), p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))]


# -- who imports whom ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """``target`` is dotted and includes the imported name: ``from a.b import c`` gives "a.b.c"."""

    target: str
    node: ast.AST
    function: Function | None
    """The innermost function around it, None at module level."""

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def imports(source: Source) -> Iterator[Import]:
    """Every import, those inside functions, under TYPE_CHECKING and through ``import_module("...")`` included."""

    def visit(node: ast.AST, function: Function | None) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = f"{source.module}.x" if source.path.endswith("__init__.py") else source.module
                base = ".".join([*package.split(".")[: -node.level], *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", node, function) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
            yield Import(str(name), node, function)
        inner = node if isinstance(node, Function) else function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(source.tree, None)


def dotted(node: ast.AST) -> str:
    """ "a.b.c" for such an expression, "" for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{left}.{node.attr}" if (left := dotted(node.value)) else ""
    return ""


CORE_TYPES = ("penstock.core.plan", "penstock.core.service", "penstock.core.trace", "penstock.core.kv.link")
"""What "core (types)" in the table means: the values and protocols that others exchange with the brain."""

Table = dict[str, frozenset[str]]


def import_table(markdown: str) -> Table:
    """Reads the table "room | may import". A row may name only rows above it, so no cycle can be written down.

    Cells hold room names separated by commas; "core (types)" for CORE_TYPES alone; or "nothing", "everything above".
    """
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\|\s*room\s*\|\s*may import", line)) + 2
    table: Table = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rooms, allowed = (cell.strip() for cell in line.strip("|").split("|")[:2])
        known = frozenset(table)
        names = {"nothing": frozenset[str](), "everything above": known}.get(allowed)
        if names is None:
            names = frozenset(name.strip() for name in allowed.split(","))
        if unknown := {name.removesuffix(" (types)") for name in names} - known:
            raise ValueError(f"row {rooms!r} of the import table names {sorted(unknown)}, which no row above defines")
        table |= {room.strip().removesuffix(".py"): names for room in rooms.split(",")}
    return table


LATE_ROOMS = {"assemble", "cli"}
FACTORY_ROOMS = {"grammar", "kernels", "transfer", "runtime", "cluster"}


def may_import_late(source: Source, function: Function) -> bool:
    """Only where choosing a variant by name is the point: nothing else may hide an edge inside a function."""
    if source.room in LATE_ROOMS:
        return True
    if source.path.endswith("__init__.py") and function.name == "__getattr__":
        return True
    registered = any(
        isinstance(mark, ast.Call) and dotted(mark.func).endswith(".register") for mark in function.decorator_list
    )
    return registered and source.room in FACTORY_ROOMS


def forbidden_imports(sources: Iterable[Source], table: Table) -> list[str]:
    out = []
    for source in sources:
        if source.room not in table and source.room != "penstock":
            out.append(f"{source.path}:1: room {source.room!r} has no row in the import table")
            continue
        allowed = table.get(source.room, frozenset({"base", "spec"}))
        for edge in imports(source):
            late = edge.function is not None
            if edge.function is not None and not may_import_late(source, edge.function):
                out.append(source.at(edge.node, f"late import of {edge.target} in {edge.function.name}()"))
            if edge.top != "penstock" or (source.room == "penstock" and (late or under_type_checking(source, edge))):
                continue
            room = edge.target.split(".")[1] if "." in edge.target else ""
            if room not in table:  # a name of penstock/__init__.py, which imports half the house
                if source.room != "cli":
                    out.append(source.at(edge.node, f"{source.room} imports the package root ({edge.target})"))
            elif room != source.room and room not in allowed:
                types = f"{room} (types)" in allowed and edge.target.startswith(CORE_TYPES)
                if not types:
                    out.append(source.at(edge.node, f"{source.room} may not import {edge.target}"))
    return out


def under_type_checking(source: Source, edge: Import) -> bool:
    guards = [n for n in source.nodes if isinstance(n, ast.If) and dotted(n.test).endswith("TYPE_CHECKING")]
    return any(child is edge.node for guard in guards for child in ast.walk(guard))


TORCH_FREE = set(
    "penstock base formats spec core cost fleet search text grammar wire host sim planner client apps texthost".split()
)
STDLIB_ONLY = {"base", "spec", "core", "cost", "fleet"}
MSGSPEC = {"wire", "serving"}

PEER_SIDE = ("bench/side_llama", "bench/side_openvino", "bench/side_vllm")
"""Run in the venv of the peer that they drive, which has nothing of ours but the source."""


def third_party_imports(sources: Iterable[Source], declared: set[str]) -> list[str]:
    """``declared``: import names of the distributions that pyproject lists outside the test extra."""
    out = []
    for source in sources:
        for edge in imports(source):
            if edge.top in sys.stdlib_module_names or edge.top in ("penstock", "?"):
                continue
            if source.path.startswith(PEER_SIDE):
                continue
            if edge.top not in declared:
                out.append(source.at(edge.node, f"{edge.top} is not among the dependencies"))
            elif edge.top == "torch" and source.room in TORCH_FREE:
                out.append(source.at(edge.node, f"{source.room} never imports torch"))
            elif edge.top == "msgspec" and source.room not in MSGSPEC:
                out.append(source.at(edge.node, f"msgspec belongs to {' and '.join(sorted(MSGSPEC))}"))
            elif source.room in STDLIB_ONLY:
                out.append(source.at(edge.node, f"{source.room} is standard library only, not {edge.top}"))
    return out


# -- size and shape ------------------------------------------------------------------------------------------------


def oversized(sources: Iterable[Source], exceptions: dict[str, int]) -> list[str]:
    """``exceptions``: key of the breach -> the size it has today. It may only shrink, so the figure must be exact."""
    out, met = [], set()

    def check(key: str, size: int, limit: int, unit: str) -> None:
        if size > limit and key in exceptions:
            met.add(key)
            if size != exceptions[key]:
                out.append(f"{key}: {size} {unit}, but its exception says {exceptions[key]}")
        elif size > limit:
            out.append(f"{key}: {size} {unit}, at most {limit}")

    for source in sources:
        check(source.path, source.text.count("\n"), FILE_LINES, "lines")
        for node in source.nodes:
            if isinstance(node, Function):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                check(f"{source.path}:{node.name}", size, FUNCTION_LINES, "lines")
            elif isinstance(node, ast.ClassDef):
                public = [n for n in node.body if isinstance(n, Function) and not n.name.startswith("_")]
                check(f"{source.path}:{node.name}", len(public), CLASS_METHODS, "public methods")
    return out + [f"{key}: its exception is no longer needed" for key in exceptions if key not in met]


def core_lines(sources: Iterable[Source]) -> int:
    return sum(source.text.count("\n") for source in sources if source.room == "core")


KINDS = set("Protocol ABC Generic NamedTuple TypedDict Enum IntEnum StrEnum Flag Module Struct".split())
FRAMEWORK_BASES = {
    *(
        "Function",
        "TorchFunctionMode",
        "H11Protocol",
        "Collector",
        "TyperGroup",
    ),  # torch, uvicorn, prometheus_client, typer
    *("ImmutableSandboxedEnvironment", "Extension", "NodeTransformer", "TemplateError"),  # jinja2
    *("Handler", "SSLProtocol"),  # logging, asyncio
}
"""Third-party classes whose API *is* subclassing. One is added with the first class that needs it."""


def mixins(sources: Iterable[Source]) -> list[str]:
    """A class has one base at most: a Protocol, an ABC, a framework's own, an exception, or a record of fields."""
    classes = [(s, n) for s in sources for n in s.nodes if isinstance(n, ast.ClassDef)]
    names = {node.name: base_names(node) for _, node in classes}
    interfaces = {name for name, bases in names.items() if {"Protocol", "ABC"} & set(bases)}
    trees = {n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)} | {"Struct"}
    while more := {n for n, bases in names.items() if n not in trees and trees & set(bases)}:
        trees |= more
    allowed = KINDS | FRAMEWORK_BASES | interfaces | trees
    out = []
    for source, node in classes:
        bases = base_names(node)
        out += [source.at(node, f"{node.name} inherits from {base}") for base in bases if base not in allowed]
        if len([b for b in bases if b != "Generic"]) > 1:
            out.append(source.at(node, f"{node.name} has several bases: {', '.join(bases)}"))
    return out


def base_names(node: ast.ClassDef) -> list[str]:
    return [dotted(b.value if isinstance(b, ast.Subscript) else b).split(".")[-1] or ast.unparse(b) for b in node.bases]


# -- what is never written -----------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
FORBIDDEN_NAMES = {
    *("torch.load", "torch.save", "torch.multiprocessing", "yaml.load", "os.system", "os.popen"),
    *("concurrent.futures.ProcessPoolExecutor", "concurrent.futures.process"),
}
FORBIDDEN_BUILTINS = {"eval", "exec"}
FORBIDDEN_TRUE = {"shell", "allow_pickle", "trust_remote_code"}


def forbidden_names(sources: Iterable[Source]) -> list[str]:
    """Code that turns data into behaviour: pickles, eval, shells, process pools (they pickle)."""
    out = []
    for source in sources:
        for edge in imports(source):
            if edge.top in FORBIDDEN_MODULES or f"{edge.target}.".startswith(tuple(f"{n}." for n in FORBIDDEN_NAMES)):
                out.append(source.at(edge.node, f"import of {edge.target}"))
        for node in source.nodes:
            name = dotted(node)
            if name in FORBIDDEN_NAMES | FORBIDDEN_BUILTINS or name.endswith(".ProcessPoolExecutor"):
                out.append(source.at(node, name))
            elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_TRUE and ast.unparse(node.value) != "False":
                out.append(source.at(node.value, f"{node.arg}={ast.unparse(node.value)}"))
    return out


ENV_FILE = "base/env.py"


def environment_reads(sources: Iterable[Source]) -> list[str]:
    out = []
    for source in sources:
        if source.path == ENV_FILE:
            continue
        names = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
        out += [source.at(n, dotted(n)) for n in source.nodes if isinstance(n, ast.Attribute) and dotted(n) in names]
        out += [source.at(e.node, f"import of {e.target}") for e in imports(source) if e.target in names]
        out += [source.at(n.value, "envvar=") for n in source.nodes if isinstance(n, ast.keyword) and n.arg == "envvar"]
    return out


def environment_variables(source: Source) -> set[str]:
    return {s.value for s in strings(source) if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", s.value)}


def strings(source: Source) -> Iterator[ast.Constant]:
    """String constants, docstrings and other bare strings left out."""
    bare = {id(node.value) for node in source.nodes if isinstance(node, ast.Expr)}
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node


MODEL_WORDS = re.compile(r"(?i)device|cuda|(^|_)cpu|quant|lora|process_?group|world_size|(^|_)rank$")


def model_mentions(sources: Iterable[Source]) -> list[str]:
    """models/ holds mathematics: no word of where it runs, in which format, with which adapter or neighbours."""
    out = []
    for source in sources:
        if source.room != "models":
            continue
        words = [(n, n.value) for n in strings(source)]
        for node in source.nodes:
            for field in ("id", "attr", "arg", "name"):
                if isinstance(word := getattr(node, field, None), str):
                    words.append((node, word))
        out += [source.at(node, f"mentions {word!r}") for node, word in words if MODEL_WORDS.search(word)]
    return out


DEVICE_NAME = re.compile(r"(cuda|cpu|mps|xpu|hip|rocm)(:\d+)?")


def device_tests(sources: Iterable[Source]) -> list[str]:
    """Comparing a device with a name is a hidden variant; variants are chosen once, in the places listed here."""
    out = []
    for source in sources:
        if source.room in ("kernels", "assemble") or source.path == "runtime/memory.py":
            continue
        for node in source.nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu", "is_mps"):
                out.append(source.at(node, f".{node.attr}"))
            elif isinstance(node, ast.Attribute) and dotted(node) == "torch.cuda.is_available":
                out.append(source.at(node, dotted(node)))
            tested: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                tested = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                tested = [node.value]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
                tested = list(node.args)
            for constant in (c for t in tested for c in ast.walk(t) if isinstance(c, ast.Constant)):
                if isinstance(constant.value, str) and DEVICE_NAME.fullmatch(constant.value):
                    out.append(source.at(node, f"device tested by name: {constant.value!r}"))
    return out


# -- what is public ------------------------------------------------------------------------------------------------


def broken_exports(sources: Iterable[Source]) -> list[str]:
    """A package either says what it exports in ``__all__``, and has all of it, or holds nothing but a docstring."""
    out = []
    for source in sources:
        bound = set(bound_names(source))
        exported = exported_names(source)
        if exported is None:
            bare = all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in source.tree.body)
            if source.path.endswith("__init__.py") and not bare:
                out.append(f"{source.path}:1: holds code but no __all__")
            continue
        out += [f"{source.path}:1: __all__ names {name!r}: not there" for name in exported if name not in bound]
    return out


def exported_names(source: Source) -> list[str] | None:
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def bound_names(source: Source) -> Iterator[str]:
    """Names at module level. TYPE_CHECKING imports count only where ``__getattr__`` can deliver them."""
    body = list(source.tree.body)
    late = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in body)
    for node in body:
        if isinstance(node, ast.If) and (late or not dotted(node.test).endswith("TYPE_CHECKING")):
            body += node.body
        elif isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
