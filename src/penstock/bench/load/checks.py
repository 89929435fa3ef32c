"""What a reader of the figures must know: reasons to doubt them, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.bench.load.drive import Record
from penstock.bench.load.metrics import Figures, ttft
from penstock.bench.load.stats import percentile

BUSY, SLOW_LOOP, STOPPED = 0.7, 0.005, 0.5
"""Share of a processor, seconds of the loop's delay at its 99th percentile, and seconds of one delay, from which the
client may be what is measured."""
SHORT_PROMPT = 0.1
"""Share by which a prompt's tokens may differ from those asked for."""


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """Of the measuring process during a run.

    Attributes:
        cpu: processors it kept busy; 1 is all that a Python process has.
        lag_p99, lag_max: seconds that its event loop was late.
    """

    cpu: float
    lag_p99: float
    lag_max: float


def warnings(records: Sequence[Record], found: Figures, client: ClientLoad) -> list[str]:
    return [
        *_failures(records, found),
        *_lengths(records, found),
        *_client(found, client),
        *_steadiness(records, found),
    ]


def _failures(records: Sequence[Record], found: Figures) -> Iterator[str]:
    if found.errors:
        failed = found.requests - found.succeeded
        listed = ", ".join(f"{n} {code}" for code, n in found.errors.items())
        message = next((f"; the first said: {record.message}" for record in records if record.message), "")
        yield f"{failed} of {found.requests} requests failed ({listed}){message}; percentiles are of the others"
    if found.ttft is not None and found.ttft.n < 100:
        yield f"p99 of {found.ttft.n} requests is their largest; 100 requests are the least that have one"


def _lengths(records: Sequence[Record], found: Figures) -> Iterator[str]:
    answered = [record for record in records if not record.error]
    fewer = [record for record in answered if record.tokens < record.asked_out]
    if fewer:
        got, asked = sum(record.tokens for record in fewer), sum(record.asked_out for record in fewer)
        yield f"{len(fewer)} answers are shorter than asked: {got} tokens of {asked}; short answers look fast"
    if more := sum(record.tokens > record.asked_out for record in answered):
        yield f"{more} answers are longer than asked"
    silent = sum(record.output_tokens is None for record in answered)
    if silent:
        yield f"the server sent no usage with {silent} answers: their tokens are events with text"
    many = [record for record in answered if record.output_tokens is not None and len(record.times) > record.tokens]
    if many:
        yield f"{len(many)} answers brought more events with text than their usage has tokens: one of the two is wrong"
    if found.events and (per := found.output_tokens / found.events) > 1.05 and not silent:
        yield f"an event brings {per:.2f} tokens on average, so ITL is of events; TPOT is of tokens"
    judged = [(r.prompt_tokens, r.asked_in) for r in answered if r.asked_in and r.prompt_tokens]
    off = [(got, asked) for got, asked in judged if abs(got - asked) > max(8, SHORT_PROMPT * asked)]
    if off:
        got, asked = (sum(pair[i] for pair in off) for i in (0, 1))
        yield f"{len(off)} prompts are of another length than asked: {got} tokens, asked were {asked}"


def _client(found: Figures, client: ClientLoad) -> Iterator[str]:
    if client.cpu > BUSY:
        yield f"the client kept {client.cpu:.2f} of a processor busy: it may be the bottleneck, not the server"
    if client.lag_p99 > SLOW_LOOP:
        late_ms = 1000 * client.lag_p99
        yield f"the client looked {late_ms:.0f} ms late 1 % of the time: latencies have an error of that size"
    if client.lag_max > STOPPED:
        yield f"the client stood still for {client.lag_max:.1f} s once (stopped, or the machine was): measure again"
    late, bound = found.late, max(SLOW_LOOP, 0.1 * found.e2e.p50 if found.e2e else 0.0)
    if late is not None and found.offered_per_s and late.p99 > bound:
        yield f"1 % of the requests were sent {1000 * late.p99:.0f} ms late or more; the latencies count it"


def _steadiness(records: Sequence[Record], found: Figures) -> Iterator[str]:
    """In an open loop a server that cannot keep up has a queue that grows, and its latency means only how long was
    measured."""
    ordered = [ttft(r) for r in sorted(records, key=lambda r: r.due) if not r.error and r.times]
    third = len(ordered) // 3
    if not found.offered_per_s or third < 10:
        return
    first, last = percentile(ordered[:third], 50), percentile(ordered[-third:], 50)
    if last > 3 * first and last > 0.2:
        yield (
            f"the queue grew: median TTFT {first:.2f} s in the first third, {last:.2f} in the last, at"
            f" {found.offered_per_s:.2f} requests/s offered; latencies say how long was measured"
        )
