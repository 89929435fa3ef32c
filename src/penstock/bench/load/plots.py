"""Plots of a report as SVG, by nothing but text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from penstock.bench.chart import BOTTOM, COLORS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, text_at

Points = Sequence[tuple[float, float]]
SHADES = (*COLORS, "#b08a1e", "#2b8c8c", "#a13d6b", "#555555")
WAIT, STREAM, FAILED = "#c9d7e6", "#1f6fb2", "#c4572e"
ROW_PX, MOST_ROWS, MOST_POINTS = 5, 200, 400


def xy_chart(title: str, x_label: str, y_label: str, curves: Mapping[str, Points]) -> str:
    """Curves over two linear axes from 0; nothing of no points. Long curves lose points, at even distances."""
    drawn = {name: _thinned(points) for name, points in curves.items() if points}
    if not drawn:
        return ""
    most_x, most_y = (max(max(p[i] for p in points) for points in drawn.values()) or 1.0 for i in (0, 1))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x, y = _scale(most_x, LEFT, right), _scale(most_y, bottom, TOP)
    parts = [_open(HEIGHT), text_at(LEFT, TOP - 18, f"{title} ({y_label})", size=15)]
    parts.append(text_at((LEFT + right) / 2, HEIGHT - 10, x_label, anchor="middle"))
    for tick in ticks(most_y):
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        parts.append(text_at(LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end"))
    parts += [text_at(x(tick), bottom + 18, f"{tick:g}", anchor="middle") for tick in ticks(most_x)]
    for i, (name, points) in enumerate(drawn.items()):
        color = SHADES[i % len(SHADES)]
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{color}"/>' for a, b in points]
        parts.append(text_at(right + 8, TOP + 16 * (i + 1), name, color=color))
    return "".join([*parts, "</svg>"])


def timeline(title: str, spans: Sequence[tuple[float, float | None, float]]) -> str:
    """A row for each request: pale from due to its first text, dark to its end; one that brought no text is red.

    Args:
        spans: (due, first text, end) in seconds. Of more than MOST_ROWS, that many at even distances.
    """
    shown = [spans[i] for i in _evenly(len(spans), MOST_ROWS)]
    if not shown:
        return ""
    most, height, right = max(end for _, _, end in shown) or 1.0, TOP + BOTTOM + ROW_PX * len(shown), WIDTH - 20
    x = _scale(most, LEFT, right)
    parts = [_open(height), text_at(LEFT, TOP - 18, title, size=15)]
    for tick in ticks(most):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}" stroke="#ddd"/>')
        parts.append(text_at(x(tick), height - BOTTOM + 18, f"{tick:g}", anchor="middle"))
    parts.append(text_at((LEFT + right) / 2, height - 10, "seconds", anchor="middle"))
    for row, (due, first, end) in enumerate(shown):
        top = TOP + ROW_PX * row
        bars = [(due, end, FAILED)] if first is None else [(due, first, WAIT), (first, end, STREAM)]
        for start, stop, color in bars:
            width = max(0.5, x(stop) - x(start))
            parts.append(
                f'<rect x="{x(start):.1f}" y="{top}" width="{width:.1f}" height="{ROW_PX - 1}" fill="{color}"/>'
            )
    return "".join([*parts, "</svg>"])


def distribution(values: Sequence[float]) -> Points:
    """(value, percent of values not above it)."""
    ordered = sorted(values)
    return [(value, 100 * (i + 1) / len(ordered)) for i, value in enumerate(ordered)]


def ticks(most: float) -> list[float]:
    """Three to seven round numbers from 0 to at most ``most``."""
    step = 10 ** math.floor(math.log10(most / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) < 7)
    return [round(i * step, 12) for i in range(int(most / step + 1e-9) + 1)]


def _scale(most: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + value * (end - start) / most


def _open(height: int) -> str:
    view = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}><rect width="{WIDTH}" height="{height}" fill="white"/>'


def _thinned(points: Points) -> Points:
    return [points[i] for i in _evenly(len(points), MOST_POINTS)]


def _evenly(count: int, most: int) -> list[int]:
    """Indices, the first and the last among them."""
    return list(range(count)) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]
