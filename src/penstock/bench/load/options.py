"""What ``penstock bench serve`` and ``latency`` can be asked: every field is an option of theirs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest
from penstock.bench.load.lengths import FORMS, parse_lengths

SCENARIOS = {
    "offline": {},
    "server": {"ttft": 2.0, "tpot": 0.2},
    "interactive": {"ttft": 0.45, "tpot": 0.04},
}
"""MLPerf Inference 5.0, Llama 2 70B: the limits of p99 in each."""
LIMITS = ("ttft", "itl", "tpot", "e2e")


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata=_told(help, low, high))


def _told(help: str, low: float | None = None, high: float | None = None, flag: str = "") -> dict[str, Any]:
    return {"help": help, "low": low, "high": high, "flag": flag}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Lists are texts with commas between; ``loads`` and ``limits`` read them."""

    url: str | None = option(None, "server to measure, any of OpenAI's API; without it one is started here and ended")
    api_key: str | None = option(None, "key that it wants")
    model: str | None = option(
        None, "what a server of its own serves, the bundled model if left out; with --url, the name to ask for"
    )
    chat: bool = option(False, "ask /chat/completions, not /completions")
    requests: int = option(200, "sessions at each load", low=1, high=1_000_000)
    input_len: str = option("128", f"tokens of a prompt: {FORMS}")
    output_len: str = option("64", "tokens asked for, in the same forms")
    prompts: Path | None = field(default=None, metadata=_told("file of prompts instead: a line each, or JSON lines"))
    trace: Path | None = field(
        default=None, metadata=_told("recorded traffic instead: Azure, Mooncake, Vidur or ServeGen, .gz and .zst too")
    )
    length_scale: float = option(1.0, "of a trace's lengths", low=1e-4, high=100)
    turns: int = option(1, "of a conversation; each prompt holds all before it", low=1, high=1000)
    think: float = option(0.0, "seconds between an answer and the next turn", low=0, high=86400)
    shared_prefix: int = option(0, "tokens at the head of prompts that a group has in common", low=0, high=1_000_000)
    prefix_groups: int = option(1, "groups, each with a shared prefix of its own", low=1, high=1_000_000)
    rate: str | None = option(None, "sessions that arrive in a second, inf for all at once; several with commas")
    burstiness: float = option(1.0, "shape of the Gamma distribution of intervals: 1 is Poisson", low=0.01, high=1000)
    concurrency: str | None = option(
        None,
        "sessions at a time, the next when one ends; several with commas; with --rate, most at a time  [default: 8]",
    )
    scenario: str | None = option(
        None, "of MLPerf: offline (all at once), server or interactive (search for the largest rate within p99 limits)"
    )
    tolerance: float = option(0.05, "ratio less 1 at which that search ends", low=0.005, high=1)
    slo: str = option("", "limits in seconds for goodput, and of a scenario: ttft=0.5,itl=0.05,tpot=0.1,e2e=9")
    warmup: int = option(8, "requests before, which are not counted", low=0, high=100_000)
    seed: int = option(0, "of lengths, prompts and arrivals", low=0, high=2**63)
    ignore_eos: bool = option(True, "have each answer as long as asked, which OpenAI's own servers do not know")
    temperature: float = option(0.0, "of the draw", low=0, high=100)
    extra_body: str | None = option(None, "JSON object of further fields of each request")
    vocabulary: int | None = option(
        None, "prompts of random token ids below this, exactly as long as asked, not of words", low=1, high=10_000_000
    )
    timeout: float = option(600.0, "seconds for a request", low=0.1, high=86400)
    price_per_hour: float | None = option(None, "dollars of the server, for tokens per dollar", low=0, high=1e6)
    verify: int = option(
        0, "answers to ask for again afterwards, one at a time: the text must be the same", low=0, high=1_000_000
    )
    quick: bool = option(False, "three loads and short texts, in less than a minute")
    json_file: Path | None = field(
        default=None, metadata=_told("write everything to this file; - is stdout", flag="--json")
    )
    html_file: Path | None = field(default=None, metadata=_told("write a page with plots to this file", flag="--html"))

    def __post_init__(self) -> None:
        """Raises InvalidRequest: (invalid_parameter) a value out of range, or two that exclude each other."""
        for each in fields(self):
            value, low, high = getattr(self, each.name), each.metadata["low"], each.metadata["high"]
            if low is not None and value is not None and not low <= value <= high:
                raise refused(each.name, value, f"it must be from {low:.12g} to {high:.12g}")
        for name in ("input_len", "output_len"):
            parse_lengths(_flag(name), getattr(self, name))
        parse_slo(self.slo)
        self.loads()
        self.extra()
        given = [name for name in ("prompts", "trace") if getattr(self, name) is not None]
        if len(given) > 1 or (given and (self.turns > 1 or self.shared_prefix)):
            raise refused(
                given[0],
                getattr(self, given[0]),
                "it excludes other workloads: --prompts, --trace, --turns, --shared-prefix",
            )
        if self.scenario is not None and self.scenario not in SCENARIOS:
            raise refused("scenario", self.scenario, f"it must be one of {', '.join(SCENARIOS)}")
        if self.scenario is not None and (self.rate or self.concurrency):
            raise refused("scenario", self.scenario, "it decides the load: leave out --rate and --concurrency")

    @classmethod
    def default(cls, name: str) -> Any:
        return next(each.default for each in fields(cls) if each.name == name)

    def loads(self) -> list[Load]:
        """What is measured, one after the other."""
        rates = [Load("rate", rate) for rate in _numbers("rate", self.rate, float)]
        workers = [Load("concurrency", n) for n in _numbers("concurrency", self.concurrency, int)]
        if rates and len(workers) > 1:
            raise refused("concurrency", self.concurrency, "with --rate it is one number, the most at a time")
        if self.quick and not (rates or workers or self.scenario):
            return [Load("concurrency", n) for n in (1, 8, 32)]
        if rates:
            return [Load("rate", load.value, int(workers[0].value) if workers else None) for load in rates]
        return workers or [Load("trace", 0.0) if self.trace else Load("concurrency", 8)]

    def limits(self) -> dict[str, float]:
        return parse_slo(self.slo) or SCENARIOS.get(self.scenario or "", {})

    def extra(self) -> dict[str, Any]:
        """Fields of every request's body."""
        try:
            more = json.loads(self.extra_body or "{}")
        except ValueError:
            more = None
        if not isinstance(more, dict):
            raise refused("extra_body", self.extra_body, "it must be an object in JSON")
        return {"temperature": self.temperature} | ({"ignore_eos": True} if self.ignore_eos else {}) | more


