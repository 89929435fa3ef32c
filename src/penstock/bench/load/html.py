"""A report as one page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from penstock.bench.load.plots import distribution, timeline, xy_chart
from penstock.bench.load.report import Report
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
    """What the loads have in common: how latency grows, and the distributions."""
    points = report.points
    if len(points) > 1:
        for name in ("ttft", "tpot"):
            shown = {p: _grown(report, name, p) for p in ("p50", "p99")}
            yield xy_chart(f"{name.upper()} by load", _x_label(report), "ms", shown)
    for label, end in (("TTFT", 2), ("E2E", 3)):
        shares = {
            point.load: distribution([row[end] - row[0] for row in point.requests if row[2] is not None and not row[6]])
            for point in points
        }
        yield xy_chart(label, "seconds", "% of requests within", shares)


def _x_label(report: Report) -> str:
    if report.bench == "latency":
        return "tokens of a prompt"
    return {"rate": "sessions a second", "concurrency": "sessions at a time"}.get(report.points[-1].kind, "")


def _grown(report: Report, name: str, percentile: str) -> list[tuple[float, float]]:
    """A percentile in ms over the load; what came all at once has no place there."""
    found = []
    for point in report.points:
        f, spread = point.figures, getattr(point.figures, name)
        x = f.input_tokens / max(1, f.succeeded) if report.bench == "latency" else point.value
        if spread is not None and math.isfinite(x):
            found.append((x, 1000 * getattr(spread, percentile)))
    return sorted(found)


def _span(row: tuple[float, ...]) -> tuple[float, float | None, float]:
    return row[0], row[2], row[3]
