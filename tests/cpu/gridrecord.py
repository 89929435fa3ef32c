"""What a run of the one-answer grid compared: noted cell by cell, by every process of the tests, and added up.

    GRID_RECORD=/tmp/record OMP_NUM_THREADS=1 pytest -q -n 2 --timeout=0 --all tests/cpu/test_grid.py
    python tests/cpu/gridrecord.py /tmp/record && make docs

A run that was cut off goes on with ``--last-failed`` or ``-k`` and the same folder: a cell counts once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grid import AXES, KINDS, Cell
from gridcells import PRODUCTS, SLICES, World, arrays, label, product

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "reference" / "one-answer.json"
FIGURES = ("engines", "tokens", "logprobs", "differ")
"""Of each pair of values: engines compared, what they answered, and answers in which a bit was another one."""


def counted(answer: Any) -> tuple[int, int]:
    """Tokens, and log-probabilities or other real numbers, in an answer of whatever form."""
    if dataclasses.is_dataclass(answer):
        parts: Iterable[Any] = [getattr(answer, field.name) for field in dataclasses.fields(answer)]
    else:
        parts = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, (list, tuple)) else ()
    tokens, numbers = len(getattr(answer, "token_ids", ())), int(isinstance(answer, float))
    for part in parts:
        more = counted(part)
        tokens, numbers = tokens + more[0], numbers + more[1]
    return tokens, numbers


class Record:
    """Of one process. Without GRID_RECORD in the environment nothing is written."""

    def __init__(self, folder: str | None) -> None:
        self.file = Path(folder) / f"{os.getpid()}.jsonl" if folder else None
        self.begun = False

    def add(self, world: World, cell: Cell, rounds: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """``rounds``: what was expected of each kind of request, and what came."""
        if self.file is None:
            return
        lines = [] if self.begun else [about_the_run()]
        self.begun = True
        kinds = {}
        for name in KINDS:
            each = [(*counted(expected[name]), int(got[name] != expected[name])) for expected, got in rounds]
            kinds[name] = [sum(column) for column in zip(*each, strict=True)]
        values = {"model": world.model, "arithmetic": world.arithmetic} | cell
        told = {axis: str(value) for axis, value in values.items()}
        lines.append({"cell": label(world, cell), "values": told, "kinds": kinds})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


@cache
def about_the_run() -> dict[str, str]:
    from penstock.kernels import _native

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "kernels": kernels_digest(),
        "commit": git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else ""),
        "processor": names[0] if names else platform.machine(),
        "isa": _native.chosen(),
        "penstock": version("penstock"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def kernels_digest() -> str:
    """Of the sources of the native kernels, whose bits the record is of."""
    whole = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The run, and its cells; it may go on at later commits. Raises ValueError: of other kernels, or elsewhere."""
    runs, cells = list[dict[str, str]](), dict[str, dict[str, Any]]()
    commits = dict[str, None]()
    for file in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if "cell" not in line:
                commits[line.pop("commit")] = None
                runs += [line] if line not in runs else []
                continue
            one = cells.setdefault(line["cell"], line)
            if differing(line) > differing(one):  # what was seen once is not forgotten
                cells[line["cell"]] = line
    if len(runs) != 1:
        raise ValueError(f"{folder} must hold the records of the same kernels on one machine, and holds {runs}")
    return runs[0] | {"commit": ", ".join(commits)}, list(cells.values())


def differing(line: dict[str, Any]) -> int:
    return sum(differ for _, _, differ in line["kinds"].values())


def expected_cells() -> set[str]:
    """Labels of the arrays and the product."""
    cells = {label(world, cell) for world in PRODUCTS for sliced in SLICES for cell in product(world, sliced)}
    return cells | set(arrays())


def added_up(run: dict[str, str], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The table: for two axes ("request" is one) and a value of each, what FIGURES names."""
    pairs: dict[str, dict[str, dict[str, list[int]]]] = {}
    for line in cells:
        axes = [(axis, line["values"][axis]) for axis in ("model", "arithmetic", *AXES)]
        whole = [sum(column) for column in zip(*line["kinds"].values(), strict=True)]
        for one, other, told in (
            *((one, other, whole) for one, other in itertools.combinations(axes, 2)),
            *((one, ("request", kind), told) for one in axes for kind, told in line["kinds"].items()),
        ):
            into = pairs.setdefault(f"{one[0]}, {other[0]}", {}).setdefault(f"{one[1]}, {other[1]}", [0] * 4)
            for place, more in enumerate((1, *told)):
                into[place] += more
    told = run | {"date": datetime.now(UTC).date().isoformat(), "cells": str(len(cells))}
    return {"run": told, "figures": FIGURES, "pairs": pairs}


def written(table: dict[str, Any]) -> Iterator[str]:
    """As JSON with a line for each pair of values, so that a new run shows what changed."""
    yield "{\n" + f'"run": {json.dumps(table["run"])},\n"figures": {json.dumps(table["figures"])},\n"pairs": {{\n'
    blocks = []
    for axes, values in table["pairs"].items():
        rows = ",\n".join(f"  {json.dumps(pair)}: {json.dumps(told)}" for pair, told in values.items())
        blocks.append(f"{json.dumps(axes)}: {{\n{rows}\n}}")
    yield ",\n".join(blocks) + "\n}\n}\n"


def main(folder: str) -> None:
    run, cells = read(Path(folder))
    expected = expected_cells()
    if missing := expected - {line["cell"] for line in cells}:
        sys.exit(f"{len(missing)} of {len(expected)} cells have not run, such as {min(missing)}")
    cells = [line for line in cells if line["cell"] in expected]  # others are of an array of before
    TABLE.write_text("".join(written(added_up(run, cells))), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
