"""A report for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.bench.load.report import Point, Report, Search
from penstock.bench.load.stats import Spread

SPREADS = ("ttft", "itl", "tpot", "e2e")


def table(report: Report) -> str:
    lines = [*headline(report), "", *_aligned(grid(rows(report)))]
    if report.search is not None:
        lines += ["", _found(report.search)]
    for point in _told_in_full(report):
        lines += ["", f"at {point.load}:" if point.kind == "rate" and "/s" in point.load else f"{point.load}:"]
        lines += [f"  {line}" for line in point_details(point)]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    lines += ["", *(f"{name:5} {text}" for name, text in report.definitions.items() if report.bench != "offline")]
    lines.append(f"      percentiles by nearest rank; machine: {report.machine}; {report.date}")
    return "\n".join(lines)


def _told_in_full(report: Report) -> Sequence[Point]:
    """All loads; of a search, the last run at the rate it found, or all at once if it found none."""
    if report.search is None:
        return report.points
    found = [point for point in report.points if point.value == report.search.rate]
    return found[-1:] or report.points[:1]


def headline(report: Report) -> list[str]:
    return [f"{report.model} by {report.server}", _asked(report)]


def _asked(report: Report) -> str:
    w = report.workload
    what = f"{w['input_len']} tokens in, {w['output_len']} out"
    if w.get("trace") or w.get("prompts"):
        what = f"of {w.get('trace') or w.get('prompts')}"
    more = [f"{w['turns']} turns"] if w.get("turns", 1) > 1 else []
    more += [f"{w['shared_prefix']} tokens shared by {w['prefix_groups']} groups"] if w.get("shared_prefix") else []
    return f"{w['requests']} sessions at each load: {', '.join([what, *more])}; {report.prompts}; seed {w['seed']}"


_HEAD = (
    "load",
    "req/s",
    "out tok/s",
    "in tok/s",
    *(f"{name.upper()} ms p50, p99" for name in SPREADS),
    "failed",
    "good",
)


def _row(point: Point) -> tuple[str, ...]:
    f = point.figures
    good = "" if f.good is None else f"{100 * f.good / f.requests:.0f} %"
    spreads = [_pair(getattr(f, name)) for name in SPREADS]
    rates = (f"{f.requests_per_s:.2f}", f"{f.output_per_s:.1f}", f"{f.input_per_s:.1f}")
    return (point.load, *rates, *spreads, str(f.requests - f.succeeded), good)


def _pair(spread: Spread | None) -> str:
    return "" if spread is None else f"{_ms(spread.p50)} {_ms(spread.p99):>7}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def rows(report: Report) -> list[tuple[str, ...]]:
    """The head, then a row for each load."""
    return [_HEAD, *(_row(point) for point in report.points)]


def grid(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without columns that say nothing."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def point_details(point: Point) -> Iterator[str]:
    f = point.figures
    for name in SPREADS:
        if (each := getattr(f, name)) is not None:
            sure = "".join(
                f"; {label} 95 % {_ms(low)} to {_ms(high)}"
                for label, interval in (("mean", each.mean_95), ("p50", each.p50_95), ("p99", each.p99_95))
                if interval is not None
                for low, high in [interval]
            )
            values = ", ".join(f"{p} {_ms(getattr(each, p))}" for p in ("mean", "p50", "p90", "p95", "p99", "max"))
            yield f"{name.upper():4} ms  {values}{sure}"
    offered = "" if f.offered_per_s is None else f"; offered {f.offered_per_s:.2f} requests/s"
    sure = "" if f.output_per_s_95 is None else f" (95 % {f.output_per_s_95[0]:.1f} to {f.output_per_s_95[1]:.1f})"
    flight = f"{f.in_flight:.1f} requests in flight, at most {f.peak_in_flight}"
    yield f"{f.output_per_s:.1f} tokens/s out{sure}, {flight}{offered}"
    cached = "" if f.cached_tokens is None else f", {f.cached_tokens} of them cached"
    yield f"{f.input_tokens} tokens in{cached}; {f.output_tokens} out in {f.events} events; {f.seconds:.2f} s"
    if f.good is not None:
        limits = ", ".join(f"{name} {seconds:g} s" for name, seconds in f.slo.items())
        yield f"goodput {f.good_per_s:.2f} requests/s: {f.good} of {f.requests} within {limits}"
    yield from _machines(point)
    for warning in point.warnings:
        yield f"WARNING {warning}"


def _machines(point: Point) -> Iterator[str]:
    if (c := point.client) is not None:
        yield (
            f"client {100 * c.cpu:.0f} % of a processor, event loop late by {1000 * c.lag_p99:.1f} ms (p99),"
            f" {1000 * c.lag_max:.1f} at most"
        )
    if (s := point.server) is not None:
        who = "process" if point.kind == "offline" else "server"
        grown = "" if s.growth is None else f", {100 * s.growth:+.1f} % from the second tenth of the run to the last"
        yield f"{who} {100 * s.cpu:.0f} % of a processor, peak memory {s.peak_bytes / (1 << 20):.0f} MiB{grown}"
    if point.verified is not None:
        asked, differ = point.verified
        yield f"{asked} answers asked for again, one at a time: {f'{differ} DIFFER' if differ else 'all the same'}"
    if (limit := point.limit) is not None:
        yield (
            f"{100 * limit.share:.0f} % of what this machine allows ({limit.read_gb_per_s:.1f} GB/s read,"
            f" {limit.matmul_gflops:.0f} GFLOP/s): these requests, as many at a time, need {limit.least_seconds:.2f} s"
        )
    if point.joules is not None:
        yield f"{point.joules:.0f} J, {point.joules / max(1, point.figures.output_tokens):.3f} J a token"
    elif point.joules_why:
        yield f"energy not readable: {point.joules_why}"
    if (m := point.money) is not None and m.per_million_output is not None and m.per_million_all is not None:
        good = "" if m.per_million_good is None else f", {m.per_million_good:.4g} good ones"
        tokens = f"{m.output_tokens_per_dollar:.0f} output tokens a dollar; " if m.output_tokens_per_dollar else ""
        yield (
            f"at {m.per_hour:g} dollars an hour: {tokens}a million costs {m.per_million_output:.4g} (output alone)"
            f"{good}, {m.per_million_all:.4g} (input and output)"
        )


def _found(search: Search) -> str:
    limits = ", ".join(f"{name} {seconds:g} s" for name, seconds in search.limits.items())
    if not search.rate:
        return f"scenario {search.scenario}: no rate was found whose p99 is within {limits}"
    upper = "nothing larger was tried" if search.failed is None else f"{search.failed:.4g}/s failed"
    sure = "a second run with other arrivals passed too" if search.confirmed else "NOT confirmed by a second run"
    return (
        f"scenario {search.scenario}: {search.rate:.4g}/s is the largest rate found whose p99 is within {limits};"
        f" {upper}; {sure}; {len(search.probes)} runs"
    )
