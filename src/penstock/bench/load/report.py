"""What is written of a run: the JSON of ``--json`` is these classes, field by field.

SCHEMA changes when a field changes its meaning or goes; new fields may come without.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest, NotFound
from penstock.bench.load.checks import ClientLoad
from penstock.bench.load.metrics import DEFINITIONS, Figures

SCHEMA = "penstock.bench/1"


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Of a server that was started here, or whose machine this is.

    Attributes:
        cpu: processors that it and its children kept busy during the run.
        peak_bytes: greatest resident memory since it started.
        growth: of resident memory, from the second tenth of the run to the last; None for a run too short to tell.
    """

    cpu: float
    peak_bytes: int
    growth: float | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """Of what this machine allows.

    Attributes:
        least_seconds: for the requests' products, and for reading weights and KV once for each step of as many requests
            as there were in flight on average, at the rates measured before and after.
        share: of the run's seconds. A server that waits for arrivals cannot reach 1.
    """

    least_seconds: float
    share: float
    read_gb_per_s: float
    matmul_gflops: float


@dataclass(frozen=True, slots=True)
class Money:
    """Dollars at ``per_hour``, all of it counted against the tokens named.

    Attributes:
        per_million_good: output tokens of requests that met the limits; None without limits, or if none did.
    """

    per_hour: float
    per_million_output: float | None
    per_million_all: float | None
    per_million_good: float | None
    output_tokens_per_dollar: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """One load.

    Attributes:
        load: in words; ``kind`` and ``value`` are the same for machines (rate, concurrency, trace, offline).
        joules: of this machine's packages during the run; None if ``joules_why`` says why not.
        verified: answers that were asked for again by themselves, and how many of them came out otherwise.
        requests: each as [due, sent, first text, end, prompt tokens, output tokens, error], seconds of the run.
    """

    load: str
    kind: str
    value: float
    figures: Figures
    client: ClientLoad | None = None
    server: ServerLoad | None = None
    limit: Share | None = None
    joules: float | None = None
    joules_why: str = ""
    money: Money | None = None
    verified: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()
    requests: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Search:
    """For the largest rate whose p99 of each limit, or all but 1 % of whose requests, are within it.

    Attributes:
        probes: (sessions a second, passed) in order; each is a Point as well.
    """

    scenario: str
    limits: dict[str, float]
    rate: float
    failed: float | None
    confirmed: bool
    tolerance: float
    probes: tuple[tuple[float, bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Attributes:
    bench: offline, serve or latency.
    server: what was measured: its URL or its command.
    workload: every option that decides what is asked, by name.
    prompts: how they were made.
    """

    bench: str
    date: str
    penstock: str
    machine: str
    server: str
    model: str
    workload: dict[str, Any]
    prompts: str
    points: tuple[Point, ...]
    search: Search | None = None
    notes: tuple[str, ...] = ()
    definitions: dict[str, str] = field(default_factory=lambda: dict(DEFINITIONS))
    schema: str = SCHEMA


def money(figures: Figures, per_hour: float) -> Money:
    dollars = per_hour * figures.seconds / 3600

    def per_million(tokens: int | None) -> float | None:
        return 1e6 * dollars / tokens if tokens else None

    return Money(
        per_hour,
        per_million(figures.output_tokens),
        per_million(figures.input_tokens + figures.output_tokens),
        per_million(figures.good_tokens),
        figures.output_tokens / dollars if dollars else None,
    )


def as_json(report: Report) -> str:
    return json.dumps(_plain(dataclasses.asdict(report)), allow_nan=False)


def _plain(value: Any) -> Any:
    """Six significant digits, and null for what is no number: JSON has none for it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_points(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(model, point) of files that ``--json`` wrote.

    Raises:
        NotFound: (file_not_found). InvalidRequest: (invalid_report) a file of another kind or schema.
    """
    found = []
    for path in paths:
        try:
            report = json.loads(path.read_text("utf-8"))
            schema, model, points = report["schema"], report["model"], report["points"]
        except FileNotFoundError:
            raise NotFound("file_not_found", f"There is no file {path}", fix="check the path") from None
        except (OSError, ValueError, LookupError, TypeError):
            schema, model, points = "none", "", []
        if schema != SCHEMA:
            why = f"its schema is {str(schema)[:40]!r}, not {SCHEMA!r}"
            fix = "give a file that penstock bench serve, latency or offline wrote with --json"
            raise InvalidRequest("invalid_report", f"{path} cannot be used as a report", why=why, fix=fix)
        found += [(str(model), point) for point in points]
    return found
