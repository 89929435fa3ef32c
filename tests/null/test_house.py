"""The house rules hold, and each of them can fail.

Each checker runs on the package, where it must find nothing, and on bad snippets, where it must find something.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

import house
import pages
import reference
from house import PACKAGE, ROOT, Source, import_table, package_sources

EXCEPTIONS: dict[str, int] = {}
"""Files, functions and classes over their limit, and their size today. This list may only shrink."""

ENGINE_OPTIONS = """
    model served_model_name device backend dtype quant weight_cache max_model_len max_num_seqs max_num_batched_tokens
    max_mixed_prefill block_size kv_memory kv_dtype gpu_memory_utilization enable_prefix_caching scheduling_policy
    priority_age_seconds depth seed tensor_parallel_size pipeline_parallel_size enforce_eager num_threads
    chat_template tool_parser reasoning_parser generation_config logits_rule
""".split()
"""Every field of EngineConfig, so every flag. A new one is a decision: it is argued for where this list is edited.

tool_parser, reasoning_parser: how a model writes calls and thoughts follows from its chat template, unless somebody
trained it to write them otherwise: only the operator can know.

kv_dtype: whether a KV cache may be rounded again is a choice of accuracy for memory that only the operator can make. It
follows neither from the model nor from ``dtype``, and it is a part of the numerics id.

