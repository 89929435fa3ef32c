"""The page of the one-answer grid hides neither an answer that differed nor a pair of values that did not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import answers
from house import ROOT

sys.path.append(str(ROOT / "tests" / "cpu"))
import gridcells
import gridrecord
from grid import AXES, KINDS, PLAIN

RUN = dict.fromkeys(("commit", "processor", "isa", "penstock", "python", "torch", "system"), "x")


def line(differ: int, **values: object) -> dict[str, object]:
    """One engine in which every answer has three tokens and two numbers; the gap's is another if ``differ``."""
    told = {"model": "norms", "arithmetic": "cpu int8"} | {name: str(v) for name, v in (PLAIN | values).items()}
    return {"cell": str(values), "values": told, "kinds": {name: [3, 2, differ * (name == "gap")] for name in KINDS}}


def test_the_table_tells_what_differed_and_what_did_not_run() -> None:
    told = gridrecord.added_up(RUN, [line(0), line(1, chunk=29)])
    page = answers.page(told)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("|")]
    each = str(3 * len(KINDS)), str(2 * len(KINDS))
    assert ["chunk", AXES["chunk"].says, "512", "1", *each, "0"] in rows
    assert ["", "", "29", "1", *each, "1"] in rows and ["", "", "8", "0", "0", "0", "0"] in rows
    assert ["gap", KINDS["gap"].says, "2", "6", "4", "1"] in rows
    assert ["greedy", KINDS["greedy"].says, "2", "6", "4", "0"] in rows
    matrix = rows[rows.index(["", "model", "arithmetic", *AXES]) :]
    assert ["chunk", *["**1 differ**"] * 3] in [row[:4] for row in matrix] and "**1 answers differed**" in page
    page = answers.page(gridrecord.added_up(RUN, [line(0, threads=number) for number in AXES["threads"].values]))
    assert "| threads | 0 | 0 | 0 |" in page and "and none differed" in page


def test_the_page_says_when_the_kernels_are_no_longer_those() -> None:
    of_today = RUN | {"kernels": gridrecord.kernels_digest()}
    for run, told in ((of_today, False), (RUN | {"kernels": "others"}, True), (RUN, True)):
        assert ("the kernels have changed since" in answers.page(gridrecord.added_up(run, [line(0)]))) is told


def test_a_run_may_go_on_at_a_later_commit_with_the_same_kernels(tmp_path: Path) -> None:
    def record(name: str, **about: str) -> None:
        lines = [RUN | {"kernels": "k"} | about, line(0, chunk=name)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))

    record("1", commit="a")
    record("2", commit="b")
    run, cells = gridrecord.read(tmp_path)
    assert run["commit"] == "a, b" and len(cells) == 2
    record("3", kernels="others")
    with pytest.raises(ValueError, match="the same kernels"):
        gridrecord.read(tmp_path)


def test_each_form_of_the_weights_has_all_pairs_in_the_quick_cells() -> None:
    every = set().union(*map(gridcells.pairs, gridcells.covering_array(gridcells.values_of(), seed=7)))
    quick = [(world, cell) for world, cell, slow in gridcells.arrays().values() if not slow]
    for names in gridcells.weights_forms().values():
        cells = [cell for world, cell in quick if world.arithmetic in names]
        assert set().union(*map(gridcells.pairs, cells)) == every and len(cells) <= 60


def test_without_a_run_there_are_no_figures() -> None:
    page = answers.page(None)
    assert "engines |" not in page and "full run\n" not in page
