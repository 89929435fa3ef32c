"""A report as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from penstock.bench.load.plots import distribution, timeline, xy_chart
from penstock.bench.load.report import Point, Report
from penstock.bench.load.table import grid, headline, point_details, rows

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1320px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}tr+tr{border-top:1px solid #ddd}svg{width:640px;max-width:100%}
.plots{display:flex;flex-wrap:wrap;gap:1em}.warn{color:#a33a12}li{margin:.15em 0}dt{font-weight:600}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181a1b}tr+tr{border-color:#444}.warn{color:#f0966f}}
"""


def page(report: Report) -> str:
    """HTML with style and plots inside: no script, nothing fetched."""
    title = escape(f"{report.model}: penstock bench {report.bench}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = [f"<h1>{title}</h1>", *(f"<p>{escape(line)}</p>" for line in headline(report)), _table(report)]
    body += [f'<p class="warn">{escape(note)}</p>' for note in report.notes]
    body += ['<div class="plots">', *_across(report), "</div>"]
    for point in report.points:
        body.append(f"<h2>{escape(point.load)}</h2><ul>")
        body += [_item(line) for line in point_details(point)]
        body += ["</ul>", timeline(f"Requests, {point.load}", [_span(row) for row in point.requests])]
    body.append("<h2>Definitions</h2><dl>")
    body += [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.definitions.items()]
    body.append(f"</dl><p>{escape(report.machine)}; penstock {escape(report.penstock)}; {escape(report.date)}</p>")
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


def _item(line: str) -> str:
    warned = ' class="warn"' if line.startswith("WARNING") else ""
    return f"<li{warned}>{escape(line)}</li>"


def _table(report: Report) -> str:
    first, *others = grid(rows(report))
    cells = ["".join(f"<th>{escape(cell)}</th>" for cell in first)]
    cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in others]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _across(report: Report) -> Iterator[str]:
    """What the loads have in common: how latency grows with throughput, and the distributions."""
    points = report.points
    if len(points) > 1:
        for name in ("ttft", "tpot"):
            shown = {p: _against(points, name, p) for p in ("p50", "p99")}
            yield xy_chart(f"{name.upper()} by load", "output tokens a second", "ms", shown)
    for label, start, end in (("TTFT", 0, 2), ("E2E", 0, 3)):
        curves = {
            point.load: distribution(
                [row[end] - row[start] for row in point.requests if row[2] is not None and not row[6]]
            )
            for point in points
        }
        yield xy_chart(label, "seconds", "% of requests within", {k: v for k, v in curves.items() if v})


def _against(points: tuple[Point, ...], name: str, percentile: str) -> list[tuple[float, float]]:
    spreads = [(point.figures.output_per_s, getattr(point.figures, name)) for point in points]
    return sorted((rate, 1000 * getattr(spread, percentile)) for rate, spread in spreads if spread is not None)


def _span(row: tuple[float, ...]) -> tuple[float, float | None, float]:
    return row[0], row[2], row[3]