@dataclass(frozen=True, slots=True)
class Load:
    """``kind``: rate (sessions a second), concurrency (sessions at a time) or trace (at its own times). ``most``: in
    flight at a time, where there is a rate."""

    kind: str
    value: float
    most: int | None = None

    def __str__(self) -> str:
        if self.kind == "trace":
            return "as recorded"
        if self.kind == "concurrency":
            return f"{self.value:g} at a time"
        return "all at once" if math.isinf(self.value) else f"{self.value:.4g}/s"


def parse_slo(text: str) -> dict[str, float]:
    """Limits in seconds of "ttft=0.5,itl=0.05". Raises InvalidRequest: invalid_parameter."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        if name not in LIMITS or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) or float(value) <= 0 or name in found:
            why = f"it must be like ttft=0.5,itl=0.05: seconds, of {', '.join(LIMITS)}"
            raise InvalidRequest("invalid_parameter", f"--slo {text!r} cannot be used", why=why)
        found[name] = float(value)
    return found


def _numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[float]:
    if text is None:
        return []
    try:
        found: list[float] = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    most = 65536 if kind is int else math.inf
    if not found or not all(0 < number <= most for number in found):
        raise refused(name, text, f"it must be numbers above 0 with commas between{', whole ones' * (kind is int)}")
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refused(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest("invalid_parameter", f"{_flag(name)} {str(value)!r} cannot be used", why=why)
