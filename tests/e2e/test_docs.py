"""What the pages show is what happens: the blocks of the tutorials, the how-to pages and the explanations are run.

On a page the ``sh`` blocks run first, in order in one shell, then the ``python`` blocks, in order in one interpreter,
all of them in one folder that is empty at the start. A block that begins with ```` ```sh not-run ```` is left out. Two
things differ from what a reader types: ``penstock serve`` goes on in the background, and port 8000 is a free one.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import commands

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path for kind in ("tutorial", "how-to", "explanation") for path in (DOCS / kind).glob("*.md"))
NOT_RUN = 3
"""Blocks that are shown and not run, on all pages together: they name models that would be downloaded."""


class Block(NamedTuple):
    line: int
    language: str
    not_run: bool
    text: str


def blocks(path: Path) -> Iterator[Block]:
    page = path.read_text("utf-8")
    for found in re.finditer(r"^```(\w*)(.*)\n((?:.*\n)*?)```$", page, re.MULTILINE):
        yield Block(page[: found.start(3)].count("\n"), found[1], found[2].split() == ["not-run"], found[3])


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with a ``penstock`` and a ``python`` that need no second to import what they need."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("penstock", "python"):
        script = (
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import commands\ncommands.as_client({commands.nursery()!r}, {name!r})\n"
        )
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tools: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shell, python = [], []
    for block in blocks(page):
        assert block.language in ("sh", "python"), f"line {block.line}: a block in {block.language or 'no language'}"
        if not block.not_run:
            text = block.text.replace("8000", port)
            (shell if block.language == "sh" else python).append(f"\n# line {block.line}\n{text}")
    script = re.sub(
        r"^(penstock serve.*)$",
        r"\1 > server.log & while ! grep -q Serving server.log; do sleep 0.05; done",
        "".join(shell),
        flags=re.MULTILINE,
    )
    if python:
        (tmp_path / "page.py").write_text("".join(python))
        script += "\npython page.py\n"
    script = f"set -euo pipefail\nPATH={tools}:$PATH\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{page.name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip() or not (shell or python)


def test_nearly_all_blocks_are_run() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert len(every) > 40 and sum(block.not_run for block in every) <= NOT_RUN


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n```sh\nb\nc\n```\n\n```python not-run\nd\n```\n\n```\n```\n")
    assert list(blocks(page)) == [
        Block(3, "sh", False, "b\nc\n"),
        Block(8, "python", True, "d\n"),
        Block(12, "", False, ""),
    ]


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text("utf-8")
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md") if "decisions" not in path.parts]
    assert not [page for page in pages if page != "index.md" and f"({page})" not in index]
