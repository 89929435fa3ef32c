"""The page of the one-answer grid hides neither an answer that differed nor a pair of values that did not run."""

from __future__ import annotations

import sys

import answers
from house import ROOT

sys.path.append(str(ROOT / "tests" / "cpu"))
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


def test_without_a_run_there_are_no_figures() -> None:
    page = answers.page(None)
    assert "engines |" not in page and "full run\n" not in page
