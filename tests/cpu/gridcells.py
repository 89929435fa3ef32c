"""Which engines the one-answer grid compares (grid.py says of what). Imports no torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grid import ARITHMETICS, AXES, CROSSED, MODELS, Cell

SLICED = ("mates", "chunk", "block")
"""Axes of the full product whose values are tests of their own, which processes share."""
DRAWN = ("threads", "engine", "faults", "eager")
"""Axes that are not in the full product: each of its cells draws a value."""


@dataclass(frozen=True)
class World:
    """A model, and what computes it."""

    model: str
    arithmetic: str

    def __str__(self) -> str:
        return f"{self.model} {self.arithmetic}"


PRODUCTS = [World("trained", name) for name in ARITHMETICS if name not in ("ref float32", *CROSSED)] + [
    World("windows", "ref float32"),
    World("windows", "cpu bfloat16"),
    World("experts", "cpu int8"),
]
SLICES = list(itertools.product(*(AXES[name].values for name in SLICED)))


def label(world: World, cell: Cell) -> str:
    return "-".join(map(str, (world.model, *world.arithmetic.split(), *cell.values())))


def arrays() -> dict[str, tuple[World, Cell, bool]]:
    """By its label, each cell of the pairs, and whether it is too slow for `make test`.

    Every pair of values of two axes, the model and the arithmetic being two of them, and of two circumstances for each
    form of the weights; of ``ref``, whose engines take ten times as long, one engine is not slow. And slow, for each
    arithmetic and model every pair of values. Worlds stay together, so that a process of the tests meets few of them
    and makes few baselines.
    """
    cells = {}
    for seed, (name, model) in enumerate(itertools.product(ARITHMETICS, MODELS)):
        for cell in covering_array(values_of(), seed):
            cells[label(World(model, name), cell)] = World(model, name), cell, True
    worlds = {"arithmetic": tuple(ARITHMETICS), "model": tuple(MODELS)}
    quick = covering_array(values_of() | worlds, seed=4)
    for seed, names in enumerate(weights_forms().values()):
        have = [{axis: cell[axis] for axis in AXES} for cell in quick if cell["arithmetic"] in names]
        more = covering_array(values_of(), seed, have)
        quick += [
            cell | {"arithmetic": names[i % len(names)], "model": worlds["model"][(i + seed) % len(MODELS)]}
            for i, cell in enumerate(more)
        ]
    quick.sort(key=lambda each: [worlds[axis].index(each[axis]) for axis in worlds])
    for index, each in enumerate(quick):
        world, cell = World(each["model"], each["arithmetic"]), {axis: each[axis] for axis in AXES}
        cells[label(world, cell)] = world, cell, index > 0 and ARITHMETICS[each["arithmetic"]]["backend"] == "ref"
    return cells


def weights_forms() -> dict[str, list[str]]:
    """Arithmetics of the native kernels, by what the weights are in."""
    forms = dict[str, list[str]]()
    for name, options in ARITHMETICS.items():
        if options["backend"] == "cpu":
            forms.setdefault(options.get("quant", options["dtype"]), []).append(name)
    return forms


def product(world: World, sliced: tuple[Any, ...]) -> Iterator[Cell]:
    """All combinations of the values of all axes but those DRAWN, of this slice."""
    rng, others = random.Random(f"{world} {sliced}"), [name for name in AXES if name not in SLICED + DRAWN]
    for values in itertools.product(*(AXES[name].values for name in others)):
        cell = dict(zip(SLICED + tuple(others), sliced + values, strict=True))
        if cell["mates"] == "none" and (cell["pool"] == "tight" or cell["policy"] == "priority"):
            continue  # where nobody competes; the pairs are in the arrays
        yield cell | {name: rng.choice(AXES[name].values) for name in DRAWN}


def covering_array(axes: Mapping[str, tuple[Any, ...]], seed: int = 0, have: Iterable[Cell] = ()) -> list[Cell]:
    """Cells that, beside those there are, make every pair of values of two axes occur; greedy over random ones."""
    rng, names = random.Random(seed), list(axes)
    missing = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
    }.difference(*map(pairs, have))
    cells = []
    while missing:
        candidates = [{name: rng.choice(values) for name, values in axes.items()} for _ in range(100)]
        best = max(candidates, key=lambda c: len(missing & pairs(c)))
        if missing & pairs(best):
            missing -= pairs(best)
            cells.append(best)
    return cells


def pairs(values: Cell) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def values_of(axes: Iterable[str] = AXES) -> dict[str, tuple[Any, ...]]:
    return {name: AXES[name].values for name in axes}
