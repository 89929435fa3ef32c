"""GET /: the dashboard, in files of ``page/`` that hold no data; what it shows it asks of the same routes as anybody.

Its charts are drawn by hand (``page/chart.js``, SVG): plotly's bundle is 4.5 MB of script for five lines, and it sets
inline styles, which the policy below forbids.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.gate import Access

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _file(path: Path) -> tuple[Access, Callable[[Request], Awaitable[Response]]]:
    body, kind = path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8"

    async def answer(_: Request) -> Response:
        return Response(body, headers={**_HEADERS, "content-type": kind})

    return "public", answer


PAGES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": _file(path)
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _TYPES
}
"""A route for each file, known by name when the server starts: no path that a client sends is ever opened."""
