"""Sums with a checker: two numbers of one or two digits, added, subtracted or multiplied.

Differences are not negative, and one factor of a product has one digit. A few hundred pairs are kept out of training,
with both orders of a pair, so that an answer to them was not read but computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

HELD_OUT_PAIRS = 400
_SPLIT_SEED = 20


@dataclass(frozen=True)
class Problem:
    """A question such as "What is 17 + 25?" and its answer, "42"."""

    left: int
    sign: str
    right: int

    @property
    def question(self) -> str:
        return f"What is {self.left} {self.sign} {self.right}?"

    @property
    def answer(self) -> str:
        a, b = self.left, self.right
        return str({"+": a + b, "-": a - b, "*": a * b}[self.sign])

    @property
    def pair(self) -> tuple[str, int, int]:
        """The same for both orders of the two numbers."""
        return self.sign, min(self.left, self.right), max(self.left, self.right)


def all_problems() -> list[Problem]:
    """Return every problem, in a fixed order."""
    numbers = range(100)
    sums = [Problem(a, "+", b) for a in numbers for b in numbers]
    differences = [Problem(a, "-", b) for a in numbers for b in range(a + 1)]
    products = [Problem(a, "*", b) for a in numbers for b in numbers if min(a, b) < 10]
    return [*sums, *differences, *products]


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """Return (for training, held out), each in one fixed random order; no pair is in both."""
    problems = all_problems()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(problems))
    shuffled = [problems[i] for i in order.tolist()]
    kept_out = set(list(dict.fromkeys(p.pair for p in shuffled))[:HELD_OUT_PAIRS])
    return [p for p in shuffled if p.pair not in kept_out], [p for p in shuffled if p.pair in kept_out]


def extract_answer(text: str) -> str | None:
    """Return the last whole number in a text, without leading zeros; None if there is none."""
    numbers = re.findall(r"-?\d+", text)
    return str(int(numbers[-1])) if numbers else None