weight_cache: a start that writes gigabytes to a disk must be possible to forbid, engine by engine; where they go and
how much is kept belongs to the machine and is in the environment.
"""

SOURCES = package_sources()
TABLE = import_table((ROOT / "docs" / "architecture.md").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def declared_packages() -> set[str]:
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "test"}
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in lines}
    return names | {"opentelemetry" for name in names if name.startswith("opentelemetry_")}  # they share one name


RULES: dict[str, Callable[[list[Source]], list[str]]] = {
    "import table": lambda sources: house.forbidden_imports(sources, TABLE),
    "third parties": lambda sources: house.third_party_imports(sources, declared_packages()),
    "sizes": lambda sources: house.oversized(sources, EXCEPTIONS),
    "no mixins": house.mixins,
    "forbidden names": house.forbidden_names,
    "environment": house.environment_reads,
    "models are mathematics": house.model_mentions,
    "device tests": house.device_tests,
    "exports": house.broken_exports,
}


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps_the_rule(rule: str) -> None:
    breaches = RULES[rule](SOURCES)
    assert not breaches, f"{len(breaches)} breaches of the rule {rule!r}:\n  " + "\n  ".join(breaches)


def test_core_stays_small() -> None:
    assert house.core_lines(SOURCES) <= house.CORE_LINES
    assert not any(key.startswith("core/") for key in EXCEPTIONS)


def test_every_room_is_described() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = {source.room for source in SOURCES} - {"penstock"}
    assert not {room for room in rooms if f"- **{room}" not in page}


def test_pages_name_only_what_exists() -> None:
    """Links, files in backquotes, and places in the code written as `room/file.py:Class.method`."""
    breaches = []
    for page in pages.markdown_pages():
        breaches += pages.broken_references(page.relative_to(ROOT).as_posix(), page.read_text("utf-8"), SOURCES)
    assert not breaches, "\n  ".join(breaches)


def test_engine_config_is_frozen() -> None:
    source = next(source for source in SOURCES if source.path == "spec/config.py")
    config = next(n for n in source.nodes if isinstance(n, ast.ClassDef) and n.name == "EngineConfig")
    fields = [ast.unparse(node.target) for node in config.body if isinstance(node, ast.AnnAssign)]
    assert fields == ENGINE_OPTIONS
    assert len(fields) <= 30
    assert "frozen=True" in ast.unparse(config.decorator_list[0])


def test_few_environment_variables() -> None:
    source = next(source for source in SOURCES if source.path == house.ENV_FILE)
    assert 0 < len(house.environment_variables(source)) <= 10


@pytest.mark.parametrize("module", ["penstock", "penstock.core", "penstock.sim", "penstock.cli"])
def test_import_loads_no_torch(module: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "False", loaded.stdout + loaded.stderr


def test_null_tests_import_no_torch() -> None:
    """What lies in tests/null runs on a machine without torch."""
    heavy = {"torch", "transformers", *("penstock." + r for r in TABLE if r not in house.TORCH_FREE | house.LATE_ROOMS)}
    for path in sorted((ROOT / "tests" / "null").glob("*.py")):
        for edge in house.imports(Source(f"../{path.name}", path.read_text("utf-8"))):
            assert not f"{edge.target}.".startswith(tuple(f"{name}." for name in heavy)), f"{path.name}: {edge.target}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_null_tests_run_without_torch() -> None:
    code = "import sys, pytest; sys.modules['torch'] = None; sys.exit(pytest.main(['-q', 'tests/null']))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_repository_names_no_machine_and_no_registry() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 2_000_000 and b"\0" not in (data := path.read_bytes()):
            files.append((name, data.decode("utf-8", errors="replace")))
    assert len(files) > 20
    breaches = pages.machine_traces(files)
    assert not breaches, "\n  ".join(breaches)


def test_generated_pages_are_current() -> None:
    for page, content in pages.generated_pages(SOURCES).items():
        assert page.read_text("utf-8") == content, f"{page.name}: run `make docs`"


def test_pages_name_every_route_that_asks_for_no_key() -> None:
    for name in ("SECURITY.md", "docs/reliability.md"):
        page = (ROOT / name).read_text("utf-8")
        assert [path for path in reference.open_routes() if f"`{path}`" not in page] == [], name


def test_error_codes_are_stable_names() -> None:
    codes = [site.code for site in pages.error_sites(SOURCES)]
    assert len(codes) > 10
    assert not [code for code in codes if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", code)]


def test_every_error_code_says_what_to_do() -> None:
    sites = pages.error_sites(SOURCES)
    assert not {site.code for site in sites} - {site.code for site in sites if site.fix}


# -- every rule can fail -------------------------------------------------------------------------------------------

BAD = {
    "import table": [
        ("core/a.py", "from penstock.text import stop"),
        ("core/a.py", "import penstock.runtime.runner"),
        ("core/a.py", "from penstock import LLM"),
        ("core/a.py", "from ..kernels import ops"),
        ("core/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from penstock.kernels import ops"),
        ("core/a.py", "def f():\n    import json"),
        ("kernels/ref/a.py", "def f():\n    from penstock.kernels import torch"),
        ("kernels/a.py", "import importlib\nimportlib.import_module('penstock.core.plan')"),
        ("sampling/a.py", "from penstock.core.scheduler import Scheduler"),
        ("sampling/__init__.py", "from . import draw\nfrom ..runtime import runner"),
        ("serving/a.py", "from penstock.cli import main"),
        ("attic/a.py", ""),
        ("__init__.py", "from penstock.llm import LLM"),
    ],
    "third parties": [
        ("core/a.py", "import torch"),
        ("sim/a.py", "def f():\n    from torch import nn"),
        ("text/a.py", "import msgspec"),
        ("core/a.py", "import numpy"),
        ("runtime/a.py", "import accelerate"),
        ("serving/a.py", "import fastapi"),
        ("bench/peers.py", "import vllm"),
    ],
    "sizes": [
        ("core/a.py", "x = 1\n" * 401),
        ("core/a.py", "def f():\n" + "    x = 1\n" * 60),
        ("core/a.py", "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(16))),
    ],
    "no mixins": [
        ("core/a.py", "class A: ...\nclass B(A): ..."),
        ("core/a.py", "from abc import ABC\nclass A(ABC): ...\nclass B(ABC): ...\nclass C(A, B): ..."),
        ("layers/a.py", "from torch import nn\nclass A(nn.Linear): ..."),
        ("core/a.py", "class A(dict[str, int]): ..."),
    ],
    "forbidden names": [
        ("train/a.py", "import pickle as p"),
        ("train/a.py", "from dill import loads"),
        ("train/a.py", "import torch\ntorch.load('x')"),
        ("train/a.py", "from torch import load"),
        ("train/a.py", "import yaml\nyaml.load('x')"),
        ("train/a.py", "eval('1')"),
        ("train/a.py", "run = exec"),
        ("train/a.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("train/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("train/a.py", "import multiprocessing.shared_memory"),
        ("train/a.py", "from concurrent.futures import ProcessPoolExecutor"),
        ("train/a.py", "import concurrent.futures as cf\ncf.ProcessPoolExecutor()"),
    ],
    "environment": [
        ("core/a.py", "import os\nos.environ['A']"),
        ("core/a.py", "from os import getenv"),
        ("cli/a.py", "import typer\ntyper.Option(envvar='PORT')"),
    ],
    "models are mathematics": [
        ("models/a.py", "def f(device): ..."),
        ("models/a.py", "x.to('cuda')"),
        ("models/a.py", "class QuantLinear: ..."),
        ("models/a.py", "lora_a = 1"),
        ("models/a.py", "import torch.distributed as d\nd.ProcessGroup"),
    ],
    "device tests": [
        ("layers/a.py", "if x.is_cuda: ..."),
        ("runtime/runner.py", "if device.type == 'cuda': ..."),
        ("runtime/runner.py", "if device in ('cpu', 'mps'): ..."),
        ("layers/a.py", "if str(device).startswith('cuda'): ..."),
        ("train/a.py", "import torch\ntorch.cuda.is_available()"),
    ],
    "exports": [
        ("core/__init__.py", "from penstock.core.plan import StepPlan"),
        ("core/__init__.py", "__all__ = ['Engine']"),
        ("core/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import x\n__all__ = ['x']"),
    ],
}

GOOD = {
    "import table": [
        ("core/a.py", "import json\nfrom penstock.base import env\nfrom .kv import link"),
        ("sampling/a.py", "from penstock.core.plan import StepPlan"),
        ("assemble/a.py", "def f():\n    from penstock.runtime import runner"),
        ("kernels/__init__.py", "@backends.register('ref')\ndef ref():\n    from penstock.kernels.ref import ops"),
        ("__init__.py", "def __getattr__(name):\n    from penstock import llm"),
    ],
    "third parties": [
        ("kernels/a.py", "import torch"),
        ("wire/a.py", "import msgspec"),
        ("core/a.py", "import json"),
        ("bench/side_vllm.py", "import vllm"),
    ],
    "no mixins": [
        ("core/a.py", "from typing import Protocol\nclass P(Protocol[T]): ...\nclass A(P): ..."),
        ("base/a.py", "class A(Exception): ...\nclass B(A): ..."),
    ],
    "forbidden names": [("layers/a.py", "model.eval()\njson.load(f)\nyaml.safe_load(f)\nrun(shell=False)")],
    "models are mathematics": [("models/a.py", '"""Runs on any device, quantized or not."""\nx_TD = weight @ x')],
    "device tests": [("kernels/a.py", "device.type == 'cuda'"), ("spec/a.py", "device = 'cpu'")],
    "exports": [("core/__init__.py", '"""Only words."""'), ("core/__init__.py", "from a import b\n__all__ = ['b']")],
}


@pytest.mark.parametrize(("rule", "path", "text"), [(rule, *case) for rule, cases in BAD.items() for case in cases])
def test_rule_catches(rule: str, path: str, text: str) -> None:
    assert RULES[rule]([Source(path, text)])


@pytest.mark.parametrize(("rule", "path", "text"), [(rule, *case) for rule, cases in GOOD.items() for case in cases])
def test_rule_lets_pass(rule: str, path: str, text: str) -> None:
    assert not RULES[rule]([Source(path, text)])


def test_every_rule_has_a_bad_example() -> None:
    assert set(BAD) == set(RULES)


def test_exceptions_only_shrink() -> None:
    long = [Source("core/a.py", "x = 1\n" * 401)]
    assert not house.oversized(long, {"core/a.py": 401})
    assert house.oversized(long, {"core/a.py": 402})
    assert house.oversized([Source("core/a.py", "")], {"core/a.py": 401})


def test_import_table_rejects_rows_below_and_unknown_names() -> None:
    head = "| room | may import |\n| --- | --- |\n"
    assert import_table(head + "| base | nothing |\n| a, b.py | base |\n")["b"] == {"base"}
    for row in ("| base | core |", "| base | base |", "| base | torch |"):
        with pytest.raises(ValueError, match="no row above"):
            import_table(head + row)


def test_machine_traces_are_seen() -> None:
    place, host = "/" + "root/x", "https://" + "pypi." + "org/simple"
    assert len(pages.machine_traces([("a.md", f"see {place}\nand {host}")])) == 2
    assert not pages.machine_traces([("a.md", "see ../shared/data, /v1/models and src/homework/x")])


def test_error_sites_are_read() -> None:
    text = 'class E(InvalidRequest):\n    status = 413\nraise E("too_big", f"{n} > {m}", fix="send" + " less")'
    base = Source("base/errors.py", "class InvalidRequest(PenstockError):\n    status = 400")
    (site,) = pages.error_sites([Source("serving/a.py", text), base])
    assert (site.code, site.status, site.what, site.fix) == ("too_big", 413, "… > …", "send less")


def test_codes_that_a_function_is_given_are_read_at_its_calls() -> None:
    base = Source("base/errors.py", "class InvalidRequest(PenstockError):\n    status = 400")
    maker = 'def lacks(kind, what): return InvalidRequest(f"no_{kind}", f"There is no {what}", fix="go")'
    called = Source("spec/b.py", 'from penstock.spec.a import lacks\nraise lacks("rope", f"rope of {n}")')
    other = Source("core/c.py", 'def lacks(kind): ...\nlacks("x")')
    (site,) = pages.error_sites([Source("spec/a.py", maker), called, other, base])
    assert (site.code, site.status, site.what, site.fix) == ("no_rope", 400, "There is no rope of …", "go")


def test_broken_references_are_seen() -> None:
    core = [Source("core/a.py", "X = 1\nclass A:\n    b: int\n    def c(self): ...")]
    good = "`core/a.py:A.c` `core/a.py:A.b` `core/a.py:X` `a.py` [x](architecture.md) [y](https://x.org/y.md)"
    assert pages.broken_references("docs/x.md", good, core) == []
    bad = "`core/a.py:A.d` `core/a.py:c` `core/b.py` [x](nowhere.md)"
    assert len(pages.broken_references("docs/x.md", bad, core)) == 4


def test_environment_variables_are_counted() -> None:
    source = Source("base/env.py", '"""A_B is not one."""\nos.environ.get("PENSTOCK_DEBUG")\nos.environ["HF_HOME"]')
    assert house.environment_variables(source) == {"PENSTOCK_DEBUG", "HF_HOME"}


def test_sources_were_found() -> None:
    assert len(SOURCES) >= 20
    assert {source.path for source in SOURCES} >= {"__init__.py", "base/errors.py", "core/plan.py"}
    assert PACKAGE.is_dir()
