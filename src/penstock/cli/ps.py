"""``penstock ps`` and ``penstock top``: the servers of this user on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.base import InvalidRequest, NotFound
from penstock.cli.exits import emit

if TYPE_CHECKING:
    import ssl
    import urllib.request

    from rich.table import Table

    from penstock.serving.presence import Presence

SECONDS_TO_ANSWER = 3.0
Status = Mapping[str, Any]


def ps(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each server")] = False) -> None:
    """List the servers that you run on this machine, their models, and what they do."""
    from penstock.serving.presence import servers

    rows = [(server, status_of(server)) for server in servers()]
    if as_json:
        for server, status in rows:
            known = {"pid": server.pid, "model": server.model, "url": server.url, "admin": server.admin}
            emit(json.dumps(known | {"status": status}))
        return
    table: list[tuple[str, ...]] = [("pid", "model", "url", "state", "requests", "KV")]
    for server, status in rows:
        for model, *cells in _models(server, status):
            table.append((str(server.pid), model, server.url, *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        emit("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _models(server: Presence, status: Status | None) -> Iterator[tuple[str, str, str, str]]:
    """(name, state, requests, KV) of each."""
    if status is None:
        yield server.model, "no answer", "-", "-"
        return
    for model in _each(server, status):
        requests = model["requests"]["running"] + model["requests"]["waiting"]
        used = f"{_share(model['kv_blocks_used'], model['kv_blocks']):.0%}"
        yield model["name"], _state(status, model), str(requests), used if model["kv_blocks"] else "-"


def _each(server: Presence, status: Status) -> list[Status]:
    """Its models. A server of before there were several has one, which is in memory."""
    engine, requests = status["engine"], {"running": status["queue"]["requests"], "waiting": 0}
    kv = {name: engine[name] for name in ("kv_blocks", "kv_blocks_used")}
    one = {"name": server.model, "state": "loaded", "alive": status["alive"], "requests": requests} | kv
    found: list[Status] = status.get("models", [one])
    return found


def _state(status: Status, model: Status) -> str:
    if status["draining"] or model["alive"]:
        return "draining" if status["draining"] else "ready"
    if model["state"] == "unloaded" and model["failure"]:
        return f"failed: {model['failure']}"
    if model["state"] == "loading":
        return f"loading {model['progress']:.0%}"
    return "engine stopped" if model["state"] == "loaded" else str(model["state"])


def status_of(server: Presence) -> Status | None:
    """What a server says of itself; None if it does not answer."""
    import urllib.request

    headers = {} if server.token is None else {"Authorization": f"Bearer {server.token}"}
    request = urllib.request.Request(f"{server.admin}/status", headers=headers)
    try:
        with directly(server.certificate).open(request, timeout=SECONDS_TO_ANSWER) as answer:
            status: Status = json.loads(answer.read())
        return status
    except (OSError, ValueError):
        return None


def directly(certificate: str | None) -> urllib.request.OpenerDirector:
    """Asks without a proxy. ``certificate``: of a server on this machine, to be believed. Raises OSError."""
    import urllib.request

    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if certificate is not None:
        handlers.append(urllib.request.HTTPSHandler(context=_trusting(certificate)))
    return urllib.request.build_opener(*handlers)


def _trusting(certificate: str) -> ssl.SSLContext:
    """Believes whoever has this very certificate, by whatever name it is spoken to. Raises OSError."""
    import ssl

    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def top(
    pid: Annotated[int | None, typer.Argument(metavar="PID", help="as `penstock ps` shows it; the only one")] = None,
    *,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="seconds between looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="look once, over one interval, and end")] = False,
) -> None:
    """Watch a server: queue, batch, KV, tokens/s, and what each request is doing. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    server = chosen(pid)
    before, at = _asked(server), time.monotonic()
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, screen=console.is_terminal and not once) as live:
        while True:
            time.sleep(interval)
            status, now = _asked(server), time.monotonic()
            live.update(view(server, status, before, now - at), refresh=True)
            if once:
                return
            before, at = status, now


def chosen(pid: int | None) -> Presence:
    from penstock.serving.presence import servers

    found = servers()
    chosen = [server for server in found if pid in (None, server.pid)]
    if not chosen:
        what = "No server of yours runs here" if pid is None else f"No server of yours has the process id {pid}"
        raise NotFound("server_not_found", what, fix="start one with `penstock serve`; `penstock ps` lists them")
    if len(chosen) > 1:
        pids = ", ".join(str(server.pid) for server in chosen)
        raise InvalidRequest("server_ambiguous", f"There are {len(chosen)} servers", why=pids, fix="name one by its id")
    return chosen[0]


def _asked(server: Presence) -> Status:
    if (status := status_of(server)) is None:
        raise NotFound("server_gone", f"The server {server.pid} does not answer", fix="see `penstock ps`")
    return status


def view(server: Presence, status: Status, before: Status, seconds: float) -> Table:
    """What ``top`` shows. Rates are of the ``seconds`` since ``before``."""
    from rich.table import Table
    from rich.text import Text

    engine, queue = status["engine"], status["queue"]

    def rate(name: str) -> float:
        grown: int = engine[name] - before["engine"][name]
        return grown / max(seconds, 1e-6)

    one_line: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
    table = Table(box=None, show_header=False, title=Text(f"{server.model}  {server.url}  pid {server.pid}"))
    models = _each(server, status)
    states = ", ".join(f"{model['name']} {_state(status, model)}" for model in models)
    held, most = queue["tokens"], queue["tokens_limit"]
    rows = {
        "state": states if len(models) > 1 else _state(status, models[0]),
        "queue": f"{queue['requests']} requests, {_bar(held, most)} {held} of {most} tokens",
        "batch": f"{engine['running']} running, {engine['waiting']} waiting, {rate('steps'):.0f} steps/s",
        "KV": f"{_bar(engine['kv_blocks_used'], engine['kv_blocks'])} {engine['kv_blocks_used']} of "
        f"{engine['kv_blocks']} blocks, {engine['preemptions']} preemptions",
        "tokens/s": f"{rate('generated_tokens'):.0f} generated, {rate('prompt_tokens'):.0f} of prompts, "
        f"{_share(engine['prefix_hit_tokens'], engine['prompt_tokens']):.0%} of those ever found in the cache",
    }
    for name, text in rows.items():
        table.add_row(name, Text(text, **one_line))
    for request in status["requests"]:
        tenant = f"{request['tenant']}  " if request["tenant"] else ""
        done = f"{request['seconds']:7.2f} s  {request['prompt_tokens']} + {request['completion_tokens']} tokens"
        table.add_row(request["phase"], Text(f"{done:32}  {tenant}{request['id']}", **one_line))
    return table


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _bar(part: float, whole: float, width: int = 20) -> str:
    full = round(min(1.0, _share(part, whole)) * width)
    return "█" * full + "░" * (width - full)
