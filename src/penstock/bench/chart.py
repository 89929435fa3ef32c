"""Line charts as SVG, by nothing but text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 40, 48
COLORS = ("#1f6fb2", "#c4572e", "#3b8a4f", "#7a55a6")


def line_chart(
    title: str, x_label: str, ticks: Sequence[str], curves: Mapping[str, Sequence[float]], levels: Mapping[str, float]
) -> str:
    """Curves of shares, 0 to 1 upwards, over evenly spaced ticks; the name of each stands at its end.

    Args:
        curves: name -> a share for each tick.
        levels: name -> a share, drawn as a dashed line across.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(i: int) -> float:
        return LEFT + i * (right - LEFT) / max(1, len(ticks) - 1)

    def y(share: float) -> float:
        return bottom - share * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text_at(LEFT, TOP - 18, title, size=15),
        text_at((LEFT + right) / 2, HEIGHT - 10, x_label, anchor="middle"),
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(text_at(LEFT - 8, at + 4, f"{percent} %", anchor="end"))
    parts += [text_at(x(i), bottom + 18, tick, anchor="middle") for i, tick in enumerate(ticks)]
    labels = []
    for color, (name, shares) in zip(COLORS, curves.items(), strict=False):
        points = " ".join(f"{x(i):.1f},{y(share):.1f}" for i, share in enumerate(shares))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(i):.1f}" cy="{y(s):.1f}" r="3" fill="{color}"/>' for i, s in enumerate(shares)]
        labels.append((y(shares[-1]), name, color))
    for name, share in levels.items():
        at = y(share)
        dashes = 'stroke="#666" stroke-dasharray="5 4"'
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" {dashes}/>')
        labels.append((at, name, "#666"))
    lowest = 0.0
    for at, name, color in sorted(labels):  # from the top, none over another
        lowest = max(lowest + 15.0, at + 4.0)
        parts.append(text_at(right + 8, lowest, name, color=color))
    return "\n".join([*parts, "</svg>", ""])


def text_at(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, color: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(text)}</text>'
    )
