"""``penstock trace``: what a server did in its last seconds, for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from penstock.base import ConfigError, InvalidRequest, NotFound, PenstockError, Unavailable
from penstock.cli.exits import emit
from penstock.cli.ps import chosen, directly

if TYPE_CHECKING:
    from penstock.core.service import Service

SECONDS_TO_ANSWER = 60.0
OPEN = "open it at https://ui.perfetto.dev or chrome://tracing"


def trace(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="of a server; the only one that you run on this machine")
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="where it is written")] = Path("trace.json"),
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="how far back")] = 10.0,
    model: Annotated[str | None, typer.Option(help="of several; by default the first that is in memory")] = None,
    api_key: Annotated[str | None, typer.Option(help="key of the role admin, if the server wants one")] = None,
) -> None:
    """Write what a server did in its last seconds: steps, requests, KV; no texts."""
    place, own, certificate = _place(url)
    which = "" if model is None else f"&model={quote(model)}"
    body = _fetched(f"{place}/debug/trace?seconds={seconds:g}{which}", api_key or own, certificate)
    write(out, body)
    emit(f"{out}: {len(json.loads(body)['traceEvents'])} events of {seconds:g} s; {OPEN}")


def _place(url: str | None) -> tuple[str, str | None, str | None]:
    """Where administration is spoken to; if the server is ours a key for it, and its certificate."""
    from penstock.serving.presence import servers

    if url is None:
        server = chosen(None)
        return server.admin, server.token, server.certificate
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest("invalid_url", f"{url!r} is no address of a server", fix="begin it with http://")
    ours = next((server for server in servers() if url in (server.url, server.admin)), None)
    return (url, None, None) if ours is None else (ours.admin, ours.token, ours.certificate)


def _fetched(url: str, key: str | None, certificate: str | None) -> bytes:
    import urllib.error
    import urllib.request

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with directly(certificate).open(request, timeout=SECONDS_TO_ANSWER) as answer:
            body: bytes = answer.read()
        json.loads(body)["traceEvents"]
        return body
    except urllib.error.HTTPError as error:
        raise _refused(error.code, error.read()) from None
    except (KeyError, TypeError):
        raise NotFound("trace_not_found", f"{url} has no trace", fix="name a server of penstock") from None
    except (OSError, ValueError) as error:
        what = f"{url.partition('/debug')[0]} does not answer as a server does"
        raise Unavailable("server_unreachable", what, why=str(error)[:200], fix="see `penstock ps`") from None


def _refused(status: int, body: bytes) -> PenstockError:
    try:
        code, why = (json.loads(body)["error"][name] for name in ("code", "message"))
    except (ValueError, KeyError, TypeError):
        code, why = "", f"status {status}"
    fix = "use --api-key with a key of the role admin"
    if code == "unknown_path":
        fix = "name the address of its --admin-port, if it has one"
    return NotFound("trace_refused", "The server gives no trace", why=why, fix=fix)


def write(path: Path, body: bytes) -> None:
    """Raises ConfigError: (trace_not_written)."""
    try:
        path.write_bytes(body)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(
            "trace_not_written", f"{path} cannot be written", why=why, fix="choose another file"
        ) from error


def write_own(path: Path, service: Service) -> None:
    """Of an engine in this process, all that it knows. Raises as ``write``."""
    from penstock.serving.chrome import chrome_trace

    write(path, json.dumps(chrome_trace(service.look(1e9).result())).encode())
