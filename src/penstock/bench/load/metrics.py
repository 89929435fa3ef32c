"""From records of requests to figures. Pure: the same records give the same figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from penstock.bench.load.drive import Record
from penstock.bench.load.stats import Spread, percentile, spread

DEFINITIONS = {
    "TTFT": "time to first token: from when the request was due to its first event with text",
    "ITL": "inter-token latency: from an event with text to the next of the same request",
    "TPOT": "time per output token: from the first event with text to the last, over tokens - 1",
    "E2E": "end to end: from when the request was due to the last byte of its answer",
    "late": "from when the request was due to when the client sent it",
}
"""Due is the intended arrival: the wait for a client or a server that cannot keep up counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run came to. Failed requests count in ``errors`` and against goodput, in nothing else.

    Attributes:
        requests, succeeded: sent, and answered to the end with text.
        errors: code -> requests.
        seconds: from the first request due to the last answer's end.
        offered_per_s: requests due a second while any were still due; None where answers decide when the next is due.
        input_tokens, output_tokens: by the server's usage; events with text where it brings none.
        cached_tokens: of the input, those it had computed before; None if it does not say.
        events: with text.
        in_flight: requests at a time, on average.
        peak_in_flight: most of them at a time.
        good: requests that met every limit of ``slo``; None without one.
        output_per_s_95: 95 % interval of output tokens a second, by the spread of ten equal parts of the run; None for
            runs too short for that.
    """

    requests: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    offered_per_s: float | None
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    events: int
    input_per_s: float
    output_per_s: float
    output_per_s_95: tuple[float, float] | None
    in_flight: float
    peak_in_flight: int
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    late: Spread | None
    slo: dict[str, float] = field(default_factory=dict)
    good: int | None = None
    good_per_s: float | None = None
    good_tokens: int | None = None


def ttft(record: Record) -> float:
    return record.times[0] - record.due


def gaps(record: Record) -> list[float]:
    return [after - before for before, after in pairwise(record.times)]


def tpot(record: Record) -> float | None:
    """None with fewer than two tokens or events."""
    if record.tokens < 2 or len(record.times) < 2:
        return None
    return (record.times[-1] - record.times[0]) / (record.tokens - 1)


def e2e(record: Record) -> float:
    return record.done - record.due


def meets(record: Record, slo: dict[str, float]) -> bool:
    """``itl``: the 99th percentile of its gaps, so its longest if they are fewer than 100."""
    if record.error or not record.times:
        return False
    found = {"ttft": ttft(record), "e2e": e2e(record), "tpot": tpot(record) or 0.0}
    found["itl"] = percentile(gaps(record), 99) if len(record.times) > 1 else 0.0
    return all(found[name] <= most for name, most in slo.items())


def figures(records: Sequence[Record], slo: dict[str, float], *, open_loop: bool) -> Figures:
    """Of at least one record.

    Args:
        open_loop: arrivals did not wait for answers, so that there is a rate offered.
    """
    good_ones = [record for record in records if not record.error and record.times]
    start, end = min(record.due for record in records), max(record.done for record in records)
    seconds = max(end - start, 1e-9)
    last_due = max(record.due for record in records)
    met = [record for record in records if meets(record, slo)] if slo else []
    output = sum(record.tokens for record in good_ones)
    cached = [record.cached_tokens for record in good_ones if record.cached_tokens is not None]
    codes = Counter(record.error or "no_text" for record in records if record.error or not record.times)
    inputs = sum(record.prompt_tokens or record.asked_in or 0 for record in good_ones)
    waited = [(record.due, record.done) for record in records]
    return Figures(
        requests=len(records),
        succeeded=len(good_ones),
        errors=dict(codes.most_common()),
        seconds=seconds,
        offered_per_s=(len(records) - 1) / (last_due - start) if open_loop and last_due > start else None,
        requests_per_s=len(good_ones) / seconds,
        input_tokens=inputs,
        output_tokens=output,
        cached_tokens=sum(cached) if cached else None,
        events=sum(len(record.times) for record in good_ones),
        input_per_s=inputs / seconds,
        output_per_s=output / seconds,
        output_per_s_95=_rate_interval(good_ones, start, end),
        in_flight=sum(done - due for due, done in waited) / seconds,
        peak_in_flight=_peak(waited),
        ttft=spread([[ttft(record)] for record in good_ones]),
        itl=spread([gaps(record) for record in good_ones]),
        tpot=spread([[value] for record in good_ones if (value := tpot(record)) is not None]),
        e2e=spread([[e2e(record)] for record in good_ones]),
        late=spread([[record.sent - record.due] for record in records]),
        slo=slo,
        good=len(met) if slo else None,
        good_per_s=len(met) / seconds if slo else None,
        good_tokens=sum(record.tokens for record in met) if slo else None,
    )


PARTS, T_9 = 10, 2.262
"""Parts of a run, and the 97.5 % point of Student's t with one degree less (batch means: Law, Simulation Modeling)."""


def _rate_interval(records: Sequence[Record], start: float, end: float) -> tuple[float, float] | None:
    """Events are placed in their part of the run, each worth its request's tokens per event."""
    width = (end - start) / PARTS
    parts = [0.0] * PARTS
    for record in records:
        worth = record.tokens / len(record.times)
        for at in record.times:
            parts[min(PARTS - 1, int((at - start) / width))] += worth
    if sum(len(record.times) for record in records) < 20 * PARTS:
        return None
    rates = [part / width for part in parts]
    mean = sum(rates) / PARTS
    half = T_9 * math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (PARTS - 1) / PARTS)
    return max(0.0, mean - half), mean + half


def _peak(spans: Sequence[tuple[float, float]]) -> int:
    """Most spans that overlap; one that ends as another begins does not."""
    now = most = 0
    for _, step in sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans]):
        now += step
        most = max(most, now)
    return most
