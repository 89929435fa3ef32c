"""The process around the application: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from penstock.base import ConfigError
from penstock.llm import AsyncLLM
from penstock.serving.app import build_app
from penstock.serving.edge import LOOPBACK
from penstock.serving.limits import DRAIN_SECONDS, MAX_CONNECTIONS, MAX_HEADER_BYTES

DEFAULT_PORT = 8000
_PORTS_TRIED = 100


def listen(host: str, port: int | None) -> socket.socket:
    """Takes a port before the model is loaded, so that a taken one is noticed at once.

    Connections queue from here on and are answered when the server runs.

    Args:
        port: None means DEFAULT_PORT or the next free one; 0 means any.

    Raises:
        ConfigError: (port_in_use) the port asked for, or each one tried, belongs to another process;
            (cannot_listen) the address is not one of this machine's.
    """
    tries = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED)
    for candidate in tries:
        try:
            return _bind(host, candidate)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    "cannot_listen",
                    f"Cannot listen on {host} port {candidate}",
                    why=(error.strerror or "the address is not understood").lower(),
                    fix="use an address of this machine and a port you may open",
                ) from error
    raise ConfigError(
        "port_in_use",
        f"Cannot listen on {host} port {tries[0]}",
        why="another process listens there" if port is not None else f"nor on the {_PORTS_TRIED - 1} ports after it",
        fix="choose another with --port" if port is not None else "name a free one with --port",
    )


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError:
        bound.close()
        raise
    return bound


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    """An address a client on this machine can use."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(llm: AsyncLLM, bound: socket.socket, announce: Callable[[], None], store: Path | None = None) -> None:
    """Answers until SIGTERM or Ctrl-C; calls ``announce`` once it does.

    Then no connection is accepted, running requests have DRAIN_SECONDS to finish, and what is left is aborted
    and told so. A second Ctrl-C ends at once.

    Args:
        store: folder of uploaded files and batches. Batches that an earlier process left go on.
    """
    own_names = LOOPBACK | {bound.getsockname()[0]} if is_loopback(bound) else None
    app, context = build_app(llm, hosts=own_names, store=store)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(DRAIN_SECONDS) + 5,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,  # what is in memory; the edge checks exactly
    )
    server = uvicorn.Server(config)

    async def accompany() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        if context.batches is not None:
            await context.batches.resume()
        with suppress(BrokenPipeError):  # whoever read it has read enough
            announce()
        while not server.should_exit:
            await asyncio.sleep(0.05)
        context.draining = True
        if context.batches is not None:
            await context.batches.close()
        await asyncio.sleep(DRAIN_SECONDS)
        await context.abort_all()

    async def run() -> None:
        companion = asyncio.create_task(accompany())
        try:
            await server.serve(sockets=[bound])
        finally:
            companion.cancel()

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that went away
    # uvicorn raises the signal that ended it once more when it is done: SIGTERM shall then end nothing else.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGTERM, previous)
        llm.close()
