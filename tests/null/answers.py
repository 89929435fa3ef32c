"""docs/reference/one-answer.md: what the one-answer grid asks, and what its last full run compared (``make docs``)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from house import ROOT

HEAD = """# What one answer is tested with

Every kind of request below is compared, bit for bit, with itself alone in the plainest engine, while all the others
run beside it: texts, tokens, logprobs, prompt logprobs, scores and vectors
([why, and how](../explanation/one-answer.md)).

`make test` runs engines in which every pair of two values of the circumstances, arithmetics and models occurs, and
for each form of the weights every pair of two circumstances (of `ref`, which is slow, one engine).
`make test-all` runs, for each model and arithmetic, every pair of two circumstances, and for the trained model and two
others all combinations of them; threads, faults, lost engines and replay are drawn for each, and where nobody else asks
few blocks and priorities are left out. There 8-bit KV stands with 8-bit weights alone; its pairs are with all.

This page is generated from the code (`make docs`), and so are its figures from the record of a full run{recorded}.
"""
RUN = """
## The last full run

{date}, commit {commit}: {engines:,} engines answered with {tokens:,} tokens and {logprobs:,} logprobs and other
numbers, {compared}{since}. {processor}, instruction set {isa}; Penstock {penstock}, Python {python}, torch
{torch}, {system}.

    GRID_RECORD=/tmp/record OMP_NUM_THREADS=1 python -m pytest -q -n 2 --timeout=0 --all tests/cpu/test_grid.py
    python tests/cpu/gridrecord.py /tmp/record
    make docs

Engines in which the rarest pair of values of a row and a column occurred; where answers differed, how many did:

"""
TAIL = """
| not promised | |
| --- | --- |
| `torch` kernels | library kernels sum in an order that changes with the shape of the batch and the number of threads |
| one arithmetic and another | backends, dtypes and instruction sets round differently; they are compared by tolerance |
"""
COLUMNS = ("engines", "tokens", "numbers", "differ")
Told = Mapping[str, Any]
"""What gridrecord.py wrote: of the values of two axes, the figures in ``COLUMNS``."""


def one_answer_page() -> str:
    path = ROOT / "docs" / "reference" / "one-answer.json"
    return page(json.loads(path.read_text("utf-8")) if path.exists() else None)


def page(told: Told | None) -> str:
    """``told``: None if there was no full run; the page then has no figures."""
    sys.path.append(str(ROOT / "tests" / "cpu"))
    import grid

    axes = [
        (name if first else "", axis.says if first else "", ", ".join(map(shown, some)), *figures(told, name, some[0]))
        for name, axis in grid.AXES.items()
        for first, some in rows_of(axis.values, each=told is not None)
    ]
    requests = [(name, kind.says, *figures(told, "request", name)) for name, kind in grid.KINDS.items()]
    models = [(name, model.says, *figures(told, "model", name)) for name, model in grid.MODELS.items()]
    arithmetics = [
        (name, ", ".join(f"{key} = {value}" for key, value in options.items()), *figures(told, "arithmetic", name))
        for name, options in grid.ARITHMETICS.items()
    ]
    refused = [(r.one, r.other, r.why, f"`{r.code}`") for r in grid.REFUSED]
    columns = () if told is None else COLUMNS
    values = {name: axis.values for name, axis in grid.AXES.items()}
    values = {"model": (*grid.MODELS,), "arithmetic": (*grid.ARITHMETICS,)} | values | {"request": (*grid.KINDS,)}
    tables = (
        (("circumstance", "", "value", *columns), axes),
        (("request", "", *columns), requests),
        (("model", "", *columns), models),
        (("arithmetic", "options", *columns), arithmetics),
        (("cannot be had together", "", "why", "error"), refused),
    )
    head = HEAD.format(recorded=", of which there is none yet" if told is None else "")
    return head + "".join("\n" + table(*each) for each in tables) + TAIL + ("" if told is None else run(told, values))


def rows_of(values: tuple[Any, ...], *, each: bool) -> list[tuple[bool, tuple[Any, ...]]]:
    """Values that share a row, and whether it is the first: one each if there are figures, else all."""
    return [(i == 0, (value,)) for i, value in enumerate(values)] if each else [(True, values)]


def figures(told: Told | None, axis: str, value: object) -> list[str]:
    """Of one value, in all models together. All zero if it has not run."""
    if told is None:
        return []
    other, place = ("arithmetic", 0) if axis == "model" else (axis, 1)
    pairs = told["pairs"].get(f"model, {other}", {})  # an axis that is new has not run
    rows = [row for pair, row in pairs.items() if pair.split(", ")[place] == str(value)]
    return [f"{sum(column):,}" for column in zip(*rows, strict=True)] or ["0"] * len(COLUMNS)


def run(told: Told, values: Mapping[str, tuple[Any, ...]]) -> str:
    import gridrecord

    whole = [sum(column) for column in zip(*told["pairs"]["model, arithmetic"].values(), strict=True)]
    engines, tokens, logprobs, differ = whole
    compared = f"and **{differ:,} answers differed**" if differ else "and none differed"
    since = "" if told["run"].get("kernels") == gridrecord.kernels_digest() else "; **the kernels have changed since**"
    head = RUN.format(engines=engines, tokens=tokens, logprobs=logprobs, compared=compared, since=since, **told["run"])
    rows = [
        (one, *(rarest(told["pairs"].get(f"{other}, {one}", {}), values[other], values[one]) for other in before))
        for place, one in enumerate(values)
        if (before := list(values)[:place])
    ]
    width = len(values)
    return head + table(("", *list(values)[:-1]), [row + ("",) * (width - len(row)) for row in rows])


def rarest(pairs: Mapping[str, list[int]], ones: tuple[Any, ...], others: tuple[Any, ...]) -> str:
    """Engines with the pair of values that occurred least, or answers that differed in any."""
    rows = [pairs.get(f"{one}, {other}", [0] * len(COLUMNS)) for one in ones for other in others]
    differ = sum(row[-1] for row in rows)
    return f"**{differ} differ**" if differ else str(min(row[0] for row in rows))


def shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))
