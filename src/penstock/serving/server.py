"""The process around the application: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.base import ConfigError
from penstock.base.logs import unhurried
from penstock.serving.admin import build_admin
from penstock.serving.app import build_app
from penstock.serving.context import Context
from penstock.serving.descriptors import room_for_connections
from penstock.serving.edge import LOOPBACK
from penstock.serving.gate import Gate
from penstock.serving.limits import CLOSE_SECONDS, DRAIN_SECONDS, MAX_CONNECTIONS, MAX_HEADER_BYTES
from penstock.serving.models import Models
from penstock.serving.protocol import Connection, secured
from penstock.serving.pulse import Pulse
from penstock.serving.requestlog import RequestLog
from penstock.serving.transport import Certificate, shared_with

if TYPE_CHECKING:
    from penstock.serving.spans import Spans

DEFAULT_PORT = 8000
_PORTS_TRIED = 100
SWITCH_SECONDS = 0.0005
"""After which a thread that tokenizes or renders gives way to the event loop; Python's own 5 ms add up, by thread."""


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


def url_of(bound: socket.socket, scheme: str = "http") -> str:
    """An address a client on this machine can use."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_access(gate: Gate, *, public: bool, admin: bool) -> None:
    """Refuses to serve everybody by accident.

    Args:
        public: others than this machine can reach it.
        admin: there is a port for administration.

    Raises:
        ConfigError: (keys_required) it is public and asks for no key; (admin_key_required) nobody could use that port.
    """
    if public and gate.ring is None:
        raise ConfigError(
            "keys_required",
            "Others could use this server without a key",
            why="--host is not an address of loopback, and there is no --keys",
            fix="make keys with `penstock keys add FILE` and serve with --keys FILE; or say --allow-anyone",
        )
    if admin and (gate.ring is None or not gate.ring.administered):
        raise ConfigError(
            "admin_key_required",
            "Nobody could use --admin-port",
            why="there is no --keys" if gate.ring is None else f"{gate.path} has no key of the role admin",
            fix="add one with `penstock keys add FILE --role admin` and serve with --keys FILE",
        )


def serve(
    models: Models,
    bound: socket.socket,
    announce: Callable[[], None],
    store: Path | None = None,
    *,
    gate: Gate | None = None,
    admin: socket.socket | None = None,
    log: RequestLog | None = None,
    spans: Spans | None = None,
    certificate: Certificate | None = None,
    origins: tuple[str, ...] = (),
) -> None:
    """Answers until SIGTERM or Ctrl-C. Loads the models that shall be there at once, then calls ``announce``.

    Then new requests are refused, running ones have DRAIN_SECONDS to finish, and what is left is aborted and told so.
    A second signal ends it at once. SIGHUP reads the keys and the certificate again and opens the log anew.

    Args:
        store: as for ``build_app``. Batches that an earlier process left go on.
        gate: who may use it; anybody by default.
        admin: where administration is spoken to, and nowhere else then.
        log: has a line for each request.
        spans: sends one for each.
        certificate, origins: HTTPS, and web pages whose scripts may read its answers, if it is to have any.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
        PenstockError: a model that shall be there at once cannot be loaded, as ``assemble.build_engine``.
    """
    apart = admin is not None
    app, context = build_app(models, store, hosts=_own_names(bound), gate=gate, log=log, spans=spans, apart=apart)
    context.starting, context.origins, app = True, origins, shared_with(app, origins)
    if admin is not None:
        app = _by_address(app, admin.getsockname()[:2], build_admin(context, hosts=_own_names(admin)))
    server = uvicorn.Server(_settings(app, certificate, room_for_connections()))
    ending = _Ending(server, context, certificate)

    async def run() -> None:
        pulse = Pulse(context.metrics.registry, lambda: bool(context.gate.live))
        companions = [asyncio.create_task(work) for work in (ending.accompany(announce), pulse.beat())]
        try:
            await server.serve(sockets=[sock for sock in (bound, admin) if sock is not None])
        finally:
            for companion in companions:
                companion.cancel()
            await context.batches.close()
            await asyncio.to_thread(models.close)

    _have_nobody_wait()
    # uvicorn raises the signal that ended it once more when it is done: SIGTERM shall then end nothing else.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGTERM, previous)
        for sink in (log, spans):
            if sink is not None:
                sink.close()
    ending.say()


def _have_nobody_wait() -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    unhurried()
    for name in ("asyncio", "python_multipart"):  # they warn of each client that went away, of each malformed form
        logging.getLogger(name).setLevel(logging.ERROR)


class _Ending:
    """How a server begins and ends, and signals. It listens while its models are loaded and until the last request is
    done, so that whoever asks meanwhile hears what it is about.
    """

    def __init__(self, server: uvicorn.Server, context: Context, certificate: Certificate | None) -> None:
        self.server, self.context, self.certificate = server, context, certificate
        self.signals: list[int] = []
        self._fault: Exception | None = None
        self._hurry = asyncio.Event()

    async def accompany(self, announce: Callable[[], None]) -> None:
        while not self.server.started:
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        if any((self.context.gate.path, self.context.log, self.certificate)):
            loop.add_signal_handler(signal.SIGHUP, self._renew)
        beginning = asyncio.create_task(self._begin(announce))
        await self.context.stop.wait()
        self.context.draining = True
        if self._fault is not None or (self.context.starting and not self.context.models.engines):
            self._hurry.set()  # nobody will be answered
        await self.context.batches.stop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._done(), DRAIN_SECONDS)
        self.server.should_exit = True
        beginning.cancel()
        await self.context.abort_all()

    async def _begin(self, announce: Callable[[], None]) -> None:
        try:
            await self.context.models.start()
            if not self.context.draining:
                self.context.starting = False
                await self.context.batches.resume()
                with suppress(OSError):  # whoever read it has read enough, or its disk is full
                    announce()
        except Exception as fault:
            if not self.context.draining:  # else it is why
                self._fault = fault
                self.context.stop.set()

    def say(self) -> None:
        """Raises what ended it, if that was no SIGTERM: KeyboardInterrupt, or what was wrong with a model."""
        if self.signals[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt
        if self._fault is not None:
            raise self._fault

    async def _done(self) -> None:
        while self.context.gate.admission.running and not self._hurry.is_set():
            await asyncio.sleep(0.05)

    def _renew(self) -> None:
        self.context.gate.reload_or_log()
        if self.certificate is not None:
            self.certificate.reload_or_log()
        if self.context.log is not None:
            self.context.log.reopen()

    def _end(self, number: int) -> None:
        self.signals.append(number)
        if self.context.stop.is_set():
            self._hurry.set()
        self.context.stop.set()


def _settings(
    app: ASGIApp, certificate: Certificate | None = None, connections: int = MAX_CONNECTIONS
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection if certificate is None else cast("type[Connection]", partial(secured, certificate.context)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,  # what is in memory; the edge checks exactly
    )


def _own_names(bound: socket.socket) -> frozenset[str] | None:
    return LOOPBACK | {bound.getsockname()[0]} if is_loopback(bound) else None


def _by_address(app: ASGIApp, address: tuple[str, int], other: ASGIApp) -> ASGIApp:
    """``other`` for connections to a host and its port, as the kernel has them: nothing that a client sends is asked,
    and two hosts may have a port of the same number.
    """

    async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
        await (other if scope["type"] == "http" and scope["server"] == address else app)(scope, receive, send)

    return chosen
