"""Lengths of prompts and completions, drawn from a named distribution."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from penstock.base import InvalidRequest

LONGEST = 10_000_000
FORMS = "128, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:LARGEST"


@dataclass(frozen=True, slots=True)
class Lengths:
    """``fixed``: always ``a``. ``uniform``: the integers from ``a`` to ``b``. ``lognormal``: of median ``a``, whose
    logarithm deviates by ``b``; what is above ``largest`` counts as ``largest``."""

    kind: str
    a: float
    b: float = 0.0
    largest: int = LONGEST

    def draw(self, rng: random.Random) -> int:
        if self.kind == "fixed":
            return int(self.a)
        if self.kind == "uniform":
            return rng.randint(int(self.a), int(self.b))
        return max(1, min(self.largest, round(rng.lognormvariate(math.log(self.a), self.b))))


def parse_lengths(option: str, text: str) -> Lengths:
    """Raises InvalidRequest: (invalid_parameter) it is none of FORMS, or out of range."""
    number = r"(\d+(?:\.\d+)?)"
    if (found := re.fullmatch(r"(?:fixed:)?(\d+)", text)) and 1 <= int(found[1]) <= LONGEST:
        return Lengths("fixed", int(found[1]))
    if (found := re.fullmatch(r"uniform:(\d+):(\d+)", text)) and 1 <= int(found[1]) <= int(found[2]) <= LONGEST:
        return Lengths("uniform", int(found[1]), int(found[2]))
    if found := re.fullmatch(rf"lognormal:{number}:{number}(?::(\d+))?", text):
        largest = int(found[3] or LONGEST)
        if float(found[1]) >= 1 and float(found[2]) <= 5 and 1 <= largest <= LONGEST:
            return Lengths("lognormal", float(found[1]), float(found[2]), largest)
    why = f"it must be like {FORMS}, tokens from 1 to {LONGEST}"
    raise InvalidRequest("invalid_parameter", f"{option} {text!r} cannot be used", why=why)
